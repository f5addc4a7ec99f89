"""Explaining a miss: why a segment of a prompt must be computed."""

from __future__ import annotations

import re
import time
from pathlib import Path

import torch

import backprompt_db as bp
from backprompt_db.catalog.records import Selection
from backprompt_db.database.opening import open_catalog
from backprompt_db.prompt.explanation import Difference, Reason
from backprompt_db.prompt.representation import OWN_PARTS, Part
from tests.conftest import tiny_gpt2, train_tokenizer
from tests.support.explanations import CONTEXT, ENDING, REQUEST, MakeLM, Open, key_of, last_miss, prompt, reasons, run
from tests.support.operations import flip_a_bit, remove_blob


class TestReasons:
    def test_what_nobody_has_run_was_never_seen(self, lm: bp.LanguageModel) -> None:
        found = prompt(lm).explain()
        assert reasons(found) == [Reason.NEVER_SEEN] * 3
        assert last_miss(found).needed == (Part.SCORES,)
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
        tip = [key_of(lm, prompt(lm), part) for part in OWN_PARTS]
        run(lm)
        lm.db.store.delete(tip)
        lm.db.catalog.evict(tip, at=time.time())
        lm.db.memory.clear()
        lm.score(prompt(lm, CONTEXT, REQUEST), [ENDING])
        lm.db.flush()
        longer = prompt(lm, CONTEXT, REQUEST, ENDING, " GET").explain()
        assert reasons(longer) == [None, None, Reason.NOT_KEPT, Reason.NEVER_SEEN]

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
        lm.db.evictor.evict(to_nbytes=0, selection=Selection(address_prefix=tip.address.hex()))
        found = prompt(lm).explain()
        assert reasons(found) == [None, None, Reason.EVICTED]
        at = last_miss(found).at
        assert at is not None
        assert before <= at <= time.time()
        assert re.search(r"scores evicted \d+ s ago", found._repr_html_())
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
        assert reasons(prompt(lm).explain()) == [None, None, None]
        found = prompt(lm, CONTEXT, REQUEST, ENDING, " GET").explain()
        assert reasons(found) == [None, None, Reason.NOT_KEPT, Reason.NEVER_SEEN]
        (miss,) = (segment.miss for segment in found.segments[2:3])
        assert miss is not None
        assert miss.needed == (Part.LOGITS, Part.KV)
        assert set(found.segments[2].places) == {Part.SCORES}

    def test_what_the_store_lost_without_a_trace_is_lost(self, open_db: Open, make_lm: MakeLM, tmp_path: Path) -> None:
        with open_db(tmp_path / "db") as db:
            lm = make_lm(db=db)
            run(lm)
            gone = key_of(lm, prompt(lm), Part.SCORES)
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
