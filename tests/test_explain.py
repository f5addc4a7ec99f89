"""Explaining: where each segment of a prompt was found, or why it must be computed. Nothing is computed or counted."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import backprompt_db as bp
from backprompt_db.catalog import Selection
from backprompt_db.cli.output import plain
from backprompt_db.database import Database
from backprompt_db.explanation import Difference, Explanation, Miss, Place, Reason
from backprompt_db.keys import address
from backprompt_db.maintenance.existing import open_catalog
from backprompt_db.representation import Part
from backprompt_db.store.contract import Key

from .conftest import tiny_gpt2, train_tokenizer
from .maintenance_parts import flip_a_bit, remove_blob

Open = Callable[..., Database]
MakeLM = Callable[..., bp.LanguageModel]

CONTEXT = "Pick the endpoint for the request.\n"
REQUEST = "Request: who signed up?"
ENDING = "\nEndpoint:"
EVERYTHING = {Part.SCORES, Part.LOGITS, Part.KV}


def prompt(lm: bp.LanguageModel, *strings: str) -> bp.Text:
    text = lm.text("")
    for string in strings or (CONTEXT, REQUEST, ENDING):
        text += string
    return text


def run(lm: bp.LanguageModel, *strings: str) -> bp.ModelRepr:
    """Run a prompt, and store all of it."""
    result = prompt(lm, *strings)()
    lm.db.flush()
    return result


def reasons(explanation: Explanation) -> list[Reason | None]:
    return [None if segment.miss is None else segment.miss.reason for segment in explanation.segments]


def last_miss(explanation: Explanation) -> Miss:
    miss = explanation.segments[-1].miss
    assert miss is not None
    return miss


def key_of(lm: bp.LanguageModel, text: bp.Text, part: Part) -> Key:
    """The key of a part of the last segment of a text."""
    return Key(address(text.tips()[0].id, lm.weights_id, lm.tokenizer_id), part)


def places(explanation: Explanation) -> set[Place]:
    return {place for segment in explanation.segments for place in segment.places.values()}


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


class TestReasons:
    def test_what_nobody_has_run_was_never_seen(self, lm: bp.LanguageModel) -> None:
        found = prompt(lm).explain()
        assert reasons(found) == [Reason.NEVER_SEEN] * 3
        assert last_miss(found).needed == (Part.SCORES, Part.LOGITS)
        assert found.segments[0].places == {}
        assert (found.nbytes, found.num_cached_tokens) == (0, 0)
        assert found.num_missing_tokens == len(prompt(lm)().input_ids)

    def test_other_weights_are_named(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        run(lm)
        before = lm.weights_id
        with torch.no_grad():
            lm.model.transformer.wte.weight[0, 0] += 1  # one step of fine-tuning
        found = prompt(lm).explain()
        assert reasons(found) == [Reason.OTHER_MODEL] * 3
        (seen,) = last_miss(found).seen_under
        assert (seen.weights_id, seen.dtype, seen.model_name) == (before, "float32", found.model_name)
        assert found.weights_id != before
        assert before.hex()[:8] in str(found)

    def test_another_dtype_is_named(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        run(lm)
        narrow = make_lm(tiny_gpt2().bfloat16(), db=lm.db)
        found = prompt(narrow).explain()
        assert reasons(found) == [Reason.OTHER_MODEL] * 3
        assert [seen.dtype for seen in last_miss(found).seen_under] == ["float32"]
        assert found.dtype == "bfloat16"

    def test_another_tokenizer_is_told_from_another_model(self, lm: bp.LanguageModel) -> None:
        run(lm)
        other = train_tokenizer()
        other.add_tokens(["Endpoint"])
        found = prompt(bp.LanguageModel(lm.model, other, db=lm.db)).explain()
        assert reasons(found) == [Reason.OTHER_TOKENIZER] * 3
        (seen,) = last_miss(found).seen_under
        assert seen.tokenizer_id == lm.tokenizer_id != found.tokenizer_id
        assert seen.weights_id == found.weights_id

    def test_after_an_edit_the_first_character_that_differs_is_shown(self, lm: bp.LanguageModel) -> None:
        run(lm)
        found = prompt(lm, CONTEXT, "Request: who left?", ENDING).explain()
        assert reasons(found) == [None, Reason.NEVER_SEEN, Reason.OTHER_PARENTS]
        assert last_miss(found).difference == Difference(
            at=len(CONTEXT + "Request: who "),
            before=(CONTEXT + "Request: who ")[-24:],
            stored="signed up?\nEndpoint:",
            given="left?\nEndpoint:",
        )
        assert "Request: who |signed up?" in str(found)
        assert "Request: who |left?" in str(found)

    def test_of_several_stored_prompts_the_nearest_is_shown(self, lm: bp.LanguageModel) -> None:
        for request in ("Request: delete my account", REQUEST, "Show me"):
            run(lm, CONTEXT, request, ENDING)
        found = prompt(lm, CONTEXT, "Request: who signed off?", ENDING, " GET").explain()
        miss = found.segments[2].miss
        assert miss is not None
        assert miss.difference is not None
        assert miss.difference.stored.startswith("up?")

    def test_a_chain_of_moved_segments_is_compared_with_one_prompt(self, lm: bp.LanguageModel) -> None:
        run(lm, CONTEXT, REQUEST, ENDING)
        run(lm, "Choose", REQUEST, " Answer:", ENDING)
        found = prompt(lm, "Pick one", REQUEST, ENDING).explain()
        (first, second) = (segment.miss for segment in found.segments[1:])
        assert first is not None
        assert second is not None
        assert first.difference is not None
        assert second.difference is not None
        assert first.difference.at == second.difference.at == len("Pick ")

    def test_the_same_characters_in_other_pieces_do_not_differ(self, lm: bp.LanguageModel) -> None:
        run(lm)
        found = prompt(lm, CONTEXT + REQUEST, ENDING).explain()
        assert reasons(found) == [Reason.NEVER_SEEN, Reason.OTHER_PARENTS]
        assert last_miss(found).difference is None
        assert "in other pieces" in str(found)

    def test_moved_text_of_another_model_names_it(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        run(lm)
        found = prompt(make_lm(tiny_gpt2(seed=1), db=lm.db), "Another beginning. ", ENDING).explain()
        assert reasons(found) == [Reason.NEVER_SEEN, Reason.OTHER_PARENTS]
        assert [seen.weights_id for seen in last_miss(found).seen_under] == [lm.weights_id]

    def test_the_catalog_of_the_database_below_is_asked_too(
        self, open_db: Open, make_lm: MakeLM, tmp_path: Path
    ) -> None:
        with open_db(tmp_path / "team") as db:
            lm = make_lm(db=db)
            run(lm)
            gone = key_of(lm, prompt(lm), Part.SCORES)
            assert db.catalog is not None
            db.store.delete([gone])
            db.catalog.evict([gone], at=(evicted_at := time.time()))
        mine = make_lm(db=open_db(tmp_path / "mine", base=tmp_path / "team"))
        assert reasons(prompt(mine).explain()) == [None, None, Reason.EVICTED]
        assert last_miss(prompt(mine).explain()).at == evicted_at
        moved = prompt(mine, CONTEXT, "Request: who left?", ENDING).explain()
        assert reasons(moved) == [None, Reason.NEVER_SEEN, Reason.OTHER_PARENTS]
        assert mine.db.counters.num_base_hits == 0

    def test_what_came_back_after_an_eviction_is_not_called_evicted(self, lm: bp.LanguageModel) -> None:
        run(lm, CONTEXT, REQUEST)
        assert lm.db.catalog is not None
        tip = [key_of(lm, prompt(lm), part) for part in Part]
        run(lm)
        lm.db.store.delete(tip)
        lm.db.catalog.evict(tip, at=time.time())
        lm.db.memory.clear()
        lm.score(prompt(lm, CONTEXT, REQUEST), [ENDING])
        lm.db.flush()
        assert reasons(prompt(lm).explain()) == [None, None, Reason.NOT_KEPT]

    def test_thousands_of_pieces_are_explained(self, lm: bp.LanguageModel) -> None:
        strings = [f"Piece {number}. " for number in range(2000)]
        run(lm, "Piece 1. ")
        found = prompt(lm, "Other. ", *strings[1:]).explain()
        assert len(found.segments) == 2000
        assert reasons(found)[:3] == [Reason.NEVER_SEEN, Reason.OTHER_PARENTS, Reason.NEVER_SEEN]

    def test_what_was_evicted_says_when(self, lm: bp.LanguageModel) -> None:
        run(lm)
        before = time.time()
        lm.db.memory.clear()
        tip = key_of(lm, prompt(lm), Part.KV)
        lm.db.collector.collect(to_nbytes=0, selection=Selection(address_prefix=tip.address.hex()))
        found = prompt(lm).explain()
        assert reasons(found) == [None, None, Reason.EVICTED]
        at = last_miss(found).at
        assert at is not None
        assert before <= at <= time.time()
        assert re.search(r"scores logits evicted \d+ s ago", found._repr_html_())
        assert found.needed_seconds is not None
        assert found.needed_seconds > 0

    def test_an_evicted_ancestor_is_missing_only_where_it_is_needed(self, lm: bp.LanguageModel) -> None:
        run(lm, CONTEXT, REQUEST)
        first = key_of(lm, prompt(lm, CONTEXT), Part.KV)
        assert lm.db.catalog is not None
        lm.db.store.delete([first])
        lm.db.catalog.evict([first], at=time.time())
        assert reasons(prompt(lm, CONTEXT, REQUEST).explain()) == [None, None]
        longer = prompt(lm, CONTEXT, REQUEST, ENDING).explain()
        assert reasons(longer) == [Reason.EVICTED, None, Reason.NEVER_SEEN]
        assert longer.segments[0].miss is not None
        assert longer.segments[0].miss.needed == (Part.KV,)

    def test_what_was_damaged_was_quarantined(self, open_db: Open, make_lm: MakeLM, tmp_path: Path) -> None:
        with open_db(tmp_path / "db") as db:
            lm = make_lm(db=db)
            run(lm)
            damaged = key_of(lm, prompt(lm), Part.SCORES)
        flip_a_bit(tmp_path / "db", damaged)
        lm = make_lm(db=open_db(tmp_path / "db"))
        before = time.time()
        assert lm.db.fetch({damaged.address: [Part.SCORES]}) == {}
        for flush in (False, True):  # whether or not the catalog was told already
            if flush:
                lm.db.flush()
            miss = last_miss(prompt(lm).explain())
            assert (miss.reason, miss.needed) == (Reason.QUARANTINED, (Part.SCORES,))
            assert miss.detail == "the scores part does not match its digest"
            assert miss.at is not None
            assert before <= miss.at <= time.time()
        prompt(lm)()
        lm.db.flush()
        assert reasons(prompt(lm).explain()) == [None] * 3

    def test_of_a_completion_scores_alone_were_kept(self, lm: bp.LanguageModel) -> None:
        run(lm, CONTEXT, REQUEST)
        lm.score(prompt(lm, CONTEXT, REQUEST), [ENDING])
        lm.db.flush()
        found = prompt(lm).explain()
        assert reasons(found) == [None, None, Reason.NOT_KEPT]
        assert last_miss(found).needed == (Part.LOGITS,)
        assert set(found.segments[-1].places) == {Part.SCORES}

    def test_what_the_store_lost_without_a_trace_is_lost(self, open_db: Open, make_lm: MakeLM, tmp_path: Path) -> None:
        with open_db(tmp_path / "db") as db:
            lm = make_lm(db=db)
            run(lm)
            gone = key_of(lm, prompt(lm), Part.LOGITS)
        remove_blob(tmp_path / "db", gone)
        found = prompt(make_lm(db=open_db(tmp_path / "db"))).explain()
        assert reasons(found) == [None, None, Reason.LOST]

    def test_another_namespace_is_never_looked_at(self, open_db: Open, make_lm: MakeLM, tmp_path: Path) -> None:
        with open_db(tmp_path / "db", namespace="theirs") as db:
            run(make_lm(db=db))
        lm = make_lm(db=open_db(tmp_path / "db", namespace="ours"))
        found = prompt(lm).explain()
        assert reasons(found) == [Reason.NEVER_SEEN] * 3
        assert found.namespace == "ours"
        run(lm, REQUEST, ENDING)
        assert reasons(prompt(lm).explain()) == [Reason.NEVER_SEEN, Reason.OTHER_PARENTS, Reason.OTHER_PARENTS]

    def test_without_a_catalog_the_reason_is_unknown(self, make_lm: MakeLM) -> None:
        with bp.open(":memory:") as db:
            lm = make_lm(db=db)
            found = prompt(lm).explain()
            assert reasons(found) == [Reason.UNKNOWN] * 3
            assert found.num_missing_tokens == len(prompt(lm)().input_ids)
            assert found.needed_seconds is None

    def test_a_catalog_that_is_garbage_costs_reasons_only(self, open_db: Open, make_lm: MakeLM, tmp_path: Path) -> None:
        with open_db(tmp_path / "db") as db:
            run(make_lm(db=db))
        (tmp_path / "db" / "catalog.sqlite").write_bytes(b"garbage" * 1000)
        lm = make_lm(db=open_db(tmp_path / "db"))
        assert reasons(prompt(lm, CONTEXT, REQUEST, ENDING, " GET").explain()) == [None, None, None, Reason.UNKNOWN]


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


class TestSeams:
    def test_seams_that_change_tokens_are_among_what_is_explained(self, lm: bp.LanguageModel) -> None:
        text = prompt(lm, "Pick the endp", "oint for the request.")
        found = text.explain()
        assert list(found.seams or ()) == text.seams() != []
        assert re.search(r"a seam changes tokens: '.*endp' \+ 'oint.*' is .+, joined .*endpoint", _flat(str(found)))
        assert prompt(lm).explain().seams == ()


def _flat(string: str) -> str:
    return " ".join(string.split())


class _Cells(HTMLParser):
    """The text of an HTML table, and which tags there are."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


