"""What the catalog knows of what the stores hold."""

from __future__ import annotations

import dataclasses
import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import CutsRecord, GreedyPath, Order, Row, Source, TokenizerRecord, Totals
from backprompt_db.errors import CatalogError, PromptError
from backprompt_db.prompt.ids import Address, SegmentId, TokenizerId, WeightsId, namespace_id
from backprompt_db.prompt.representation import Part
from tests.support.catalogs import (
    HOSTILE,
    MODEL,
    OTHER_WEIGHTS,
    TOKENIZER,
    WEIGHTS,
    new_catalog,
    origin_of,
    stored,
    texts,
)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with new_catalog(tmp_path / "catalog.sqlite") as opened:
        yield opened


def test_a_recorded_part_is_a_row_with_everything_that_is_known_of_it(catalog: Catalog) -> None:
    origin = dataclasses.replace(origin_of("one two", namespace="tenant"), start=7)
    catalog.save(MODEL)
    catalog.record([stored(origin, Part.SCORES, 24)], at=1000.5)
    assert catalog.rows() == [
        Row(
            address=origin.address,
            segment_id=origin.segment_id,
            weights_id=WEIGHTS,
            tokenizer_id=TOKENIZER,
            model_name="gpt2",
            namespace="tenant",
            text="one two",
            start=7,
            num_tokens=2,
            nbytes={Part.SCORES: 24},
            compute_seconds=0.5,
            created_at=1000.5,
            last_used_at=None,
            num_hits=0,
            is_pinned=False,
            label=None,
        )
    ]


def test_parts_fill_in_as_they_arrive_and_the_slowest_one_counts(catalog: Catalog) -> None:
    slow, fast = origin_of("text", compute_seconds=0.9), origin_of("text", compute_seconds=0.1)
    catalog.record([stored(fast, Part.SCORES, 8)], at=1.0)
    catalog.record([stored(slow, Part.LOGITS, 16), stored(fast, Part.KV, 32)], at=2.0)
    (row,) = catalog.rows()
    assert row.nbytes == {Part.SCORES: 8, Part.LOGITS: 16, Part.KV: 32}
    assert (row.compute_seconds, row.created_at) == (0.9, 1.0)


def test_recording_again_changes_nothing_but_sizes(catalog: Catalog) -> None:
    origin = origin_of("text")
    catalog.record([stored(origin)], at=1.0)
    catalog.touch({origin.address: 3}, at=5.0)
    catalog.pin([origin.address])
    catalog.label([origin.address], "golden")
    before = catalog.rows()
    catalog.record([stored(origin)], at=9.0)
    assert catalog.rows() == before
    catalog.record([stored(origin, nbytes=7)], at=9.0)
    assert catalog.rows() == [dataclasses.replace(before[0], nbytes={Part.KV: 7})]


@pytest.mark.parametrize("seconds", [math.inf, -math.inf, math.nan, -1.0, 1e308])
def test_what_a_part_claims_spoils_no_sums(catalog: Catalog, seconds: float) -> None:
    liar = dataclasses.replace(origin_of("liar", compute_seconds=seconds), num_tokens=2**63 - 1)
    honest = origin_of("honest")
    catalog.record([stored(dataclasses.replace(liar, text=str(number))) for number in range(3)], at=1.0)
    catalog.touch({row.address: 2**40 for row in catalog.rows()}, at=2.0)
    catalog.record([stored(honest)], at=3.0)
    assert catalog.totals().num_representations == 4
    catalog.forget([(row.address, Part.KV) for row in catalog.rows() if row.address != honest.address])
    assert catalog.totals() == Totals(1, 1, 1, 1, {**dict.fromkeys(Part, 0), Part.KV: 100}, 0, 0.0)


def test_a_part_belongs_to_the_namespace_of_its_segment(catalog: Catalog) -> None:
    child = origin_of("child", origin_of("context"))
    elsewhere = dataclasses.replace(child, weights_id=OTHER_WEIGHTS, namespace="tenant")
    catalog.record([stored(child)], at=1.0)
    catalog.record([stored(elsewhere)], at=2.0)
    assert [row.namespace for row in catalog.rows()] == ["", ""]
    assert catalog.totals(namespace="").num_segments == catalog.totals().num_segments == 1


