"""How fast a model computes here, judged by the passes that were recorded of it. Imports no torch."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from backprompt_db.catalog.records import Selection
from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.compute.batch.run_plan import MemoryForecast
from backprompt_db.database.writer import MAX_QUEUED_NBYTES
from backprompt_db.errors import CatalogError
from backprompt_db.prompt.representation import Part

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import Row
    from backprompt_db.compute.call import Addresses
    from backprompt_db.compute.inference.outline import Outline
    from backprompt_db.compute.plan import Costs
    from backprompt_db.prompt.ids import SegmentId
    from backprompt_db.prompt.segments import Segment


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


def seconds_per_unit(catalogs: Iterable[Catalog], addresses: Addresses, costs: Costs) -> float | None:
    """Return what a unit of `pass_units` took lately, by the first catalog that knows; None where none does."""
    for catalog in catalogs:
        try:
            passes = recorded_passes(catalog, addresses)
        except CatalogError as error:
            logger.warning("the catalog cannot be read: %s", error)
            continue
        if passes:
            return _median([(each.seconds, pass_units(costs, each.num_new, each.num_context)) for each in passes])
    return None


def recorded_passes(catalog: Catalog, addresses: Addresses) -> list[RecordedPass]:
    """Return the passes that computed the newest representations of a model."""
    if catalog.model(addresses.ids.weights_id) is None:
        return []
    newest = catalog.rows(limit=_NUM_ROWS, selection=Selection(model=addresses.ids.weights_id.hex()))
    rows = [row for row in newest if row.tokenizer_id == addresses.ids.tokenizer_id and row.compute_seconds > 0]
    graph = _Graph(catalog, addresses, rows)
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

    def __init__(self, catalog: Catalog, addresses: Addresses, rows: Sequence[Row]) -> None:
        ids = {row.segment_id for row in rows}
        ancestors = catalog.ancestors(ids)
        known = itertools.chain(catalog.of_segments(ancestors), rows)
        self._num_tokens = {
            row.segment_id: row.num_tokens for row in known if row.weights_id == addresses.ids.weights_id
        }
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


_SCORES_ITEMSIZE = 8
"""A token id and a log-probability."""

_BFLOAT16_ITEMSIZE, _INT8_ITEMSIZE, _SCALE_ITEMSIZE = 2, 1, 4

_HEADER_NBYTES = {Part.SCORES: 576, Part.LOGITS: 512, Part.KV: 588}
"""What stands before the arrays of a part, beside its text and parents."""
_PARENT_NBYTES = 71

_PAGE_NBYTES = 4096
_INLINE_NBYTES = 2000
"""Records up to this size share pages, which random keys fill by about two thirds; others have pages of their own."""
_SHARE_FILLED = 2 / 3

_MASK_NBYTES = 10
"""Of a new token and a position that it may see: the mask while it is made, and as the model takes it."""
_VOCABULARY_BLOCK = 2048
_NUM_HIDDEN, _NUM_MLP = 8, 3
"""Of a token, vectors of the size of a hidden state, and of the size within an MLP, that are there at once."""


class Sizes:
    """Sizes in bytes of the parts of one model in a database of one fidelity."""

    def __init__(self, outline: Outline, fidelity: Fidelity) -> None:
        shape = outline.shape
        self._logits_nbytes = outline.num_logits * shape.dtype.itemsize
        num_vectors = 2 * shape.num_layers * shape.num_kv_heads
        num_elements = num_vectors * (shape.key_dim + shape.value_dim) // 2
        match fidelity:
            case Fidelity.EXACT:
                self._kv_nbytes = shape.nbytes_per_token
            case Fidelity.BFLOAT16:
                self._kv_nbytes = num_elements * min(_BFLOAT16_ITEMSIZE, shape.dtype.itemsize)
            case Fidelity.INT8:
                self._kv_nbytes = num_elements * _INT8_ITEMSIZE + num_vectors * _SCALE_ITEMSIZE

    def arrays(self, part: Part, num_tokens: int) -> int:
        """Return the size of the arrays of one part."""
        match part:
            case Part.SCORES:
                return num_tokens * _SCORES_ITEMSIZE
            case Part.LOGITS:
                return self._logits_nbytes
            case Part.KV:
                return num_tokens * self._kv_nbytes


def header_size(part: Part, segment: Segment) -> int:
    """Return what stands before the arrays of a part, about: it names all that it was computed from."""
    text = json.dumps(json.dumps(segment.string, ensure_ascii=False), ensure_ascii=False)
    return _HEADER_NBYTES[part] + len(text.encode()) + _PARENT_NBYTES * len(segment.parent_ids)


def pages_size(nbytes: int) -> int:
    """Return what a part takes up in a store, about."""
    if nbytes <= _INLINE_NBYTES:
        return int(nbytes / _SHARE_FILLED)
    return math.ceil(nbytes / _PAGE_NBYTES) * _PAGE_NBYTES


@dataclass(slots=True)
class Peak:
    """What was largest among the passes of a run, in tokens."""

    num_new: int = 0
    num_all: int = 0
    """The new and all tokens of the pass with the most pairs of them."""
    num_columns: int = 0
    """All tokens of the longest pass."""
    num_passed_on: int = 0
    """Tokens whose keys and values pass from one pass of a batch to another."""

    def see_pass(self, num_new: int, num_context: int) -> None:
        """Take one more pass into account."""
        num_all = num_new + num_context
        self.num_columns = max(self.num_columns, num_all)
        if num_new * num_all > self.num_new * self.num_all:
            self.num_new, self.num_all = num_new, num_all


def memory_forecast(
    outline: Outline, peak: Peak, *, num_missing_tokens: int, written_nbytes: int, budget_nbytes: int
) -> MemoryForecast:
    """Estimate the peak of a run; `budget_nbytes` is what buffers between passes may take."""
    itemsize, kv_nbytes = outline.shape.dtype.itemsize, outline.shape.nbytes_per_token
    vectors = _NUM_HIDDEN * outline.hidden_size + _NUM_MLP * outline.mlp_size + 2 * _VOCABULARY_BLOCK
    pairs = _MASK_NBYTES + (2 * itemsize * outline.num_heads if outline.is_eager else 0)
    activations = peak.num_new * vectors * itemsize + peak.num_new * peak.num_all * pairs
    kept = min(budget_nbytes, num_missing_tokens * kv_nbytes)
    prefixes = (peak.num_columns + peak.num_passed_on) * kv_nbytes + kept
    queue = min(MAX_QUEUED_NBYTES, written_nbytes)
    return MemoryForecast(
        weights_nbytes=outline.weights_nbytes,
        prefixes_nbytes=prefixes,
        activations_nbytes=activations,
        queue_nbytes=queue,
        total_nbytes=outline.weights_nbytes + prefixes + activations + queue,
    )