HOSTILE = "<script>alert(1)</script>\x1b[31m[bold]\u202e&amp;"


class TestViews:
    def test_a_notebook_shows_texts_and_obeys_none(self, lm: bp.LanguageModel) -> None:
        run(lm, HOSTILE, ENDING)
        parser = _Cells()
        parser.feed(prompt(lm, HOSTILE + "<img src=x>", ENDING).explain()._repr_html_())
        assert parser.tags == {"table", "thead", "tbody", "tr", "th", "td", "pre"}
        assert any(text.startswith("<script>alert(1)</script>\\x1b[31m[bold]\\u202e&amp;<img") for text in parser.texts)
        assert not any(character in text for text in parser.texts for character in "\x1b\u202e")

    def test_print_shows_a_table_that_no_text_can_disturb(self, lm: bp.LanguageModel) -> None:
        string = str(prompt(lm, HOSTILE, ENDING).explain())
        assert "<script>alert(1)</script>" in string
        assert "[bold]" in _flat(string)
        assert not any(character in string for character in "\x1b\u202e")
        assert string.splitlines()[0].split() == ["segment", "found", "tokens", "bytes", "seconds"]

    def test_a_terminal_shows_it_in_colour(self, lm: bp.LanguageModel) -> None:
        console = Console(file=StringIO(), force_terminal=True, color_system="standard", width=100)
        console.print(prompt(lm).explain())
        assert isinstance(console.file, StringIO)
        assert "\x1b[33m" in console.file.getvalue()

    def test_programs_get_all_of_it(self, lm: bp.LanguageModel) -> None:
        run(lm)
        found = plain(prompt(lm, CONTEXT, "Request: who left?", ENDING).explain())
        assert list(found) == EXPLANATION_FIELDS
        assert [list(segment) for segment in found["segments"]] == [SEGMENT_FIELDS] * 3
        assert found["segments"][0]["places"] == {"scores": "disk", "logits": "disk", "kv": "memory"}
        assert found["segments"][0]["miss"] is None
        assert list(found["segments"][2]["miss"]) == MISS_FIELDS
        assert found["segments"][2]["miss"]["reason"] == "other-parents"
        assert list(found["segments"][2]["miss"]["difference"]) == ["at", "before", "stored", "given"]