def test_pins_and_labels_can_be_taken_back(catalog: Catalog) -> None:
    origin = origin_of("text")
    catalog.record([stored(origin)], at=1.0)
    before = catalog.rows()
    catalog.pin([origin.address])
    catalog.label([origin.address], "golden")
    assert [(row.is_pinned, row.label) for row in catalog.rows()] == [(True, "golden")]
    catalog.pin([origin.address], is_pinned=False)
    catalog.label([origin.address], None)
    assert catalog.rows() == before


def test_hits_add_up_and_the_last_use_never_moves_back(catalog: Catalog) -> None:
    origin = origin_of("text")
    catalog.record([stored(origin)], at=1.0)
    catalog.touch({origin.address: 2, Address(b"?" * 32): 4}, at=20.0)
    catalog.touch({origin.address: 5}, at=10.0)
    assert [(row.num_hits, row.last_used_at) for row in catalog.rows()] == [(7, 20.0)]
    assert catalog.totals().saved_seconds == 7 * 0.5


def test_nothing_to_do_is_nothing_done(catalog: Catalog) -> None:
    catalog.record([], at=1.0)
    catalog.touch({}, at=1.0)
    catalog.forget([])
    catalog.pin([])
    assert catalog.totals() == Totals(0, 0, 0, 0, dict.fromkeys(Part, 0), 0, 0.0)


def test_a_row_goes_with_its_last_part(catalog: Catalog) -> None:
    origin = origin_of("text")
    catalog.record([stored(origin, Part.SCORES), stored(origin, Part.KV)], at=1.0)
    catalog.forget([(origin.address, Part.KV), (origin.address, Part.LOGITS), (Address(b"?" * 32), Part.KV)])
    assert [row.nbytes for row in catalog.rows()] == [{Part.SCORES: 100}]
    catalog.forget([(origin.address, Part.SCORES)])
    assert catalog.rows() == []


def test_segments_go_when_neither_a_representation_nor_a_child_needs_them(catalog: Catalog) -> None:
    context = origin_of("context")
    branches = [origin_of("left", context), origin_of("right", context)]
    question = origin_of("question", *branches)
    catalog.record([stored(origin) for origin in (context, *branches, question)], at=1.0)
    catalog.forget([(origin.address, Part.KV) for origin in (context, *branches)])
    assert len(catalog.children(context.segment_id)) == 2
    assert len(catalog.parents(question.segment_id)) == 2
    catalog.forget([(question.address, Part.KV)])
    assert catalog.children(context.segment_id) == catalog.parents(question.segment_id) == ()


def test_a_segment_stays_while_another_model_has_a_representation_of_it(catalog: Catalog) -> None:
    context = origin_of("context")
    here, there = origin_of("text", context), origin_of("text", context, weights_id=OTHER_WEIGHTS)
    catalog.record([stored(here), stored(there)], at=1.0)
    catalog.forget([(here.address, Part.KV)])
    assert catalog.parents(there.segment_id) == (context.segment_id,)
    assert texts(catalog.rows()) == ["text"]


def test_a_chain_of_thousands_is_forgotten_at_once(catalog: Catalog) -> None:
    chain = [origin_of("0")]
    for number in range(1, 2500):
        chain.append(origin_of(str(number), chain[-1]))
    catalog.record([stored(origin) for origin in chain], at=1.0)
    catalog.forget([(origin.address, Part.KV) for origin in reversed(chain)])
    assert all(catalog.children(origin.segment_id) == () for origin in chain[::500])
    assert catalog.totals().num_representations == 0


def test_parents_may_be_unknown(catalog: Catalog) -> None:
    evicted = origin_of("evicted")
    child, in_namespace = origin_of("child", evicted), origin_of("first", namespace="tenant")
    catalog.record([stored(child), stored(in_namespace)], at=1.0)
    assert catalog.parents(child.segment_id) == (evicted.segment_id,)
    assert catalog.children(evicted.segment_id) == (child.segment_id,)
    assert catalog.parents(in_namespace.segment_id) == (namespace_id("tenant"),)
    assert catalog.parents(SegmentId(b"?" * 32)) == ()


def test_a_model_is_unchecked_and_has_no_name_until_it_is_saved(catalog: Catalog) -> None:
    assert catalog.model(WEIGHTS) is None
    catalog.record([stored(origin_of("text"))], at=1.0)
    placeholder = catalog.model(WEIGHTS)
    assert placeholder is not None
    assert (placeholder.name, placeholder.verdict) == ("", "unchecked")
    assert [row.model_name for row in catalog.rows()] == [None]
    catalog.save(MODEL)
    assert catalog.model(WEIGHTS) == MODEL
    assert [row.model_name for row in catalog.rows()] == ["gpt2"]


