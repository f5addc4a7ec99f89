"""The prompt trees of a whole database, and the part of them that weighs most.

A `Forest` has every representation among those that it follows and that follow it. `prune` chooses what is shown of it.
"""

from __future__ import annotations

import enum
import heapq
import operator
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING

from backprompt_db.catalog.records import Row
from backprompt_db.prompt.ids import SegmentId, TokenizerId, WeightsId, namespace_id

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import Selection


class Measure(enum.Enum):
    """What a node counts for. The value is its name on command lines and pages."""

    TOKENS = "tokens"
    NBYTES = "bytes"
    """The size of all parts that are stored."""
    SAVED_SECONDS = "seconds"
    """Uses times what the computation took."""
    RECENCY = "recency"
    """1 for what is used now, and half of it with every `Forest.half_life_seconds` since it was used or made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node(Row):
    """One representation in its place among others: under another model, a segment is another node."""

    parents: tuple[int, ...]
    """Indexes of the nodes that it directly follows, ascending."""
    num_absent_parents: int
    """How many more it was computed after, which are not stored or not selected."""

    @property
    def saved_seconds(self) -> float:
        """The computation that its uses have saved."""
        return self.num_hits * self.compute_seconds

    @property
    def used_at(self) -> float:
        """When it was last used, or made if it never was."""
        return self.created_at if self.last_used_at is None else self.last_used_at


@dataclass(frozen=True, eq=False)
class Forest:
    """Nodes that follow each other. In the tree, each stands below the first of its parents and nowhere else."""

    nodes: tuple[Node, ...]
    """Parents before children; else in the order in which they were recorded."""
    at: float
    """When it was read, in POSIX seconds."""
    is_whole: bool
    """Whether a limit has left nothing out."""

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each node, the indexes of those of which it is the first parent."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes):
            if node.parents:
                found[node.parents[0]].append(index)
        return tuple(map(tuple, found))

    @cached_property
    def roots(self) -> tuple[int, ...]:
        """The indexes of the nodes without parents."""
        return tuple(index for index, node in enumerate(self.nodes) if not node.parents)

    @cached_property
    def half_life_seconds(self) -> float:
        """The median time since a node was used, at least a second."""
        return max(1.0, statistics.median([self.at - node.used_at for node in self.nodes] or [0]))

    def weights(self, measure: Measure) -> list[float]:
        """Return what each node counts for by itself."""
        match measure:
            case Measure.TOKENS:
                return [node.num_tokens for node in self.nodes]
            case Measure.NBYTES:
                return [sum(node.nbytes.values()) for node in self.nodes]
            case Measure.SAVED_SECONDS:
                return [node.saved_seconds for node in self.nodes]
            case Measure.RECENCY:
                ages = (max(0.0, self.at - node.used_at) for node in self.nodes)
                return [0.5 ** (age / self.half_life_seconds) for age in ages]

    def sums(self, weights: Sequence[float]) -> list[float]:
        """Return for each node the sum of the weights of all nodes below it in the tree, and its own.

        So those of the roots sum up all nodes, each once, however many parents it has.
        """
        totals = list(weights)
        for index in reversed(range(len(totals))):
            if parents := self.nodes[index].parents:
                totals[parents[0]] += totals[index]
        return totals


def forest(
    catalog: Catalog, *, selection: Selection | None = None, limit: int | None = None, at: float | None = None
) -> Forest:
    """Read the representations that `selection` means, at most the `limit` newest of them, and what follows what.

    It takes a few queries, however many there are: a few seconds for a hundred thousand. `at` is now unless given.
    Raises what `Catalog.select` raises.
    """
    newest = catalog.rows(selection=selection, limit=None if limit is None else limit + 1)
    rows = newest[:limit][::-1]
    before = _ids_before(catalog, rows)
    numbers = {_key(row, row.segment_id): number for number, row in enumerate(rows)}
    graph = [
        sorted(numbers[key] for each in before[row.segment_id] if (key := _key(row, each)) in numbers) for row in rows
    ]
    nodes, places = list[Node](), dict[int, int]()
    for number in _parents_first(graph):
        # A parent that has no place yet follows its own child, which only a catalog that was tampered with can say.
        parents = tuple(sorted(places[each] for each in graph[number] if each in places))
        num_absent = len(before[rows[number].segment_id]) - len(parents)
        places[number] = len(nodes)
        nodes.append(Node(*_values(rows[number]), parents=parents, num_absent_parents=num_absent))
    return Forest(tuple(nodes), time.time() if at is None else at, is_whole=len(newest) == len(rows))


def _parents_first(graph: Sequence[Sequence[int]]) -> Iterator[int]:
    """Yield the numbers of `graph` in order, but each after those that it follows, which `graph[number]` lists."""
    is_done, is_waiting = bytearray(len(graph)), bytearray(len(graph))
    for number in range(len(graph)):
        stack = [number]
        while stack:
            last = stack[-1]
            missing = [] if is_waiting[last] else [each for each in graph[last] if not is_done[each]]
            if missing:
                is_waiting[last] = True
                stack += missing[::-1]
            elif not is_done[stack.pop()]:
                is_done[last] = True
                yield last


def _key(row: Row, segment_id: SegmentId) -> tuple[SegmentId, WeightsId, TokenizerId]:
    """Return what names a representation: a segment, and the model and the tokenizer of `row`."""
    return segment_id, row.weights_id, row.tokenizer_id


def _ids_before(catalog: Catalog, rows: Sequence[Row]) -> Mapping[SegmentId, list[SegmentId]]:
    """Return the direct parents of all segments, without those that stand for a namespace."""
    found: dict[SegmentId, list[SegmentId]] = {row.segment_id: [] for row in rows}
    namespaces = {namespace_id(name) for name in {row.namespace for row in rows}}
    for segment_id, parent_id in catalog.edges(found):
        if parent_id not in namespaces:
            found[segment_id].append(parent_id)
    return found


_values = operator.attrgetter(*(field.name for field in fields(Row)))


@dataclass(frozen=True, slots=True)
class Hidden:
    """What is not shown in some place."""

    num_nodes: int
    total: float
    """Its weight."""


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One node that is shown."""

    node: int
    """Its index in the forest."""
    depth: int
    """How many branchings are above it; what follows alone after its parent is as deep as that."""
    weight: float
    """Its own weight alone."""
    total: float
    """The weight of all nodes below it in the tree, and its own."""
    children: tuple[Branch, ...] = field(repr=False)
    """Those of its children that are shown, the heaviest first."""
    hidden: Hidden
    """Its other children, and all below them."""