EXPLANATION_FIELDS = [
    "model_name", "dtype", "weights_id", "tokenizer_id", "namespace", "segments", "seams", "num_cached_tokens",
    "num_missing_tokens", "nbytes", "saved_seconds", "needed_seconds",
]  # fmt: skip
SEGMENT_FIELDS = [
    "text", "parents", "start", "segment_id", "address", "places", "nbytes", "num_tokens", "seconds", "miss",
]  # fmt: skip
MISS_FIELDS = ["needed", "reason", "at", "detail", "seen_under", "difference"]


def test_the_catalog_finds_the_newest_of_many_with_the_same_text(lm: bp.LanguageModel) -> None:
    for number in range(5):
        run(lm, f"Context {number}. ", ENDING)
    assert lm.db.directory is not None
    with open_catalog(lm.db.directory) as catalog:
        given = prompt(lm).segments()
        found = catalog.namesakes([ENDING, REQUEST], (lm.weights_id, lm.tokenizer_id), given)
        assert {segment.parents[0].string for segment in found} == {f"Context {number}. " for number in range(5)}
        assert set(found.values()) == {True}
        assert all(segment.id == prompt(lm, segment.parents[0].string, ENDING).tips()[0].id for segment in found)
        assert catalog.seconds_per_token(lm.weights_id) == pytest.approx(
            sum(row.compute_seconds for row in catalog.rows()) / catalog.totals().num_tokens
        )
