"""The prompt trees of a database: who follows whom, and what stands below whom, each once."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import Selection
from backprompt_db.errors import PromptError
from backprompt_db.operations.forest import Forest, Measure, forest
from backprompt_db.prompt.representation import Origin, Part
from tests.support.catalogs import MODEL, OTHER_WEIGHTS, new_catalog, origin_of, stored


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with new_catalog(tmp_path / "catalog.sqlite") as opened:
        yield opened


def record(catalog: Catalog, *origins: Origin, at: float = 1.0) -> None:
    for origin in origins:
        catalog.record([stored(origin)], at=at)


def drawn(found: Forest) -> dict[str, list[str]]:
    """The texts that each node directly follows."""
    return {node.text: [found.nodes[parent].text for parent in node.parents] for node in found.nodes}


def texts(found: Forest, indexes: Sequence[int]) -> list[str]:
    return [found.nodes[index].text for index in indexes]


class TestWhatFollowsWhat:
    def test_a_chain_with_branches_that_join(self, catalog: Catalog) -> None:
        context = origin_of("context")
        branches = [origin_of(f"branch {number}", context) for number in range(3)]
        record(catalog, context, *branches, origin_of("join", *branches))
        found = forest(catalog)
        assert drawn(found) == {
            "context": [],
            **{f"branch {number}": ["context"] for number in range(3)},
            "join": ["branch 0", "branch 1", "branch 2"],
        }
        assert texts(found, found.roots) == ["context"]
        assert texts(found, found.children[0]) == ["branch 0", "branch 1", "branch 2"]
        assert [texts(found, below) for below in found.children[1:]] == [["join"], [], [], []]

    def test_parents_come_first_whenever_they_were_recorded(self, catalog: Catalog) -> None:
        first = origin_of("first")
        second = origin_of("second", first)
        record(catalog, origin_of("third", second), second, first)
        assert list(drawn(forest(catalog))) == ["first", "second", "third"]

    def test_nothing_else_changes_the_order_in_which_they_were_recorded(self, catalog: Catalog) -> None:
        context, late = origin_of("context"), origin_of("late")
        early = origin_of("early", late)
        record(catalog, context, origin_of("request", context), early, origin_of("other"), late)
        assert list(drawn(forest(catalog))) == ["context", "request", "late", "early", "other"]

    def test_parents_that_were_recorded_late_keep_their_order(self, catalog: Catalog) -> None:
        branches = [origin_of(f"branch {number}") for number in range(9)]
        record(catalog, origin_of("join", *branches), *branches)
        names = [f"branch {number}" for number in range(9)]
        assert list(drawn(forest(catalog)).items())[-1] == ("join", names)

    def test_a_chain_that_was_recorded_backwards_is_a_chain(self, catalog: Catalog) -> None:
        chain = [origin_of("0")]
        for number in range(1, 2_000):
            chain.append(origin_of(str(number), chain[-1]))
        catalog.record([stored(origin) for origin in reversed(chain)], at=1.0)
        assert [node.parents for node in forest(catalog).nodes] == [(), *((number,) for number in range(1_999))]

    def test_a_catalog_that_says_that_two_follow_each_other_is_drawn_all_the_same(
        self, catalog: Catalog, tmp_path: Path
    ) -> None:
        first, second = origin_of("first"), origin_of("second")
        record(catalog, first, second, origin_of("third", second))
        with contextlib.closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as tampered, tampered:
            ids = [first.segment_id, second.segment_id]
            tampered.executemany("INSERT INTO parents (segment_id, parent_id) VALUES (?, ?)", [ids, ids[::-1]])
        found = forest(catalog)
        assert drawn(found) == {"first": [], "second": ["first"], "third": ["second"]}
        assert [node.num_absent_parents for node in found.nodes] == [1, 0, 0]

    def test_what_follows_something_that_is_gone_is_a_root_and_says_so(self, catalog: Catalog) -> None:
        gone, there = origin_of("gone"), origin_of("there")
        record(catalog, there, origin_of("orphan", gone), origin_of("half an orphan", there, gone))
        found = forest(catalog)
        assert drawn(found) == {"there": [], "orphan": [], "half an orphan": ["there"]}
        assert {node.text: node.num_absent_parents for node in found.nodes} == {
            "there": 0,
            "orphan": 1,
            "half an orphan": 1,
        }

    def test_each_model_has_its_own_tree(self, catalog: Catalog) -> None:
        for weights_id in (MODEL.weights_id, OTHER_WEIGHTS):
            context = origin_of("context", weights_id=weights_id)
            record(catalog, context, origin_of("request", context, weights_id=weights_id))
        record(catalog, origin_of("only here", origin_of("context")))
        found = forest(catalog)
        for node in found.nodes:
            assert all(found.nodes[parent].weights_id == node.weights_id for parent in node.parents)
        assert texts(found, found.roots) == ["context", "context"]

    def test_a_namespace_is_no_parent(self, catalog: Catalog) -> None:
        first = origin_of("first", namespace="tenant")
        record(catalog, first, dataclasses.replace(origin_of("second", first), namespace="tenant"))
        found = forest(catalog)
        assert drawn(found) == {"first": [], "second": ["first"]}
        assert [node.num_absent_parents for node in found.nodes] == [0, 0]

    def test_an_empty_catalog_is_an_empty_forest(self, catalog: Catalog) -> None:
        found = forest(catalog)
        assert (found.nodes, found.roots, found.children) == ((), (), ())
        assert found.sums(found.weights(Measure.RECENCY)) == []


class TestWhatIsRead:
    def test_a_node_has_all_that_the_catalog_knows(self, catalog: Catalog) -> None:
        origin = origin_of("three words here", compute_seconds=0.25)
        catalog.save(MODEL)
        catalog.record([stored(origin, Part.KV, 700), stored(origin, Part.SCORES, 30)], at=5.0)
        catalog.touch({origin.address: 4}, at=9.0)
        catalog.label([origin.address], "paper")
        [node], [row] = forest(catalog).nodes, catalog.rows()
        assert {field.name: getattr(node, field.name) for field in dataclasses.fields(row)} == dataclasses.asdict(row)
        assert (node.saved_seconds, node.used_at, node.model_name) == (1.0, 9.0, "gpt2")

    def test_a_selection_and_a_limit_restrict_it(self, catalog: Catalog) -> None:
        context = origin_of("context")
        requests = [origin_of(f"request {number}", context) for number in range(3)]
        record(catalog, context, *requests)
        catalog.label([context.address, requests[1].address], "paper")
        assert drawn(forest(catalog, selection=Selection(label="paper"))) == {"context": [], "request 1": ["context"]}
        newest = forest(catalog, limit=2)
        assert drawn(newest) == {"request 1": [], "request 2": []}
        assert [node.num_absent_parents for node in newest.nodes] == [1, 1]
        assert [forest(catalog, limit=limit).is_whole for limit in (3, 4, 5, None)] == [False, True, True, True]

    def test_a_model_that_nobody_knows_is_an_error(self, catalog: Catalog) -> None:
        with pytest.raises(PromptError, match="no model 'nobody'"):
            forest(catalog, selection=Selection(model="nobody"))


class TestSums:
    def test_a_node_counts_for_what_is_below_it_each_once(self, catalog: Catalog) -> None:
        context = origin_of("1 2 3 4 5 6 7 8")
        branches = [origin_of("1 2 3 4", context), origin_of("1 2", context)]
        record(catalog, context, *branches, origin_of("1", *branches))
        found = forest(catalog)
        assert found.sums(found.weights(Measure.TOKENS)) == [15, 5, 2, 1]

    def test_what_a_node_counts_for_by_each_measure(self, catalog: Catalog) -> None:
        origin = origin_of("a b c", compute_seconds=0.25)
        catalog.record([stored(origin, Part.KV, 700), stored(origin, Part.SCORES, 30)], at=5.0)
        catalog.touch({origin.address: 4}, at=9.0)
        found = forest(catalog, at=29.0)
        assert {measure: found.weights(measure) for measure in Measure} == {
            Measure.TOKENS: [3],
            Measure.NBYTES: [730],
            Measure.SAVED_SECONDS: [1.0],
            Measure.RECENCY: [0.5],
        }

    def test_recency_halves_with_each_median_time(self, catalog: Catalog) -> None:
        for number, at in enumerate((100.0, 90.0, 60.0, -20.0, 0.0)):
            record(catalog, origin_of(str(number)), at=at)
        found = forest(catalog, at=100.0)
        assert found.half_life_seconds == 40.0
        by_text = {node.text: weight for node, weight in zip(found.nodes, found.weights(Measure.RECENCY), strict=True)}
        assert by_text == pytest.approx({"0": 1, "1": 0.5**0.25, "2": 0.5, "3": 0.125, "4": 0.5**2.5})

    def test_a_clock_that_was_fast_makes_nothing_more_than_new(self, catalog: Catalog) -> None:
        record(catalog, origin_of("from tomorrow"), at=1e6)
        assert forest(catalog, at=10.0).weights(Measure.RECENCY) == [1.0]

    @given(nodes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 255)), max_size=9))
    def test_the_roots_sum_up_everything_and_parents_come_first(
        self, tmp_path: Path, nodes: list[tuple[int, int]]
    ) -> None:
        origins = list[Origin]()
        for number, (length, bits) in enumerate(nodes):
            parents = [each for place, each in enumerate(origins) if bits >> place & 1]
            origins.append(origin_of(f"{number} " + "word " * length, *parents))
        with new_catalog(tmp_path / "catalog.sqlite") as catalog:
            record(catalog, *reversed(origins))
            found = forest(catalog)
        assert {(node.text, parent) for node in found.nodes for parent in texts(found, node.parents)} == {
            (origin.text, parent.text)
            for origin in origins
            for parent in origins
            if parent.segment_id in origin.parents
        }
        assert all(max(node.parents, default=-1) < index for index, node in enumerate(found.nodes))
        sums = found.sums(found.weights(Measure.TOKENS))
        assert sum(sums[root] for root in found.roots) == sum(origin.num_tokens for origin in origins)
        assert all(
            sums[index] == node.num_tokens + sum(sums[child] for child in found.children[index])
            for index, node in enumerate(found.nodes)
        )
