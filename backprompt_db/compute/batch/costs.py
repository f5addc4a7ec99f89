"""What a run costs: the seconds of its passes, judged by recorded ones, the bytes that it stores, and its memory."""

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
from backprompt_db.compute.pace import weighted_median
from backprompt_db.database.writer import MAX_QUEUED_NBYTES
from backprompt_db.errors import CatalogError
from backprompt_db.prompt.representation import Part

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import Row
    from backprompt_db.compute.inference.spec import ModelSpec
    from backprompt_db.compute.plan import Costs
    from backprompt_db.prompt.ids import ModelIds, SegmentId, WeightsId
    from backprompt_db.prompt.segments import Segment


logger = logging.getLogger(__name__)

_NUM_ROWS = 1_000
"""How many of the newest representations are read to learn how fast the model was lately."""

_NUM_PASS_DIGITS = 12
"""Segments that one pass computed have the same seconds per token, except in the last bits."""

_SCORES_ITEMSIZE = 8
"""A token id and a log-probability."""
_CONTINUATIONS_ITEMSIZE = 12
"""The same, and the token before."""

_BFLOAT16_ITEMSIZE, _INT8_ITEMSIZE, _SCALE_ITEMSIZE = 2, 1, 4

_HEADER_NBYTES = {Part.SCORES: 576, Part.LOGITS: 512, Part.KV: 588, Part.CONTINUATIONS: 648}
"""Size of the header of a part without its text and parents."""
_PARENT_NBYTES = 71

_PAGE_NBYTES = 4096
_INLINE_NBYTES = 2000
"""Records up to this size share pages, which random keys fill to about two thirds; others have pages of their own."""
_SHARE_FILLED = 2 / 3

_MASK_NBYTES = 10
"""Bytes of a mask for each new token and token that it may see: while it is made, and as the model takes it."""
_NUM_HIDDEN, _NUM_MLP = 8, 3
"""Vectors of each token that exist at once: of the size of a hidden state, and of the size inside an MLP."""


class RecordedPass(NamedTuple):
    """A pass that was recorded; segments that were removed since do not count."""

    num_new: int
    num_context: int
    """Tokens of its context."""
    seconds: float


def pass_units(costs: Costs, num_new: int, num_context: int) -> float:
    """Return what a pass over `num_new` tokens after `num_context` others costs, in units of one token alone."""
    return costs.tokens_per_pass + num_new + num_new * (num_new + num_context) / costs.pairs_per_token


def seconds_per_unit(catalogs: Iterable[Catalog], ids: ModelIds, costs: Costs) -> float | None:
    """Return the seconds that a unit of `pass_units` took lately, by the first catalog that knows them, or None."""
    for catalog in catalogs:
        try:
            passes = recorded_passes(catalog, ids)
        except CatalogError as error:
            logger.warning("the catalog cannot be read: %s", error)
            continue
        if passes:
            return weighted_median(
                [(each.seconds, pass_units(costs, each.num_new, each.num_context)) for each in passes]
            )
    return None


def recorded_passes(catalog: Catalog, ids: ModelIds) -> list[RecordedPass]:
    """Return the passes that computed the newest representations of a model."""
    if catalog.model(ids.weights_id) is None:
        return []
    newest = catalog.rows(limit=_NUM_ROWS, selection=Selection(model=ids.weights_id.hex()))
    rows = [row for row in newest if row.tokenizer_id == ids.tokenizer_id and row.compute_seconds > 0]
    graph = _Graph(catalog, ids.weights_id, rows)
    return [
        RecordedPass(graph.num_tokens_of(segments), graph.num_tokens_of(graph.above(segments)), seconds)
        for segments, seconds in _passes(rows)
    ]


