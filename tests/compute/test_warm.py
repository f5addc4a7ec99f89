"""Warming: batches that go on where they were, keep what was asked, and lose nothing when they are interrupted."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backprompt_db as bp
from backprompt_db.compute.inference.forward import PassResult
from backprompt_db.compute.inference.runner import ModelRunner
from backprompt_db.database.config import Config, write_config
from backprompt_db.prompt.representation import OWN_PARTS, Part
from tests.conftest import tiny_gpt2

Open = Callable[..., bp.Database]
MakeLM = Callable[..., bp.LanguageModel]

CONTEXT = "Pick the endpoint for the request.\n"
COMPLETIONS = [" GET /users", " POST /orders"]
LONG = "0123456789" * 30


def prompts(number: int) -> Iterator[bp.Text]:
    return (bp.Text(CONTEXT) + f"Request: number {each}" + "\nEndpoint:" for each in range(number))


def parts_stored(db: bp.Database) -> set[Part]:
    return {key.part for key, _ in db.store.keys()}


class TestWhatIsThereAfterwards:
    def test_running_the_texts_computes_nothing_more(self, lm: bp.LanguageModel) -> None:
        done = lm.warm(prompts(10), batch_size=4)
        assert (done.num_texts, done.num_stored_texts, done.num_passes) == (10, 0, lm.counters.num_model_calls)
        assert done.num_computed_tokens == lm.counters.num_computed_tokens > 0
        results = lm(prompts(10))
        assert lm.counters.num_model_calls == done.num_passes
        assert [result.num_computed_tokens for result in results] == [0] * 10

    def test_scoring_the_completions_computes_nothing_more(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        done = lm.warm(prompts(10), COMPLETIONS, batch_size=4)
        scores = lm.score(prompts(10), COMPLETIONS)
        assert lm.counters.num_model_calls == done.num_passes
        assert np.allclose(scores, make_lm().score(prompts(10), COMPLETIONS), atol=1e-4)

    def test_it_is_on_disk_and_answers_another_process(self, open_db: Open, make_lm: MakeLM, tmp_path: Path) -> None:
        lm = make_lm(db=open_db(tmp_path / "db"))
        lm.warm(prompts(4))
        again = make_lm(db=open_db(tmp_path / "db"))
        again(prompts(4))
        assert again.counters.num_model_calls == 0

    @pytest.mark.parametrize("keep", [["scores"], ["scores", "logits"], "kv"])
    def test_only_what_is_asked_is_kept(self, lm: bp.LanguageModel, keep: str | list[str]) -> None:
        lm.warm(prompts(4), keep=keep)
        named = [keep] if isinstance(keep, str) else keep
        assert parts_stored(lm.db) == {Part[name.upper()] for name in named}
        assert lm.warm(prompts(4), keep=keep).num_stored_texts == 4

    def test_a_part_that_is_missing_is_added(self, lm: bp.LanguageModel) -> None:
        lm.warm(prompts(4), keep=["scores"])
        done = lm.warm(prompts(4))
        assert done.num_stored_texts == 0
        assert parts_stored(lm.db) == set(OWN_PARTS)
        assert lm.warm(prompts(4)).num_computed_tokens == 0

    def test_one_text_is_warmed_like_several(self, lm: bp.LanguageModel) -> None:
        assert lm.warm(CONTEXT).num_texts == 1
        assert lm(CONTEXT).num_computed_tokens == 0

    def test_nothing_is_nothing(self, lm: bp.LanguageModel) -> None:
        done = lm.warm([])
        assert (done.num_texts, done.num_passes, done.tokens_per_second) == (0, 0, 0)


class TestGoingOn:
    def test_what_is_stored_is_skipped_without_loading_the_model(
        self, open_db: Open, tokenizer: object, tmp_path: Path
    ) -> None:
        tiny_gpt2().save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")  # type: ignore[attr-defined]
        with open_db(tmp_path / "db") as db:
            bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db).warm(prompts(10))
        lm = bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=open_db(tmp_path / "db"))
        assert lm.warm(prompts(10)).num_stored_texts == 10
        assert not lm.is_loaded
        assert lm.warm(prompts(12)).num_stored_texts == 10
        assert lm.is_loaded

    def test_an_interrupt_loses_nothing_that_was_computed(self, make_lm: MakeLM, db: bp.Database) -> None:
        def interrupted() -> Iterator[bp.Text]:
            yield from prompts(8)
            raise KeyboardInterrupt

        lm = make_lm(db=db)
        with pytest.raises(KeyboardInterrupt) as interrupt:
            lm.warm(interrupted(), batch_size=4)
        assert "run the same again" in " ".join(interrupt.value.__notes__)
        assert db.counters.num_stored == len(list(db.store.keys())) > 0
        done = make_lm(db=db).warm(prompts(8), batch_size=4)
        assert done.num_stored_texts == 8

    def test_an_interrupt_in_the_middle_of_a_batch_keeps_its_finished_passes(
        self, make_lm: MakeLM, db: bp.Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm = make_lm(db=db, deterministic=True)
        lm(CONTEXT)
        compute, calls = ModelRunner.compute, iter(range(100))

        def interrupting(runner: ModelRunner, *arguments: Any, **named: Any) -> PassResult:
            if next(calls) == 5:
                raise KeyboardInterrupt
            return compute(runner, *arguments, **named)

        monkeypatch.setattr(ModelRunner, "compute", interrupting)
        with pytest.raises(KeyboardInterrupt):
            lm.warm(prompts(8))
        computed = lm.counters.num_computed_tokens
        monkeypatch.undo()
        fresh = make_lm(db=db, deterministic=True)
        done = fresh.warm(prompts(8))
        whole = make_lm(deterministic=True)
        whole.warm(prompts(8))
        assert done.num_computed_tokens == whole.counters.num_computed_tokens - computed

    def test_an_error_of_the_texts_loses_nothing_either(self, lm: bp.LanguageModel) -> None:
        with pytest.raises(bp.errors.PromptError, match="empty"):
            lm.warm([*prompts(4), bp.Text("")], batch_size=2)
        assert lm.warm(prompts(4)).num_stored_texts == 4


class TestFailing:
    def test_texts_that_are_too_long_are_left_out_and_listed(self, lm: bp.LanguageModel) -> None:
        done = lm.warm([LONG, *prompts(3), LONG])
        assert [(each.number, each.num_positions) for each in done.too_long] == [(0, 300), (4, 300)]
        assert (done.num_texts, done.num_too_long) == (5, 2)
        assert lm.warm(prompts(3)).num_stored_texts == 3

    def test_a_database_that_is_only_read_is_refused(self, make_lm: MakeLM, open_db: Open, tmp_path: Path) -> None:
        open_db(tmp_path / "db").close()
        lm = make_lm(db=open_db(tmp_path / "db", mode="r"))
        with pytest.raises(bp.errors.StoreReadOnly):
            lm.warm(prompts(1))
        assert lm.plan(prompts(1)).nbytes == dict.fromkeys(OWN_PARTS, 0)

    def test_what_cannot_be_stored_is_an_error(self, make_lm: MakeLM, open_db: Open, tmp_path: Path) -> None:
        lm = make_lm(db=open_db(tmp_path / "db"))
        write_config(tmp_path / "db", Config(max_nbytes=10_000))
        with pytest.raises(bp.errors.StoreFull):
            lm.warm(prompts(20))

    def test_completions_are_checked_as_score_does(self, lm: bp.LanguageModel) -> None:
        with pytest.raises(bp.errors.PromptError, match="a completion is empty"):
            lm.warm(prompts(1), [""])
        with pytest.raises(bp.errors.PromptError, match="completions is one text"):
            lm.warm(prompts(1), " GET /users")


class TestMany:
    @pytest.mark.exhaustive
    def test_memory_does_not_grow_with_the_number_of_texts(self, lm: bp.LanguageModel) -> None:
        lm.warm(prompts(50), keep=["scores"])

        def peak(number: int) -> int:
            stored = (text for _ in range(number) for text in prompts(50))
            tracemalloc.start()
            done = lm.warm(stored, keep=["scores"])
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert done.num_stored_texts == 50 * number
            return most

        few, many = peak(2), peak(40)
        assert many < few + 500_000

    def test_no_more_is_read_ahead_than_a_batch(self, lm: bp.LanguageModel) -> None:
        read = []

        def counted() -> Iterator[bp.Text]:
            for number, text in enumerate(prompts(10)):
                read.append((number, lm.counters.num_computed_tokens > 0))
                yield text

        lm.warm(islice(counted(), 10), batch_size=3)
        assert [is_computed for _, is_computed in read] == [False] * 3 + [True] * 7
