"""The catalog in any order of changes, beside what it should know in plain dictionaries."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from backprompt_db.catalog.records import GroupTotals, Totals
from backprompt_db.operations import stats
from backprompt_db.prompt.ids import Address, SegmentId, WeightsId
from backprompt_db.prompt.representation import Origin, Part
from tests.support.catalogs import OTHER_WEIGHTS, evicted_at, new_catalog, origin_of, stored

ORIGINS = [origin_of("a", compute_seconds=0.25)]
ORIGINS += [origin_of("b c", ORIGINS[0], compute_seconds=2.0), origin_of("d", ORIGINS[0], weights_id=OTHER_WEIGHTS)]
ORIGINS += [origin_of("e f g", *ORIGINS[1:]), origin_of("a", weights_id=OTHER_WEIGHTS)]
ORIGINS += [origin_of("a", namespace="tenant")]
ORIGINS += [origin_of("h", ORIGINS[-1], namespace="tenant", compute_seconds=4.0)]
KEYS = st.lists(st.tuples(st.sampled_from(ORIGINS), st.sampled_from(Part)), max_size=8)
SIZES = st.dictionaries(st.tuples(st.integers(0, len(ORIGINS) - 1), st.sampled_from(Part)), st.integers(0, 2**40))
FOREVER = 2**62

_Name = TypeVar("_Name", str, WeightsId)


class AnyOrder(RuleBasedStateMachine):
    """A catalog beside what it should know."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.catalog = new_catalog(path)
        self.sizes: dict[tuple[Address, Part], int] = {}
        self.hits: dict[Address, int] = {}
        self.segments: set[SegmentId] = set()
        self.evicted: dict[Address, float] = {}

    @rule(sizes=SIZES)
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

    @rule(keys=KEYS)
    def forget(self, keys: list[tuple[Origin, Part]]) -> None:
        self.catalog.forget([(origin.address, part) for origin, part in keys])
        self._forget(keys)

    @rule(keys=KEYS, at=st.floats(1, 9))
    def evict(self, keys: list[tuple[Origin, Part]], at: float) -> None:
        self.catalog.evict([(origin.address, part) for origin, part in keys], at=at)
        self._forget(keys)
        self.evicted.update({origin.address: at for origin, _ in keys})

    @rule(keys=KEYS)
    def erase(self, keys: list[tuple[Origin, Part]]) -> None:
        self.catalog.erase([(origin.address, part) for origin, part in keys])
        self._forget(keys)
        for origin, _ in keys:
            self.evicted.pop(origin.address, None)

    @rule()
    def vacuum(self) -> None:
        self.catalog.vacuum()

    def _forget(self, keys: list[tuple[Origin, Part]]) -> None:
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

    def _present(self) -> list[Origin]:
        return [origin for origin in ORIGINS if origin.address in self.hits]

    def _nbytes(self, origins: Iterable[Origin]) -> dict[Part, int]:
        return {part: sum(self.sizes.get((origin.address, part), 0) for origin in origins) for part in Part}

    def _totals(self, present: list[Origin]) -> Totals:
        return Totals(
            num_representations=len(present),
            num_segments=len({origin.segment_id for origin in present}),
            num_models=len({origin.weights_id for origin in present}),
            num_tokens=sum(origin.num_tokens for origin in present),
            nbytes=self._nbytes(present),
            num_hits=sum(self.hits[origin.address] for origin in present),
            saved_seconds=sum(self.hits[origin.address] * origin.compute_seconds for origin in present),
        )

    def _groups(self, key: Callable[[Origin], _Name]) -> dict[_Name, GroupTotals]:
        present = sorted(self._present(), key=key)
        members = {name: list(group) for name, group in itertools.groupby(present, key=key)}
        return {name: GroupTotals(len(group), self._nbytes(group)) for name, group in members.items()}

    @invariant()
    def totals_agree(self) -> None:
        assert self.catalog.totals() == self._totals(self._present())

    @invariant()
    def parts_and_segments_agree(self) -> None:
        assert set(self.catalog.keys()) == set(self.sizes)
        for origin in ORIGINS:
            expected = origin.parents if origin.segment_id in self.segments else ()
            assert self.catalog.parents(origin.segment_id) == expected

    @invariant()
    def candidates_are_all_but_the_kv_that_others_build_on(self) -> None:
        with_kv = [origin for origin in ORIGINS if (origin.address, Part.KV) in self.sizes]
        needed = {(parent, origin.weights_id) for origin in with_kv for parent in origin.parents}
        spared = {(o.address, Part.KV) for o in with_kv if (o.segment_id, o.weights_id) in needed}
        found = self.catalog.eviction_order(FOREVER, at=9.0, grace_seconds=0.0)
        assert {(candidate.address, candidate.part) for candidate in found} == self.sizes.keys() - spared
        assert all(candidate.nbytes == self.sizes[candidate.address, candidate.part] for candidate in found)

    def teardown(self) -> None:
        """Compare at the end what would stay wrong."""
        present = self._present()
        for name in ("", "tenant", "nobody"):
            expected = self._totals([origin for origin in present if origin.namespace == name])
            assert self.catalog.totals(namespace=name) == expected
            assert asdict(stats.sums(self.path, namespace=name)) == asdict(expected)
        assert self.catalog.totals_by_model() == self._groups(lambda origin: origin.weights_id)
        assert groups(stats.sums_by_model(self.path)) == groups(self.catalog.totals_by_model())
        assert groups(stats.sums_by_namespace(self.path)) == groups(self._groups(lambda origin: origin.namespace))
        for origin in ORIGINS:
            assert evicted_at(self.catalog, origin.address) == self.evicted.get(origin.address)


def groups(found: Mapping[Any, Any]) -> dict[object, dict[str, object]]:
    return {key: asdict(value) for key, value in found.items()}


def test_in_any_order_it_agrees_with_plain_dictionaries(tmp_path: Path) -> None:
    numbers = itertools.count()

    class OnItsOwnFile(AnyOrder):
        def __init__(self) -> None:
            super().__init__(tmp_path / f"{next(numbers)}.sqlite")

    run_state_machine_as_test(OnItsOwnFile)
