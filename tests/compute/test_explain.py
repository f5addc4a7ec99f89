"""Explaining: where each segment of a prompt was found. Nothing is computed or counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import backprompt_db as bp
from backprompt_db.prompt.explanation import Place, Reason
from backprompt_db.prompt.representation import Part
from tests.conftest import tiny_gpt2
from tests.support.explanations import (
    CONTEXT,
    ENDING,
    EVERYTHING,
    REQUEST,
    MakeLM,
    Open,
    last_miss,
    places,
    prompt,
    reasons,
    run,
)


class TestHits:
    def test_what_was_run_is_found_with_its_tokens_bytes_and_seconds(self, lm: bp.LanguageModel) -> None:
        result = run(lm)
        found = prompt(lm).explain()
        assert reasons(found) == [None, None, None]
        assert [segment.text for segment in found.segments] == [CONTEXT, REQUEST, ENDING]
        assert [segment.parents for segment in found.segments] == [(), (0,), (1,)]
        assert all(set(segment.places) == set(segment.nbytes) == EVERYTHING for segment in found.segments)
        assert found.num_cached_tokens == len(result.input_ids)
        assert (found.num_missing_tokens, found.needed_seconds) == (0, 0)
        assert lm.db.catalog is not None
        rows = lm.db.catalog.rows()
        assert found.nbytes == sum(sum(row.nbytes.values()) for row in rows)
        assert found.saved_seconds == pytest.approx(sum(row.compute_seconds for row in rows))
        assert (found.weights_id, found.tokenizer_id, found.dtype) == (lm.weights_id, lm.tokenizer_id, "float32")

    def test_the_tier_that_would_answer_is_named(self, open_db: Open, make_lm: MakeLM, tmp_path: Path) -> None:
        with open_db(tmp_path / "db") as db:
            run(make_lm(db=db))
        lm = make_lm(db=open_db(tmp_path / "db"))
        assert places(prompt(lm).explain()) == {Place.DISK}
        prompt(lm)()
        parts = [segment.places for segment in prompt(lm).explain().segments]
        assert [each[Part.SCORES] for each in parts] == [Place.MEMORY] * 3
        assert parts[-1][Part.LOGITS] is Place.MEMORY
        assert [each[Part.KV] for each in parts] == [Place.DISK] * 3

    def test_what_is_still_queued_is_waited_for(self, lm: bp.LanguageModel) -> None:
        prompt(lm)()
        found = prompt(lm, CONTEXT, ENDING).explain()
        assert reasons(found) == [None, Reason.OTHER_PARENTS]
        assert found.saved_seconds is not None

    def test_keys_and_values_of_a_pass_are_in_memory(self, lm: bp.LanguageModel) -> None:
        run(lm)
        assert {segment.places[Part.KV] for segment in prompt(lm).explain().segments} == {Place.MEMORY}

    def test_a_database_in_memory_is_memory(self, make_lm: MakeLM) -> None:
        with bp.open(":memory:") as db:
            lm = make_lm(db=db)
            run(lm)
            found = prompt(lm).explain()
            assert reasons(found) == [None] * 3
            assert places(found) == {Place.MEMORY}
            assert found.nbytes > 0
            assert found.num_cached_tokens == len(prompt(lm)().input_ids)
            assert found.saved_seconds is None

    def test_what_the_database_below_has_is_found_there(self, open_db: Open, make_lm: MakeLM, tmp_path: Path) -> None:
        with open_db(tmp_path / "team") as db:
            run(make_lm(db=db), CONTEXT, REQUEST)
        lm = make_lm(db=open_db(tmp_path / "mine", base=tmp_path / "team"))
        found = prompt(lm).explain()
        assert reasons(found) == [None, None, Reason.NEVER_SEEN]
        assert places(found) == {Place.BASE}
        assert found.saved_seconds is not None
        assert found.saved_seconds > 0
        run(lm)
        assert places(prompt(lm, CONTEXT, REQUEST).explain()) >= {Place.BASE}
        own = prompt(lm).explain().segments[-1]
        assert Place.BASE not in own.places.values()

    def test_branches_are_found_beside_any_others(self, lm: bp.LanguageModel) -> None:
        def branched(*branches: str) -> bp.Text:
            return lm.text(CONTEXT) + bp.parallel(*branches) + ENDING

        branched("Document one. ", "Document two. ")()
        lm.db.flush()
        swapped = branched("Document two. ", "Document one. ").explain()
        assert reasons(swapped) == [None] * 4
        assert sorted(swapped.segments[-1].parents) == [1, 2]
        changed = branched("Document one. ", "Document three. ").explain()
        assert reasons(changed) == [None, None, Reason.NEVER_SEEN, Reason.OTHER_PARENTS]
        difference = last_miss(changed).difference
        assert difference is not None
        assert difference.at == len(CONTEXT + "Document one. Document t")
        assert (difference.stored[:2], difference.given[:2]) == ("wo", "hr")


class TestNothingHappens:
    def test_nothing_is_computed_written_or_counted(self, lm: bp.LanguageModel) -> None:
        run(lm)
        assert lm.db.catalog is not None
        before = lm.db.counters, lm.counters, lm.db.catalog.rows(), lm.db.catalog.counts(), list(lm.db.store.keys())
        for strings in ((CONTEXT, REQUEST, ENDING), (CONTEXT, "Something else", ENDING)):
            text = prompt(lm, *strings)
            assert text.explain().segments == lm.explain(text).segments
            assert text.model_repr is None
        lm.db.flush()
        assert before == (
            lm.db.counters, lm.counters, lm.db.catalog.rows(), lm.db.catalog.counts(), list(lm.db.store.keys())
        )  # fmt: skip

    def test_the_model_is_not_loaded(self, open_db: Open, tokenizer: Any, tmp_path: Path) -> None:
        tiny_gpt2().save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        with open_db(tmp_path / "db") as db:
            run(bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db), CONTEXT)
        lm = bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=open_db(tmp_path / "db"))
        found = prompt(lm).explain()
        assert reasons(found) == [None, Reason.NEVER_SEEN, Reason.NEVER_SEEN]
        assert found.num_missing_tokens is not None
        assert not lm.is_loaded
        assert len(prompt(lm)().input_ids) == found.num_missing_tokens + (found.num_cached_tokens or 0)

    def test_an_empty_prompt_and_another_models_text_are_refused(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        with pytest.raises(bp.errors.PromptError, match="empty"):
            lm.explain("")
        with pytest.raises(bp.errors.PromptError, match="different models"):
            make_lm().explain(prompt(lm))

    def test_what_it_foretells_is_what_a_run_does(self, lm: bp.LanguageModel) -> None:
        run(lm)
        for text in (
            prompt(lm, CONTEXT, "Request: who left?", ENDING),
            lm.text(CONTEXT) + bp.parallel("One. ", "Two. ") + ENDING,
            prompt(lm, CONTEXT, REQUEST, ENDING, " GET /users"),
        ):
            found = text.explain()
            result = text()
            assert (found.num_cached_tokens, found.num_missing_tokens) == (
                result.num_cached_tokens, result.num_computed_tokens
            )  # fmt: skip