@dataclass(frozen=True, slots=True)
class PrunedForest:
    """Trees of the nodes that weigh most."""

    roots: tuple[Branch, ...]
    """The heaviest first."""
    hidden: Hidden
    """All trees that are not shown."""
    total: float
    """The weight of everything, shown or hidden."""

    def branches(self) -> list[Branch]:
        """Return all that is shown, each node followed by what is below it."""
        found, stack = [], list(reversed(self.roots))
        while stack:
            found.append(stack.pop())
            stack.extend(reversed(found[-1].children))
        return found


def prune(forest: Forest, weights: Sequence[float], *, limit: int, max_depth: int | None) -> PrunedForest:
    """Return at most `limit` nodes, those with the most weight below them, none of them deeper than `max_depth`."""
    totals, counts = forest.sums(weights), forest.sums([1] * len(weights))
    depths = _heaviest(forest, totals, limit=limit, max_depth=max_depth)

    def shown(nodes: Iterable[int]) -> tuple[Branch, ...]:
        present = (node for node in nodes if node in depths)
        return tuple(branches[node] for node in sorted(present, key=lambda node: (-totals[node], node)))

    def hidden(nodes: Iterable[int]) -> Hidden:
        absent = [node for node in nodes if node not in depths]
        return Hidden(round(sum(counts[node] for node in absent)), sum(totals[node] for node in absent))

    branches: dict[int, Branch] = {}
    for node in reversed(depths):  # children were found after their parents
        children = forest.children[node]
        branches[node] = Branch(node, depths[node], weights[node], totals[node], shown(children), hidden(children))
    return PrunedForest(shown(forest.roots), hidden(forest.roots), sum(totals[root] for root in forest.roots))


def _heaviest(forest: Forest, totals: Sequence[float], *, limit: int, max_depth: int | None) -> dict[int, int]:
    """Return the nodes to show, with their depths. No node is heavier than its parent, so none is shown without it."""
    depths: dict[int, int] = {}
    heap = [(-totals[root], root, 0) for root in forest.roots]
    heapq.heapify(heap)
    while heap and len(depths) < limit:
        _, node, depth = heapq.heappop(heap)
        depths[node] = depth
        children = forest.children[node]
        below = depth + (len(children) > 1)
        if max_depth is None or below <= max_depth:
            for child in children:
                heapq.heappush(heap, (-totals[child], child, below))
    return depths
