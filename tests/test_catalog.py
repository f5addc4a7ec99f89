"""What the catalog knows of what the stores hold."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from backprompt_db.catalog import Catalog, CutsRecord, ModelRecord, Row, Source, StoredPart, TokenizerRecord, Totals
from backprompt_db.errors import CatalogError, PromptError
from backprompt_db.keys import Address, SegmentId, TokenizerId, WeightsId, namespace_id
from backprompt_db.representation import Origin, Part

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WEIGHTS = WeightsId(b"w" * 32)
OTHER_WEIGHTS = WeightsId(b"W" * 32)
TOKENIZER = TokenizerId(b"t" * 32)
MODEL = ModelRecord(
    weights_id=WEIGHTS,
    name="gpt2",
    architecture="GPT2LMHeadModel",
    dtype="float32",
    num_layers=12,
    num_kv_heads=12,
    head_dim=64,
    vocab_size=50257,
    max_positions=1024,
    verdict="packs",
    mask_form="4d",
    max_error=1e-6,
    reason=None,
    checked_with="torch 2.9, transformers 5.20, sdpa",
)


def origin_of(
    text: str, *parents: Origin, weights_id: WeightsId = WEIGHTS, compute_seconds: float = 0.5, namespace: str = ""
) -> Origin:
    synthetic = namespace_id(namespace)
    ids = tuple(sorted(parent.segment_id for parent in parents)) or (() if synthetic is None else (synthetic,))
    return Origin(
        text=text,
        parents=ids,
        start=None,
        weights_id=weights_id,
        tokenizer_id=TOKENIZER,
        num_tokens=len(text.split()),
        compute_seconds=compute_seconds,
        namespace=namespace,
    )


def stored(origin: Origin, part: Part = Part.KV, nbytes: int = 100) -> StoredPart:
    return StoredPart(origin.address, part, nbytes, origin)


def texts(rows: Sequence[Row]) -> list[str]:
    return [row.text for row in rows]


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("catalog") / "catalog.sqlite"
    Catalog.open(path).close()
    return path


@pytest.fixture
def path(empty: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(empty, tmp_path / "catalog.sqlite"))


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    with Catalog.open(path) as opened:
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
    for weights_id, cuts in ((WEIGHTS, (0, 10, 2**40)), (OTHER_WEIGHTS, ())):
        source = Source(key=key, name="org/model", weights_id=weights_id, tokenizer_id=TOKENIZER)
        catalog.save(source)
        catalog.save(CutsRecord(key, cuts))
        assert catalog.source(key) == source
        assert catalog.cuts(key) == cuts


def test_rows_come_in_the_order_of_recording(catalog: Catalog) -> None:
    catalog.record([stored(origin_of("first")), stored(origin_of("second"))], at=1.0)
    catalog.record([stored(origin_of("third"))], at=2.0)
    assert texts(catalog.rows(newest_first=False)) == ["first", "second", "third"]
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


@pytest.mark.parametrize("hostile", ["'; DROP TABLE segments; --", '"', "%_\\", "a\0b", ":at ?1 $x", "naïve 🦜\n\t"])
def test_text_of_any_kind_comes_back_unchanged(catalog: Catalog, hostile: str) -> None:
    origin = origin_of(hostile, namespace=hostile)
    catalog.record([stored(origin)], at=1.0)
    catalog.label([origin.address], hostile)
    catalog.save(dataclasses.replace(MODEL, name=hostile))
    (row,) = catalog.rows()
    assert row.text == row.namespace == row.label == row.model_name == hostile


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


ORIGINS = [origin_of("a", compute_seconds=0.25)]
ORIGINS += [origin_of("b c", ORIGINS[0], compute_seconds=2.0), origin_of("d", ORIGINS[0], weights_id=OTHER_WEIGHTS)]
ORIGINS += [origin_of("e f g", *ORIGINS[1:]), origin_of("a", weights_id=OTHER_WEIGHTS)]
KEYS = st.tuples(st.sampled_from(ORIGINS), st.sampled_from(Part))


class AnyOrder(RuleBasedStateMachine):
    """A catalog beside what it should know, in plain dictionaries."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.catalog = Catalog.open(path)
        self.sizes: dict[tuple[Address, Part], int] = {}
        self.hits: dict[Address, int] = {}
        self.segments: set[SegmentId] = set()

    @rule(
        sizes=st.dictionaries(st.tuples(st.integers(0, len(ORIGINS) - 1), st.sampled_from(Part)), st.integers(0, 2**40))
    )
    def record(self, sizes: dict[tuple[int, Part], int]) -> None:
        parts = [stored(ORIGINS[number], part, size) for (number, part), size in sizes.items()]
        self.catalog.record(parts, at=1.0)
        for part in parts:
            self.sizes[part.address, part.part] = part.nbytes
            self.hits.setdefault(part.address, 0)
            self.segments.add(part.origin.segment_id)

    @rule(more=st.dictionaries(st.sampled_from([origin.address for origin in ORIGINS]), st.integers(1, 9)))
    def touch(self, more: dict[Address, int]) -> None:
        self.catalog.touch(more, at=2.0)
        self.hits.update({address: hits + more.get(address, 0) for address, hits in self.hits.items()})

    @rule(keys=st.lists(KEYS, max_size=8))
    def forget(self, keys: list[tuple[Origin, Part]]) -> None:
        self.catalog.forget([(origin.address, part) for origin, part in keys])
        for origin, part in keys:
            self.sizes.pop((origin.address, part), None)
        left = {address for address, _ in self.sizes}
        self.hits = {address: hits for address, hits in self.hits.items() if address in left}
        for origin in reversed(ORIGINS):
            if not self._is_needed(origin.segment_id):
                self.segments.discard(origin.segment_id)

    def _is_needed(self, segment_id: SegmentId) -> bool:
        has_child = any(segment_id in o.parents and o.segment_id in self.segments for o in ORIGINS)
        return has_child or any(o.segment_id == segment_id and o.address in self.hits for o in ORIGINS)

    @invariant()
    def totals_agree(self) -> None:
        present = [origin for origin in ORIGINS if origin.address in self.hits]
        assert self.catalog.totals() == Totals(
            num_representations=len(present),
            num_segments=len({origin.segment_id for origin in present}),
            num_models=len({origin.weights_id for origin in present}),
            num_tokens=sum(origin.num_tokens for origin in present),
            nbytes={part: sum(size for (_, kind), size in self.sizes.items() if kind is part) for part in Part},
            num_hits=sum(self.hits.values()),
            saved_seconds=sum(self.hits[origin.address] * origin.compute_seconds for origin in present),
        )

    @invariant()
    def parts_and_segments_agree(self) -> None:
        assert set(self.catalog.keys()) == set(self.sizes)
        for origin in ORIGINS:
            expected = origin.parents if origin.segment_id in self.segments else ()
            assert self.catalog.parents(origin.segment_id) == expected


def test_in_any_order_it_agrees_with_plain_dictionaries(empty: Path, tmp_path: Path) -> None:
    numbers = itertools.count()

    class OnCopy(AnyOrder):
        def __init__(self) -> None:
            super().__init__(Path(shutil.copy(empty, tmp_path / f"{next(numbers)}.sqlite")))

    run_state_machine_as_test(OnCopy, settings=settings(max_examples=25, stateful_step_count=12, deadline=None))