def test_models_and_tokenizers_are_listed_by_name(catalog: Catalog) -> None:
    other = dataclasses.replace(MODEL, weights_id=OTHER_WEIGHTS, name="a", verdict="refused", reason="sliding window")
    tokenizers = [TokenizerRecord(TOKENIZER, "b", "BPE", 9), TokenizerRecord(TokenizerId(b"u" * 32), "a", "BPE", 9)]
    for model in (MODEL, other):
        catalog.save(model)
    for tokenizer in tokenizers:
        catalog.save(tokenizer)
    assert catalog.models() == [other, MODEL]
    assert catalog.tokenizers() == tokenizers[::-1]


def test_a_verdict_outside_the_four_is_refused(catalog: Catalog) -> None:
    with pytest.raises(CatalogError, match="verdict"):
        catalog.save(dataclasses.replace(MODEL, verdict="maybe"))
    assert catalog.models() == []


def test_sources_and_cuts_are_remembered_until_they_change(catalog: Catalog) -> None:
    key = b"k" * 32
    assert catalog.source(key) is None
    assert catalog.cuts(key) is None
    for weights_id, cuts in ((WEIGHTS, (1, 10, 2**40)), (OTHER_WEIGHTS, ())):
        source = Source(key=key, name="org/model", weights_id=weights_id, tokenizer_id=TOKENIZER)
        catalog.save(source)
        catalog.save(CutsRecord(key, cuts))
        assert catalog.source(key) == source
        assert catalog.cuts(key) == CutsRecord(key, cuts)


def test_rows_come_in_the_order_of_recording(catalog: Catalog) -> None:
    catalog.record([stored(origin_of("first")), stored(origin_of("second"))], at=1.0)
    catalog.record([stored(origin_of("third"))], at=2.0)
    assert texts(catalog.rows(order=Order.OLDEST)) == ["first", "second", "third"]
    assert texts(catalog.rows(limit=2)) == ["third", "second"]


def test_a_prefix_finds_addresses_and_segments(catalog: Catalog) -> None:
    origins = [origin_of(str(number)) for number in range(60)]
    catalog.record([stored(origin) for origin in origins], at=1.0)
    for origin in origins[:5]:
        assert texts(catalog.find(origin.address.hex()[:15])) == [origin.text]
        assert texts(catalog.find(origin.segment_id.hex().upper())) == [origin.text]
    digit = origins[0].address.hex()[0]
    expected = {o.text for o in origins if digit in (o.address.hex()[0], o.segment_id.hex()[0])}
    assert set(texts(catalog.find(digit))) == expected


def test_a_prefix_finds_at_most_fifty(catalog: Catalog) -> None:
    models = [WeightsId(number.to_bytes(32, "big")) for number in range(60)]
    origins = [origin_of("text", weights_id=weights_id) for weights_id in models]
    catalog.record([stored(origin) for origin in origins], at=1.0)
    assert len(catalog.find(origins[0].segment_id.hex())) == 50


@pytest.mark.parametrize("prefix", ["", "xyz", "0x12", "ab cd", "%", "' OR 1=1 --", "١٢", "a" * 65])
def test_a_prefix_that_is_not_hex_is_a_prompt_error(catalog: Catalog, prefix: str) -> None:
    with pytest.raises(PromptError, match="hex digits"):
        catalog.find(prefix)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_of_any_kind_comes_back_unchanged(catalog: Catalog, hostile: str) -> None:
    origin = origin_of(hostile, namespace=hostile)
    catalog.record([stored(origin)], at=1.0)
    catalog.label([origin.address], hostile)
    catalog.save(dataclasses.replace(MODEL, name=hostile))
    (row,) = catalog.rows()
    assert row.text == row.namespace == row.label == row.model_name == hostile


