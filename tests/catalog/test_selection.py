"""Which representations a selection means, and which segments follow which."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import Selection
from backprompt_db.errors import InvalidText, PromptError
from backprompt_db.prompt.ids import SegmentId
from backprompt_db.prompt.representation import Origin, Part
from tests.support.catalogs import HOSTILE, MODEL, OTHER_WEIGHTS, WEIGHTS, new_catalog, origin_of, stored, texts


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with new_catalog(tmp_path / "catalog.sqlite") as opened:
        yield opened


def selected(catalog: Catalog, selection: Selection) -> list[str]:
    """The selected texts; they are the same ones wherever a selection is taken."""
    found = sorted(texts(catalog.select(selection)))
    assert sorted(texts(catalog.rows(selection=selection))) == found
    addresses = {row.address for row in catalog.select(selection)}
    candidates = catalog.eviction_order(2**62, at=1e9, grace_seconds=0.0, selection=selection)
    assert {candidate.address for candidate in candidates} == addresses
    return found


def record(catalog: Catalog, *origins: Origin, at: float = 1.0) -> None:
    """Enter scores alone, each of which may go whatever follows."""
    catalog.record([stored(origin, Part.SCORES) for origin in origins], at=at)


class TestTextPrefixes:
    def test_the_segment_where_the_prefix_ends_and_all_that_follow(self, catalog: Catalog) -> None:
        context = origin_of("abc")
        branches = [origin_of("def", context), origin_of("xyz", context)]
        record(catalog, context, *branches, origin_of("question", *branches), origin_of("answer", branches[1]))
        assert selected(catalog, Selection(text_prefix="ab")) == ["abc", "answer", "def", "question", "xyz"]
        assert selected(catalog, Selection(text_prefix="abc")) == ["abc", "answer", "def", "question", "xyz"]
        assert selected(catalog, Selection(text_prefix="abcd")) == ["def", "question"]
        assert selected(catalog, Selection(text_prefix="abcxyza")) == ["answer"]
        assert selected(catalog, Selection(text_prefix="def")) == []
        assert selected(catalog, Selection(text_prefix="abcdefquestion?")) == []

    def test_an_empty_prefix_begins_everything(self, catalog: Catalog) -> None:
        record(catalog, origin_of("a"), origin_of("orphan", origin_of("unknown")))
        assert selected(catalog, Selection(text_prefix="")) == ["a", "orphan"]

    def test_what_follows_an_unknown_text_begins_with_nothing(self, catalog: Catalog) -> None:
        record(catalog, origin_of("orphan", origin_of("unknown")))
        assert selected(catalog, Selection(text_prefix="orphan")) == []
        assert selected(catalog, Selection(text_prefix="unknown")) == []

    def test_a_namespace_is_no_text(self, catalog: Catalog) -> None:
        for namespace in ("", "tenant", "a"):
            first = origin_of("a", namespace=namespace)
            child = dataclasses.replace(origin_of(f"b {namespace}", first), namespace=namespace)
            record(catalog, first, child)
        assert selected(catalog, Selection(text_prefix="ab")) == ["b ", "b a", "b tenant"]
        assert selected(catalog, Selection(text_prefix="ab", namespace="tenant")) == ["b tenant"]
        assert selected(catalog, Selection(text_prefix="ab", namespace="")) == ["b "]
        assert selected(catalog, Selection(text_prefix="ab", namespace="nobody")) == []

    @pytest.mark.parametrize("hostile", HOSTILE)
    def test_it_is_a_text_and_no_pattern(self, catalog: Catalog, hostile: str) -> None:
        first = origin_of(hostile[:1])
        rest = origin_of(f"{hostile[1:]} and more", first)
        record(catalog, first, rest, origin_of("anything else"), origin_of(f"x{hostile}"))
        assert selected(catalog, Selection(text_prefix=hostile)) == [rest.text]

    def test_case_and_accents_count(self, catalog: Catalog) -> None:
        record(catalog, origin_of("Straße"), origin_of("e\u0301"))
        assert selected(catalog, Selection(text_prefix="straße")) == []
        assert selected(catalog, Selection(text_prefix="\u00e9")) == []
        assert selected(catalog, Selection(text_prefix="Straß")) == ["Straße"]

    def test_a_prefix_through_thousands_of_segments(self, catalog: Catalog) -> None:
        chain = [origin_of("0")]
        for number in range(1, 1500):
            chain.append(origin_of(str(number % 10), chain[-1]))
        record(catalog, *chain)
        prefix = "".join(origin.text for origin in chain[:1200])
        assert len(selected(catalog, Selection(text_prefix=prefix))) == 301

    @given(
        nodes=st.lists(st.tuples(st.text("ab%", min_size=1, max_size=3), st.integers(0, 63)), max_size=7),
        prefix=st.text("ab%", min_size=1, max_size=7),
    )
    def test_it_means_the_paths_that_it_begins(self, tmp_path: Path, nodes: list[tuple[str, int]], prefix: str) -> None:
        origins = graph_of(nodes)
        with new_catalog(tmp_path / "catalog.sqlite") as catalog:
            record(catalog, *origins)
            found = {row.segment_id for row in catalog.select(Selection(text_prefix=prefix))}
        known = {origin.segment_id: origin for origin in origins}
        assert found == {id_ for id_ in known if any(path.startswith(prefix) for path in joined(id_, known))}


def graph_of(nodes: Sequence[tuple[str, int]]) -> list[Origin]:
    """Segments whose parents are those of the ones before that have a bit in the number."""
    origins = list[Origin]()
    for text, bits in nodes:
        parents = {origin.segment_id: origin for number, origin in enumerate(origins) if bits >> number & 1}
        origins.append(origin_of(text, *parents.values()))
    return origins


def joined(segment_id: SegmentId, known: dict[SegmentId, Origin]) -> list[str]:
    """The texts of all paths from a first segment to this one."""
    origin = known[segment_id]
    before = [text for parent in origin.parents for text in joined(parent, known)] if origin.parents else [""]
    return [text + origin.text for text in before]


class TestContents:
    def test_the_segments_whose_own_text_contains_it(self, catalog: Catalog) -> None:
        context = origin_of("a customer")
        record(catalog, context, origin_of("omer, customers", context), origin_of("custom", context))
        assert selected(catalog, Selection(text_contains="customer")) == ["a customer", "omer, customers"]
        assert selected(catalog, Selection(text_contains="omer")) == ["a customer", "omer, customers"]
        assert selected(catalog, Selection(text_contains="customeromer")) == []

    @pytest.mark.parametrize("hostile", HOSTILE)
    def test_it_is_a_text_and_no_pattern(self, catalog: Catalog, hostile: str) -> None:
        inside = [hostile, f"before {hostile}", f"{hostile} after", f"\0{hostile}\0"]
        record(catalog, *map(origin_of, inside), origin_of("anything else"), origin_of(hostile[:-1]))
        assert selected(catalog, Selection(text_contains=hostile)) == sorted(inside)

    def test_case_and_accents_count(self, catalog: Catalog) -> None:
        record(catalog, origin_of("die Straße"), origin_of("e\u0301"))
        assert selected(catalog, Selection(text_contains="straße")) == []
        assert selected(catalog, Selection(text_contains="\u00e9")) == []
        assert selected(catalog, Selection(text_contains="Straß")) == ["die Straße"]

    def test_every_text_contains_the_empty_one(self, catalog: Catalog) -> None:
        record(catalog, origin_of("a"), origin_of("orphan", origin_of("unknown")))
        assert selected(catalog, Selection(text_contains="")) == ["a", "orphan"]

    def test_it_need_not_lie_in_the_prefix(self, catalog: Catalog) -> None:
        context = origin_of("context")
        record(catalog, context, origin_of("text", context), origin_of("else", context), origin_of("text"))
        assert selected(catalog, Selection(text_prefix="context", text_contains="text")) == ["context", "text"]


class TestOtherCriteria:
    @pytest.mark.parametrize("hostile", HOSTILE)
    def test_labels_names_and_namespaces_are_compared_as_they_are(self, catalog: Catalog, hostile: str) -> None:
        record(catalog, origin_of("inside", namespace=hostile), origin_of("outside", weights_id=OTHER_WEIGHTS))
        catalog.save(dataclasses.replace(MODEL, name=hostile))
        [inside] = catalog.rows(selection=Selection(namespace=hostile))
        catalog.label([inside.address], hostile)
        for selection in (Selection(label=hostile), Selection(model=hostile), Selection(namespace=hostile)):
            assert selected(catalog, selection) == ["inside"]
        assert selected(catalog, Selection(label=hostile[:1])) == []
        assert selected(catalog, Selection(namespace=hostile.upper() + "x")) == []

    def test_a_model_by_its_name_or_the_beginning_of_its_id(self, catalog: Catalog) -> None:
        record(catalog, origin_of("here"), origin_of("there", weights_id=OTHER_WEIGHTS))
        catalog.save(MODEL)
        for model in ("gpt2", WEIGHTS.hex(), WEIGHTS.hex()[:8], WEIGHTS.hex()[:9].upper()):
            assert selected(catalog, Selection(model=model)) == ["here"]

    @pytest.mark.parametrize("model", ["gpt3", "gpt%", WEIGHTS.hex()[:7], "0" * 8, WEIGHTS.hex() + "00"])
    def test_a_model_that_is_unknown_is_a_prompt_error(self, catalog: Catalog, model: str) -> None:
        record(catalog, origin_of("here"))
        catalog.save(MODEL)
        with pytest.raises(PromptError, match="knows no model"):
            catalog.select(Selection(model=model))

    def test_the_default_namespace_is_one_of_many(self, catalog: Catalog) -> None:
        record(catalog, origin_of("default"), origin_of("tenant", namespace="tenant"))
        assert selected(catalog, Selection(namespace="")) == ["default"]
        assert selected(catalog, Selection()) == ["default", "tenant"]

    def test_last_use_is_the_creation_of_what_was_never_used(self, catalog: Catalog) -> None:
        old, used, new = origin_of("old"), origin_of("used"), origin_of("new")
        record(catalog, old, used, at=10.0)
        record(catalog, new, at=30.0)
        catalog.touch({used.address: 1}, at=20.0)
        assert selected(catalog, Selection(used_before=20.0)) == ["old"]
        assert selected(catalog, Selection(used_before=20.5)) == ["old", "used"]
        assert selected(catalog, Selection(used_after=10.0)) == ["new", "used"]
        assert selected(catalog, Selection(used_after=10.0, used_before=30.0)) == ["used"]

    def test_an_address_by_its_beginning(self, catalog: Catalog) -> None:
        origins = [origin_of(str(number)) for number in range(40)]
        record(catalog, *origins)
        for digits in (1, 2, 64):
            prefix = origins[0].address.hex()[:digits]
            expected = sorted(origin.text for origin in origins if origin.address.hex().startswith(prefix))
            assert selected(catalog, Selection(address_prefix=prefix.upper())) == expected

    @pytest.mark.parametrize("prefix", ["", "xyz", "0x12", "%", "' OR 1=1 --", "a" * 65])
    def test_an_address_that_is_not_hex_is_a_prompt_error(self, catalog: Catalog, prefix: str) -> None:
        with pytest.raises(PromptError, match="hex digits"):
            catalog.select(Selection(address_prefix=prefix))

    def test_all_criteria_must_hold(self, catalog: Catalog) -> None:
        first, second = origin_of("prompt one"), origin_of("prompt two")
        record(catalog, first, second, origin_of("prompt one", weights_id=OTHER_WEIGHTS), origin_of("else"))
        catalog.label([first.address, second.address], "kept")
        assert selected(catalog, Selection(text_prefix="prompt", label="kept")) == ["prompt one", "prompt two"]
        assert selected(catalog, Selection(text_prefix="prompt o", label="kept")) == ["prompt one"]
        assert len(selected(catalog, Selection(text_prefix="prompt o"))) == 2

    @pytest.mark.parametrize("field", ["text_prefix", "text_contains", "label", "model", "namespace"])
    def test_a_lone_surrogate_is_refused(self, catalog: Catalog, field: str) -> None:
        with pytest.raises(InvalidText):
            catalog.select(Selection(**{field: "\udcff"}))  # type: ignore[arg-type]

    def test_nothing_given_means_everything(self) -> None:
        assert Selection().is_everything
        assert not Selection(namespace="").is_everything


def test_pages_hold_no_lock_and_miss_nothing_that_stays(catalog: Catalog) -> None:
    origins = [origin_of(f"{number}", namespace="ab"[number % 2]) for number in range(2500)]
    record(catalog, *origins)
    seen = catalog.select(Selection(namespace="a"))
    first = next(seen)
    catalog.touch({first.address: 1}, at=2.0)
    gone = max(origins, key=lambda origin: origin.address)
    catalog.forget([(gone.address, Part.SCORES)])
    addresses = [first.address, *(row.address for row in seen)]
    assert addresses == sorted(o.address for o in origins if o.namespace == "a" and o is not gone)


def test_a_readonly_catalog_selects_too(tmp_path: Path) -> None:
    with new_catalog(tmp_path / "catalog.sqlite") as catalog:
        record(catalog, origin_of("prompt"), origin_of("else"))
    with Catalog.open(tmp_path / "catalog.sqlite", readonly=True) as catalog:
        assert selected(catalog, Selection(text_prefix="prompt")) == ["prompt"]


class TestRelations:
    def test_ancestors_and_descendants_at_any_distance(self, catalog: Catalog) -> None:
        context = origin_of("context")
        branches = [origin_of("left", context), origin_of("right", context)]
        question = origin_of("question", *branches)
        record(catalog, context, *branches, question)
        ids = {origin.text: origin.segment_id for origin in (context, *branches, question)}
        assert catalog.ancestors([ids["question"]]) == {ids["context"], ids["left"], ids["right"]}
        assert catalog.ancestors([ids["question"], ids["left"]]) == {ids["context"], ids["right"]}
        assert catalog.descendants([ids["context"]]) == {ids["left"], ids["right"], ids["question"]}
        assert catalog.descendants([ids["context"], ids["left"]]) == {ids["right"], ids["question"]}
        assert catalog.ancestors([]) == catalog.descendants([SegmentId(b"?" * 32)]) == set()

    def test_only_known_segments_are_ancestors(self, catalog: Catalog) -> None:
        child, first = origin_of("child", origin_of("unknown")), origin_of("first", namespace="tenant")
        record(catalog, child, first)
        assert catalog.ancestors([child.segment_id, first.segment_id]) == set()

    def test_a_chain_of_thousands(self, catalog: Catalog) -> None:
        chain = [origin_of("0")]
        for number in range(1, 2500):
            chain.append(origin_of(str(number), chain[-1]))
        record(catalog, *random.Random(0).sample(chain, len(chain)))
        assert len(catalog.ancestors([chain[-1].segment_id])) == 2499
        assert len(catalog.descendants([chain[0].segment_id])) == 2499

    def test_representations_of_segments_under_all_models(self, catalog: Catalog) -> None:
        here, there = origin_of("text"), origin_of("text", weights_id=OTHER_WEIGHTS)
        record(catalog, here, there, origin_of("else"))
        found = list(catalog.of_segments([here.segment_id, here.segment_id, SegmentId(b"?" * 32)]))
        assert {row.address for row in found} == {here.address, there.address}
        assert len(found) == 2
