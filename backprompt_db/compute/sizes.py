"""How many bytes a run writes, and how many it needs in memory while it lasts. No model is needed to tell."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backprompt_db.fidelity import Fidelity
from backprompt_db.representation import Part
from backprompt_db.run_plan import MemoryForecast
from backprompt_db.writer import MAX_QUEUED_NBYTES

if TYPE_CHECKING:
    from backprompt_db.compute.outline import Outline
    from backprompt_db.text import Segment

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