def test_what_has_grown_is_entered_again_with_its_size(catalog: Catalog) -> None:
    origin = origin_of("prompt", namespace="tenant")
    catalog.record([stored(origin, Part.SCORES, 30), stored(origin, Part.CONTINUATIONS, 100)], at=1.0)
    catalog.record([stored(origin, Part.CONTINUATIONS, 700)], at=2.0)
    assert [row.nbytes for row in catalog.rows()] == [{Part.SCORES: 30, Part.CONTINUATIONS: 700}]
    for totals in (catalog.totals(), catalog.totals(namespace="tenant"), catalog.totals_by_model()[origin.weights_id]):
        assert (totals.num_representations, totals.nbytes[Part.CONTINUATIONS]) == (1, 700)
    catalog.forget([(origin.address, Part.SCORES)])
    assert [row.nbytes for row in catalog.rows()] == [{Part.CONTINUATIONS: 700}]
    catalog.forget([(origin.address, Part.CONTINUATIONS)])
    assert (catalog.rows(), catalog.totals().nbytes[Part.CONTINUATIONS]) == ([], 0)


def test_keys_are_all_parts_and_hold_no_lock(catalog: Catalog) -> None:
    parts = [stored(origin_of(str(number)), part) for number in range(5) for part in Part]
    catalog.record(parts, at=1.0)
    seen = catalog.keys()
    first = next(seen)
    catalog.touch({first[0]: 1}, at=2.0)
    assert {first, *seen} == {(part.address, part.part) for part in parts}


def test_a_closed_catalog_says_so(catalog: Catalog) -> None:
    catalog.close()
    catalog.close()
    with pytest.raises(CatalogError, match="is closed"):
        catalog.totals()


def test_a_record_that_fails_leaves_nothing_behind(catalog: Catalog) -> None:
    with pytest.raises(CatalogError):
        catalog.record([stored(origin_of("good")), stored(origin_of("bad"), nbytes=2**70)], at=1.0)
    assert catalog.rows() == []
    assert catalog.models() == []


def test_greedy_paths_are_remembered_many_at_once_until_they_are_erased(catalog: Catalog) -> None:
    first, second = origin_of("first"), origin_of("second")
    catalog.record([stored(first), stored(second)], at=1.0)
    catalog.save(GreedyPath(first.address, (1, 2)), GreedyPath(second.address, ()))
    catalog.save(GreedyPath(first.address, (1, 2, 2**31)))
    asked = [first.address, second.address, Address(b"?" * 32)]
    assert catalog.greedy_paths(asked) == {
        first.address: GreedyPath(first.address, (1, 2, 2**31)),
        second.address: GreedyPath(second.address, ()),
    }
    catalog.erase([(first.address, stored(first).part)])
    assert set(catalog.greedy_paths(asked)) == {second.address}


@pytest.mark.parametrize("how", ["evict", "forget"])
def test_a_greedy_path_goes_with_the_last_part_of_its_prompt(catalog: Catalog, how: str) -> None:
    gone, smaller, kept = (origin_of(text) for text in ("gone", "smaller", "kept"))
    catalog.record([stored(gone), stored(smaller, Part.KV), stored(smaller, Part.SCORES), stored(kept)], at=1.0)
    catalog.save(*(GreedyPath(origin.address, (7,)) for origin in (gone, smaller, kept)))
    keys = [(gone.address, stored(gone).part), (smaller.address, Part.KV)]
    catalog.evict(keys, at=2.0) if how == "evict" else catalog.forget(keys)
    assert set(catalog.greedy_paths([gone.address, smaller.address, kept.address])) == {smaller.address, kept.address}


@pytest.mark.parametrize("damaged", ["null", "5", '"ab"', "{}", "[null]", "[-1]", "[1.5]", f"[{2**80}]", "[[1]]"])
def test_greedy_paths_that_are_no_token_ids_are_none(catalog: Catalog, tmp_path: Path, damaged: str) -> None:
    address = origin_of("first").address
    catalog.save(GreedyPath(address, (1, 2)))
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as connection, connection:
        assert connection.execute("UPDATE greedy_paths SET token_ids = ?", (damaged,)).rowcount == 1
    assert catalog.greedy_paths([address]) == {}


def test_erasing_takes_the_greedy_paths_of_what_is_gone_already_too(catalog: Catalog) -> None:
    catalog.record([stored(origin_of("here"))], at=1.0)
    gone = Address(b"g" * 32)
    catalog.save(GreedyPath(gone, (1, 2)), GreedyPath(origin_of("here").address, (3,)))
    catalog.erase([(Address(b"?" * 32), stored(origin_of("here")).part)])
    assert set(catalog.greedy_paths([gone, origin_of("here").address])) == {origin_of("here").address}