def _passes(rows: Iterable[Row]) -> Iterator[tuple[set[SegmentId], float]]:
    """Yield the segments that one pass has computed, and its seconds."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.compute_seconds / row.num_tokens:.{_NUM_PASS_DIGITS}e}", []).append(row)
    for group in groups.values():
        yield {row.segment_id for row in group}, sum(row.compute_seconds for row in group)


class _Graph:
    """The ancestors of the segments of some rows, and how many tokens they have."""

    def __init__(self, catalog: Catalog, weights_id: WeightsId, rows: Sequence[Row]) -> None:
        ids = {row.segment_id for row in rows}
        ancestors = catalog.ancestors(ids)
        known = itertools.chain(catalog.of_segments(ancestors), rows)
        self._num_tokens = {row.segment_id: row.num_tokens for row in known if row.weights_id == weights_id}
        self._parents: Mapping[SegmentId, list[SegmentId]] = {each: [] for each in ids | ancestors}
        for child, parent in catalog.edges(ids | ancestors):
            self._parents[child].append(parent)

    def num_tokens_of(self, ids: Iterable[SegmentId]) -> int:
        """Return how many tokens these segments have together."""
        return sum(self._num_tokens.get(each, 0) for each in ids)

    def above(self, ids: set[SegmentId]) -> set[SegmentId]:
        """Return the ancestors of these segments, without the segments themselves."""
        found, front = set(ids), list(ids)
        while front:
            new = {parent for parent in self._parents.get(front.pop(), ()) if parent not in found}
            found |= new
            front += new
        return found - ids


class Sizes:
    """Sizes in bytes of the parts of one model in a database of one fidelity."""

    def __init__(self, spec: ModelSpec, fidelity: Fidelity) -> None:
        shape = spec.shape
        self._logits_nbytes = spec.num_logits * shape.dtype.itemsize
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
        """Return the size of the arrays of one part, which has `num_tokens` tokens."""
        match part:
            case Part.SCORES:
                return num_tokens * _SCORES_ITEMSIZE
            case Part.LOGITS:
                return self._logits_nbytes
            case Part.KV:
                return num_tokens * self._kv_nbytes
            case Part.CONTINUATIONS:
                return num_tokens * _CONTINUATIONS_ITEMSIZE


def header_size(part: Part, segment: Segment) -> int:
    """Return about how long the header of a part is: it names everything that the part was computed from."""
    text = json.dumps(json.dumps(segment.string, ensure_ascii=False), ensure_ascii=False)
    return _HEADER_NBYTES[part] + len(text.encode()) + _PARENT_NBYTES * len(segment.parent_ids)


def pages_size(nbytes: int) -> int:
    """Return about how many bytes of pages a part takes up in a store."""
    if nbytes <= _INLINE_NBYTES:
        return int(nbytes / _SHARE_FILLED)
    return math.ceil(nbytes / _PAGE_NBYTES) * _PAGE_NBYTES


@dataclass(slots=True)
class Peak:
    """The largest passes of a run, in tokens."""

    num_new: int = 0
    num_all: int = 0
    """`num_new` new tokens and `num_all` tokens in total: the pass with the most pairs of the two."""
    num_columns: int = 0
    """All tokens of the longest pass."""
    num_passed_on: int = 0
    """Tokens whose keys and values one pass of a batch hands on to another."""

    def add(self, num_new: int, num_context: int) -> None:
        """Take one more pass into account."""
        num_all = num_new + num_context
        self.num_columns = max(self.num_columns, num_all)
        if num_new * num_all > self.num_new * self.num_all:
            self.num_new, self.num_all = num_new, num_all


def memory_forecast(
    spec: ModelSpec, peak: Peak, *, num_missing_tokens: int, written_nbytes: int, budget_nbytes: int
) -> MemoryForecast:
    """Estimate the peak of a run; `budget_nbytes` is what buffers may take between passes."""
    from backprompt_db.compute.inference.head import VOCABULARY_BLOCK  # late: a plan of full hits loads no torch

    itemsize, kv_nbytes = spec.shape.dtype.itemsize, spec.shape.nbytes_per_token
    vectors = _NUM_HIDDEN * spec.hidden_size + _NUM_MLP * spec.mlp_size + 2 * VOCABULARY_BLOCK
    pairs = _MASK_NBYTES + (2 * itemsize * spec.num_heads if spec.is_eager else 0)
    activations = peak.num_new * vectors * itemsize + peak.num_new * peak.num_all * pairs
    kept = min(budget_nbytes, num_missing_tokens * kv_nbytes)
    prefixes = (peak.num_columns + peak.num_passed_on) * kv_nbytes + kept
    queue = min(MAX_QUEUED_NBYTES, written_nbytes)
    return MemoryForecast(
        weights_nbytes=spec.weights_nbytes,
        prefixes_nbytes=prefixes,
        activations_nbytes=activations,
        queue_nbytes=queue,
        total_nbytes=spec.weights_nbytes + prefixes + activations + queue,
    )
