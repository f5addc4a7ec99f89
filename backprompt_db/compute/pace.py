"""How fast a model computes here, judged by the passes that were recorded of it. Imports no torch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from backprompt_db.catalog import Selection
from backprompt_db.errors import CatalogError

if TYPE_CHECKING:
    from backprompt_db.catalog import Catalog, Row
    from backprompt_db.compute.names import Names
    from backprompt_db.compute.plan import Costs
    from backprompt_db.keys import SegmentId

logger = logging.getLogger(__name__)

_NUM_ROWS = 1_000
"""So many of the newest representations tell how fast it was lately."""

_NUM_PASS_DIGITS = 12
"""Segments of one pass have the same seconds for each token, but for the last bits."""


class RecordedPass(NamedTuple):
    """A pass, as far as its segments are still recorded."""

    num_new: int
    num_context: int
    """Tokens of the context that it brought in."""
    seconds: float


def pass_units(costs: Costs, num_new: int, num_context: int) -> float:
    """Return what a pass over `num_new` tokens after `num_context` others costs, in units of one token alone."""
    return costs.tokens_per_pass + num_new + num_new * (num_new + num_context) / costs.pairs_per_token


def seconds_per_unit(catalogs: Iterable[Catalog], names: Names, costs: Costs) -> float | None:
    """Return what a unit of `pass_units` took lately, by the first catalog that knows; None where none does."""
    for catalog in catalogs:
        try:
            passes = recorded_passes(catalog, names)
        except CatalogError as error:
            logger.warning("the catalog cannot be read: %s", error)
            continue
        if passes:
            return _median([(each.seconds, pass_units(costs, each.num_new, each.num_context)) for each in passes])
    return None


def recorded_passes(catalog: Catalog, names: Names) -> list[RecordedPass]:
    """Return the passes that computed the newest representations of a model."""
    if catalog.model(names.weights_id) is None:
        return []
    newest = catalog.rows(limit=_NUM_ROWS, selection=Selection(model=names.weights_id.hex()))
    rows = [row for row in newest if row.tokenizer_id == names.tokenizer_id and row.compute_seconds > 0]
    graph = _Graph(catalog, names, rows)
    return [
        RecordedPass(graph.num_tokens_of(ids), graph.num_tokens_of(graph.above(ids)), sum(_seconds(group)))
        for group in _passes(rows)
        if (ids := {row.segment_id for row in group})
    ]


def _seconds(rows: Iterable[Row]) -> Iterator[float]:
    return (row.compute_seconds for row in rows)


def _passes(rows: Iterable[Row]) -> Iterable[Sequence[Row]]:
    """Group the rows of segments that one pass has computed."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.compute_seconds / row.num_tokens:.{_NUM_PASS_DIGITS}e}", []).append(row)
    return groups.values()


class _Graph:
    """What rows follow, and how many tokens that has."""

    def __init__(self, catalog: Catalog, names: Names, rows: Sequence[Row]) -> None:
        ids = {row.segment_id for row in rows}
        ancestors = catalog.ancestors(ids)
        known = itertools.chain(catalog.of_segments(ancestors), rows)
        self._num_tokens = {row.segment_id: row.num_tokens for row in known if row.weights_id == names.weights_id}
        self._parents: Mapping[SegmentId, list[SegmentId]] = {each: [] for each in ids | ancestors}
        for child, parent in catalog.edges(ids | ancestors):
            self._parents[child].append(parent)

    def num_tokens_of(self, ids: Iterable[SegmentId]) -> int:
        """Return the tokens of all of them together."""
        return sum(self._num_tokens.get(each, 0) for each in ids)

    def above(self, ids: set[SegmentId]) -> set[SegmentId]:
        """Return all that they follow, without themselves."""
        found, front = set(ids), list(ids)
        while front:
            new = {parent for parent in self._parents.get(front.pop(), ()) if parent not in found}
            found |= new
            front += new
        return found - ids


def _median(passes: Iterable[tuple[float, float]]) -> float:
    """Return the median of seconds per unit, each unit counting as much: one slow pass, the first, says little."""
    rates = sorted((seconds / units, units) for seconds, units in passes)
    half = sum(units for _, units in rates) / 2
    reached = itertools.accumulate(units for _, units in rates)
    return next(rate for (rate, _), units in zip(rates, reached, strict=True) if units >= half)
