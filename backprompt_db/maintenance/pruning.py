"""The part of a forest that fits on a page: the nodes that weigh most, and how much is hidden below each of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backprompt_db.maintenance.forest import Forest


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
    """Return the nodes to show, with their depths. None is heavier than its parent, so no node is shown without it."""
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
