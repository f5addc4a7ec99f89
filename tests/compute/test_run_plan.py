"""Planning a run ahead: what it foretells is what the run does, and nothing happens meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import backprompt_db as bp
from backprompt_db.compute.batch.run_plan import RunPlan, Warmed
from backprompt_db.database.config import Config, write_config
from backprompt_db.errors import ContextLengthExceeded
from backprompt_db.prompt.representation import OWN_PARTS, Part
from tests.conftest import cases, tiny_gpt2
from tests.support.families import Family, by_name

Open = Callable[..., bp.Database]
MakeLM = Callable[..., bp.LanguageModel]

CONTEXT = "Pick the endpoint for the request.\n"
COMPLETIONS = [" GET /users", " POST /orders", "x"]
LONG = "0123456789" * 30
"""300 tokens: the tokenizer never saw a digit beside another."""
HOSTILE = "<script>alert(1)</script>\x1b[31m&amp;"


def prompts(number: int = 10) -> list[bp.Text]:
    return [bp.Text(CONTEXT) + f"Request: number {each} of the lazy dog" + "\nEndpoint:" for each in range(number)]


def unrelated(number: int = 40) -> Iterator[bp.Text]:
    return (
        bp.Text(f"{each}: The quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n" * 3)
        for each in range(number)
    )


def branched() -> list[bp.Text]:
    return [bp.Text(CONTEXT) + bp.parallel("One. ", "Two is longer. ", f"{each}. ") + "Question:" for each in range(4)]


def assert_foretold(foretold: RunPlan, done: Warmed) -> None:
    assert (foretold.num_missing_tokens, foretold.num_passes) == (done.num_computed_tokens, done.num_passes)
    assert (foretold.num_texts, foretold.num_stored_texts) == (done.num_texts, done.num_stored_texts)
    assert foretold.too_long == done.too_long


def can_score(lm: bp.LanguageModel, text: str, completions: list[str]) -> bool:
    try:
        lm.score(text, completions)
    except ContextLengthExceeded:
        return False
    return True


def stored_arrays(db: bp.Database) -> dict[Part, int]:
    """Bytes of the arrays of everything stored, by part."""
    from backprompt_db.codec.blob import decode

    sizes = dict.fromkeys(OWN_PARTS, 0)
    for key, _ in list(db.store.keys()):
        blob = db.store.get(key)
        assert blob is not None
        sizes[key.part] += sum(array.nbytes for array in decode(key.part, blob).values())
    return sizes


def stored_blobs(db: bp.Database) -> int:
    return sum(blob.nbytes for key, _ in list(db.store.keys()) if (blob := db.store.get(key)) is not None)


RUNS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "one call": (prompts, {}),
    "batches": (prompts, {"batch_size": 3}),
    "unrelated": (unrelated, {"batch_size": 16}),
    "branches": (branched, {}),
    "completions": (prompts, {"completions": COMPLETIONS, "batch_size": 4}),
    "scores alone": (prompts, {"keep": ["scores"], "batch_size": 4}),
    "one text": (lambda: CONTEXT, {}),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("deterministic", cases([False, True], by_default=[False]))
class TestForetells:
    def test_tokens_passes_and_bytes_are_those_of_the_run(
        self, make_lm: MakeLM, run: str, *, deterministic: bool
    ) -> None:
        texts, options = RUNS[run]
        lm = make_lm(deterministic=deterministic)
        foretold = lm.plan(texts(), **options)
        done = lm.warm(texts(), **options)
        assert_foretold(foretold, done)
        assert foretold.num_passes > 0
        assert foretold.nbytes == stored_arrays(lm.db)
        written = sum(foretold.nbytes.values()) + foretold.overhead_nbytes
        assert written == pytest.approx(stored_blobs(lm.db), rel=0.02)
        rest = lm.plan(texts(), **options)
        assert (rest.num_missing_tokens, rest.num_passes, rest.seconds) == (0, 0, 0)
        assert sum(rest.nbytes.values()) == rest.overhead_nbytes == 0
        assert rest.num_stored_texts == rest.num_texts == done.num_texts


class TestAgainstPlainCalls:
    def test_a_call_of_the_model_does_what_was_foretold(self, make_lm: MakeLM) -> None:
        lm = make_lm()
        foretold = lm.plan(prompts())
        lm(prompts())
        assert foretold.num_missing_tokens == lm.counters.num_computed_tokens
        assert foretold.num_passes == lm.counters.num_model_calls

    def test_scoring_does_what_was_foretold(self, make_lm: MakeLM) -> None:
        lm = make_lm()
        lm(CONTEXT)
        before = lm.counters
        foretold = lm.plan(prompts(), COMPLETIONS)
        lm.score(prompts(), COMPLETIONS)
        assert foretold.num_missing_tokens == lm.counters.num_computed_tokens - before.num_computed_tokens
        assert foretold.num_passes == lm.counters.num_model_calls - before.num_model_calls
        assert foretold.num_completions == len(COMPLETIONS)

    def test_what_is_stored_of_the_segments_counts(self, lm: bp.LanguageModel) -> None:
        result = lm(prompts(1)[0])
        foretold = lm.plan(prompts(2))
        assert foretold.num_cached_tokens == len(result.input_ids)
        assert (foretold.num_texts, foretold.num_stored_texts) == (2, 1)
        assert (foretold.num_segments, foretold.num_missing_segments) == (5, 2)

    def test_a_part_that_was_evicted_is_computed_again(self, lm: bp.LanguageModel) -> None:
        lm.warm(prompts())
        lm.db.store.delete([key for key, _ in list(lm.db.store.keys()) if key.part is Part.LOGITS])
        lm.db.memory.clear()
        foretold = lm.plan(prompts())
        assert foretold.nbytes[Part.LOGITS] > foretold.nbytes[Part.KV] == 0
        assert_foretold(foretold, lm.warm(prompts()))


class TestNothingHappens:
    def test_nothing_is_computed_written_or_counted(self, lm: bp.LanguageModel) -> None:
        lm(CONTEXT)
        lm.db.flush()
        assert lm.db.catalog is not None
        before = lm.counters, lm.db.counters, list(lm.db.store.keys()), lm.db.catalog.rows()
        lm.plan(prompts(), COMPLETIONS)
        lm.db.flush()
        assert before == (lm.counters, lm.db.counters, list(lm.db.store.keys()), lm.db.catalog.rows())

    def test_the_weights_are_not_loaded(self, open_db: Open, tokenizer: Any, tmp_path: Path) -> None:
        tiny_gpt2().save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        with open_db(tmp_path / "db") as db:
            bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db)(CONTEXT)
        lm = bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=open_db(tmp_path / "db"))
        foretold = lm.plan(unrelated(), batch_size=16)
        assert not lm.is_loaded
        assert foretold.model_name == str(tmp_path / "model")
        assert foretold.memory.weights_nbytes == sum(each.nbytes for each in tiny_gpt2().parameters())
        assert_foretold(foretold, lm.warm(unrelated(), batch_size=16))
        assert lm.is_loaded

    @pytest.mark.parametrize(
        "arguments",
        [{"dtype": "bfloat16"}, {"torch_dtype": "float16"}, {"n_layer": 2}, {"num_hidden_layers": 1}],
        ids=str,
    )
    def test_arguments_that_change_the_model_change_the_plan(
        self, open_db: Open, tokenizer: Any, tmp_path: Path, arguments: dict[str, Any]
    ) -> None:
        tiny_gpt2().save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        with open_db(tmp_path / "db") as db:
            bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db, **arguments)
        db = open_db(tmp_path / "db")
        lm = bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db, **arguments)
        foretold = lm.plan(prompts())
        assert not lm.is_loaded
        assert_foretold(foretold, lm.warm(prompts()))
        assert foretold.nbytes == stored_arrays(lm.db)

    @pytest.mark.parametrize("name", ["llama-dynamic", "bert-encoder"])
    def test_a_model_that_would_be_refused_has_no_plan(self, make_lm: MakeLM, name: str) -> None:
        lm = make_lm(by_name(name).build())
        with pytest.raises(bp.errors.UnsupportedModel) as refused:
            lm.warm(prompts())
        with pytest.raises(bp.errors.UnsupportedModel) as unplanned:
            lm.plan(prompts())
        assert unplanned.value.message == refused.value.message


class TestTooLong:
    def test_texts_that_are_too_long_are_listed_and_left_out(self, lm: bp.LanguageModel) -> None:
        texts: list[bp.Text | str] = [*prompts(2), LONG, CONTEXT + LONG]
        foretold = lm.plan(texts)
        first = foretold.too_long[0]
        assert (first.num_positions, first.max_positions, first.beginning) == (300, 256, LONG[:200])
        assert [each.number for each in foretold.too_long] == [2, 3]
        assert (foretold.num_texts, foretold.num_too_long, foretold.num_segments) == (4, 2, 5)
        assert "2 texts are too long" in str(foretold)
        assert_foretold(foretold, lm.warm(texts))

    def test_a_completion_may_make_it_too_long(self, lm: bp.LanguageModel) -> None:
        foretold = lm.plan(["0" * 200, "0" * 250], ["1" * 50])
        assert [each.number for each in foretold.too_long] == [1]

    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
    def test_what_is_listed_is_just_what_cannot_be_run(
        self, make_lm: MakeLM, family: str, *, deterministic: bool
    ) -> None:
        neo = {"attention_types": [[["global"], 3]], "max_position_embeddings": 64}
        model = tiny_gpt2(n_positions=64) if family == "gpt2" else Family("", "packs", "gpt_neo", neo).build()
        lm = make_lm(model, deterministic=deterministic)
        texts = ["0" * num_tokens for num_tokens in range(60, 67)]
        for completions in (["1"], ["111"], ["1", "222"]):
            foretold = lm.plan(texts, completions)
            assert_foretold(foretold, lm.warm(texts, completions))
            listed = {each.number for each in foretold.too_long}
            assert {number for number, text in enumerate(texts) if not can_score(lm, text, completions)} == listed
            assert len(listed) == max(map(len, completions)) + 1 + deterministic
        foretold = lm.plan(texts, keep=["scores"])
        assert len(foretold.too_long) == 1 + deterministic
        assert_foretold(foretold, lm.warm(texts, keep=["scores"]))

    def test_positions_that_are_used_twice_are_places_of_their_own_in_a_pass(self, make_lm: MakeLM) -> None:
        options = {"attention_types": [[["global"], 3]], "max_position_embeddings": 64}
        lm = make_lm(Family("", "packs", "gpt_neo", options).build())
        foretold = lm.plan([lm.text("0" * 40) + lm.text("1" * 30, start=0)])
        assert [each.num_positions for each in foretold.too_long] == [70]

    def test_branches_count_side_by_side_where_a_pass_must_hold_them(self, make_lm: MakeLM) -> None:
        options = {"attention_types": [[["global"], 3]], "max_position_embeddings": 64}
        lm = make_lm(Family("", "packs", "gpt_neo", options).build())
        wide = bp.Text(CONTEXT) + bp.parallel(*(f"{each}0123456789" for each in "abcdef"))
        texts = [wide + "Question:", *prompts(30), wide]
        foretold = lm.plan(texts)
        assert [(each.number, each.max_positions) for each in foretold.too_long] == [(0, 64)]
        assert_foretold(foretold, lm.warm(texts))


class TestSeconds:
    def test_they_are_unknown_where_nothing_was_recorded(self, lm: bp.LanguageModel) -> None:
        foretold = lm.plan(prompts())
        assert foretold.seconds is None
        assert "nothing is recorded of this model" in str(foretold)

    def test_they_follow_from_what_was_recorded(self, lm: bp.LanguageModel) -> None:
        lm.warm(unrelated())
        assert lm.db.catalog is not None
        recorded = sum(row.compute_seconds for row in lm.db.catalog.rows(limit=1000))
        others = [bp.Text("Other: ") + text for text in unrelated()]
        foretold = lm.plan(others)
        assert foretold.seconds is not None
        assert recorded / 4 < foretold.seconds < recorded * 4

    def test_more_context_takes_longer(self, lm: bp.LanguageModel) -> None:
        lm.warm(unrelated())
        short, long = lm.plan("Request: who?"), lm.plan(["0" * 200])
        assert short.seconds is not None
        assert long.seconds is not None
        assert 0 < short.seconds < long.seconds

    def test_a_catalog_that_is_gone_knows_no_seconds(self, make_lm: MakeLM) -> None:
        with bp.open(":memory:") as db:
            lm = make_lm(db=db)
            lm(CONTEXT)
            foretold = lm.plan(prompts())
            assert foretold.seconds is None
            assert foretold.room is None
            assert foretold.num_missing_tokens > 0


class TestRoom:
    def test_pages_are_about_those_that_are_used(self, lm: bp.LanguageModel) -> None:
        room = lm.plan(unrelated()).room
        assert room is not None
        assert room.holds
        lm.warm(unrelated())
        grown = lm.db.store.usage().live_nbytes - room.live_nbytes
        assert grown == pytest.approx(room.written_nbytes, rel=0.25)

    def test_what_would_be_evicted_is_said(self, open_db: Open, make_lm: MakeLM, tmp_path: Path) -> None:
        lm = make_lm(db=open_db(tmp_path / "db"))
        lm.warm(unrelated())
        live_nbytes = lm.db.store.usage().live_nbytes
        write_config(tmp_path / "db", Config(max_nbytes=int(live_nbytes * 1.2), grace_seconds=0.0))
        foretold = lm.plan([bp.Text("Other: ") + text for text in unrelated(20)], keep="all")
        assert foretold.room is not None
        assert foretold.room.holds
        assert foretold.room.num_evicted_parts > 0
        assert foretold.room.evicted_nbytes > 0
        assert "would be evicted" in str(foretold)
        assert lm.db.store.usage().live_nbytes == live_nbytes

    def test_a_limit_that_holds_too_little_is_said(self, open_db: Open, make_lm: MakeLM, tmp_path: Path) -> None:
        lm = make_lm(db=open_db(tmp_path / "db"))
        write_config(tmp_path / "db", Config(max_nbytes=500_000))
        foretold = lm.plan(unrelated())
        assert foretold.room is not None
        assert not foretold.room.holds
        assert "The limit does not hold" in str(foretold)


class TestFidelity:
    @pytest.mark.parametrize("fidelity", ["bfloat16", "int8"])
    def test_keys_and_values_take_what_the_database_keeps(self, open_db: Open, make_lm: MakeLM, fidelity: str) -> None:
        lm = make_lm(db=open_db(fidelity=fidelity))
        foretold = lm.plan(prompts())
        lm.warm(prompts())
        assert foretold.nbytes == stored_arrays(lm.db)


class TestViews:
    def test_json_has_what_python_has(self, lm: bp.LanguageModel) -> None:
        from backprompt_db.cli.output import json_value

        foretold = lm.plan(prompts())
        fields = json_value(foretold)
        assert list(fields) == list(RunPlan.__dataclass_fields__)
        assert fields["nbytes"] == {part.name.lower(): nbytes for part, nbytes in foretold.nbytes.items()}
        assert fields["memory"]["total_nbytes"] == sum(fields["memory"].values()) - fields["memory"]["total_nbytes"]

    def test_hostile_texts_are_shown_and_mean_nothing(self, lm: bp.LanguageModel) -> None:
        foretold = lm.plan([HOSTILE + LONG])
        assert "\x1b" not in str(foretold)
        assert "<script>" not in foretold._repr_html_()
        assert "&lt;script&gt;" in foretold._repr_html_()

    def test_nothing_but_parts_may_be_kept(self, lm: bp.LanguageModel) -> None:
        with pytest.raises(bp.errors.PromptError, match="are no parts"):
            lm.plan(prompts(), keep=["hidden states"])
        with pytest.raises(bp.errors.PromptError, match="batch_size=0"):
            lm.plan(prompts(), batch_size=0)
        with pytest.raises(bp.errors.PromptError, match="completions is one text"):
            lm.plan(prompts(), " GET")


def test_the_median_of_passes_is_not_led_by_a_slow_one() -> None:
    from backprompt_db.compute.pace import weighted_median

    assert math.isclose(weighted_median([(1.0, 100.0), (1.1, 100.0), (50.0, 90.0)]), 0.011)
