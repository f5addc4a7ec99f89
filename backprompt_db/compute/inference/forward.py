"""How missing segments are computed: one call of the model for a pack, divided into the parts of its segments."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers.cache_utils import Cache

from backprompt_db.compute.inference.distinct import DistinctTokens
from backprompt_db.compute.inference.head import (
    HiddenStates,
    LogitsQuery,
    Predictions,
    WholeLogits,
    first_logprobs,
    kept_from_running,
    undone_afterwards,
)
from backprompt_db.compute.inference.kv_cache import KVBuffer, cache_argument
from backprompt_db.compute.inference.masks import Mask, MaskForm, MaskKind, attention_mask, mask_argument
from backprompt_db.compute.plan import Pack, fed_lengths, token_offsets
from backprompt_db.errors import UnsupportedModel
from backprompt_db.prompt.representation import Array, Arrays, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.system.platform import register_at_fork


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass has computed."""

    parts: dict[tuple[Segment, Part], Arrays]
    seconds: float
    num_tokens: int
    """Tokens that went through the model; 0 where all scores followed from stored logits."""
    num_whole: int
    """How many segments, from the first on, have the keys and values of all their tokens in the buffer."""
    followers: Mapping[Segment, npt.NDArray[np.float32]]
    """The log-probabilities that were asked for of tokens after segments."""


def compute_pack(
    model: Any,
    pack: Pack,
    *,
    form: MaskForm,
    head: nn.Module | None,
    input_ids: Mapping[Segment, Sequence[int]],
    starts: Mapping[Segment, int],
    context: KVBuffer,
    predictions: Mapping[Segment, Array],
    produce: Mapping[Segment, frozenset[Part]],
    followers: Mapping[Segment, Sequence[int]],
) -> PassResult:
    """Run the model once, at most, and return the parts of the pack's segments that `produce` names.

    `context` holds the keys and values of `pack.context`, in that order, and is extended by those of the new tokens;
    `head` is the module that alone makes the logits, if there is one. `predictions` are the stored logits of the
    pack's predictors. `followers` are tokens of which the log-probabilities after segments are asked for; of these
    segments keys and values must be produced.
    """
    began = time.perf_counter()
    lengths = {segment: len(input_ids[segment]) for segment in (*pack.context, *pack.segments)}
    fed = {**lengths, **fed_lengths(pack, lengths, produce)}
    tokens = DistinctTokens.of(pack, input_ids, fed)
    first = context.length
    scores = _PackScores(pack, input_ids, fed, produce, followers)
    if len(tokens):
        places = np.concatenate([starts[segment] + np.arange(fed[segment]) for segment in fed])
        with evaluation(model):
            mask = tokens.masked(attention_mask(pack, fed))
            predicted = extend(model, tokens.ids, tokens.placed(places), mask, context=context, form=form, head=head)
            scores.read(predicted, tokens.columns)
    scores.read_outside(predictions)
    parts: dict[tuple[Segment, Part], Arrays] = {}
    for begin, segment in token_offsets(pack, fed):
        columns = first + tokens.columns[begin : begin + fed[segment]]
        for part in produce[segment]:
            parts[segment, part] = context.take(columns) if part is Part.KV else scores.part(segment, part)
    ends = ((each, begin + fed[each]) for begin, each in token_offsets(pack, fed))
    is_whole = [fed[each] == lengths[each] and tokens.are_in_order(end) for each, end in ends]
    num_whole = (*is_whole, False).index(False)
    return PassResult(parts, time.perf_counter() - began, len(tokens), num_whole, scores.followers)


def extend(
    model: Any,
    input_ids: npt.NDArray[Any],
    position_ids: npt.NDArray[Any],
    mask: Mask,
    *,
    context: KVBuffer,
    form: MaskForm,
    head: nn.Module | None,
) -> Predictions:
    """Call the model on new tokens, extend the buffer by their keys and values, and return the predictions.

    Raises `UnsupportedModel` where the model left out some of the tokens.
    """
    cache = context.cache()
    predicted = forward(model, input_ids, position_ids, mask, cache=cache, form=form, head=head)
    if len(predicted) != len(input_ids) or not context.is_extended_by(cache, len(input_ids)):
        raise UnsupportedModel(
            f"{type(model).__name__} gave no logits, or no keys and values, for some of its tokens",
            hint="Run it with transformers directly; nothing of this pass was stored.",
        )
    context.length += len(input_ids)
    return predicted


class _PackScores:
    """The scores and last logits of a pack's segments, and the predictions that they are read from."""

    def __init__(
        self,
        pack: Pack,
        input_ids: Mapping[Segment, Sequence[int]],
        fed: Mapping[Segment, int],
        produce: Mapping[Segment, frozenset[Part]],
        followers: Mapping[Segment, Sequence[int]],
    ) -> None:
        self.followers: dict[Segment, npt.NDArray[np.float32]] = {}
        self._followers = followers
        self._input_ids = input_ids
        self._logprobs: dict[Segment, npt.NDArray[np.float32]] = {}
        self._outside: dict[Segment, list[Segment]] = {}
        self._ends: dict[Segment, int] = {}
        self._logits: dict[Segment, torch.Tensor] = {}
        self._rows: list[tuple[Segment, int, npt.NDArray[np.int64]]] = []
        """Each segment, the index of its first token that the pass predicts, and the rows that predict its tokens."""
        offsets = {segment: begin for begin, segment in token_offsets(pack, fed)}
        self._last = {segment: begin + fed[segment] - 1 for segment, begin in offsets.items()}
        for segment, begin in offsets.items():
            if Part.LOGITS in produce[segment]:
                self._ends[segment] = self._last[segment]
            if Part.SCORES in produce[segment]:
                self._ask(segment, begin, offsets)

    def _ask(self, segment: Segment, begin: int, offsets: Mapping[Segment, int]) -> None:
        num_tokens = len(self._input_ids[segment])
        self._logprobs[segment] = np.full(num_tokens, np.nan, dtype=np.float32)
        rows = np.arange(begin, begin + num_tokens - 1)
        parent = segment.parents[0] if len(segment.parents) == 1 else None
        if parent is not None and parent in offsets:
            rows = np.concatenate([[self._last[parent]], rows])
        elif parent is not None:
            self._outside.setdefault(parent, []).append(segment)
        self._rows.append((segment, num_tokens - len(rows), rows))

    def read(self, predicted: Predictions, columns: npt.NDArray[np.int64]) -> None:
        """Read scores and last logits from the predictions of a pass, in which each token has one of `columns`."""
        asked = [segment for segment in self._last if segment in self._followers]
        rows = [each for _, _, each in self._rows]
        rows += [np.full(len(self._followers[segment]), self._last[segment]) for segment in asked]
        targets = [np.asarray(self._input_ids[segment])[first:] for segment, first, _ in self._rows]
        targets += [np.asarray(self._followers[segment]) for segment in asked]
        none = np.empty(0, dtype=np.int64)
        ends = np.array([*self._ends.values()], np.int64)
        query = LogitsQuery(columns[np.concatenate([none, *rows])], np.concatenate([none, *targets]), columns[ends])
        logprobs, logits = predicted.read(query)
        self._logits = dict(zip(self._ends, logits, strict=True))
        parts = np.split(logprobs, np.cumsum([len(each) for each in rows])[:-1]) if rows else []
        for (segment, first, _), part in zip(self._rows, parts, strict=False):
            self._logprobs[segment][first:] = part
        self.followers = dict(zip(asked, parts[len(self._rows) :], strict=True))

    def read_outside(self, predictions: Mapping[Segment, Array]) -> None:
        """Read the log-probabilities of first tokens from stored logits of the segments before them."""
        for parent, segments in self._outside.items():
            firsts = np.array([self._input_ids[segment][0] for segment in segments])
            for segment, logprob in zip(segments, first_logprobs(predictions[parent].torch(), firsts), strict=True):
                self._logprobs[segment][0] = logprob

    def part(self, segment: Segment, part: Part) -> Arrays:
        """Return the scores or the logits of a segment as they are stored."""
        if part is Part.LOGITS:
            return {"logits": Array.from_torch(self._logits[segment].clone())}
        ids = np.asarray(self._input_ids[segment], dtype=np.int32)
        return {
            "input_ids": Array.from_numpy(ids),
            "token_logprobs": Array.from_numpy(self._logprobs[segment]),
        }


def forward(
    model: Any,
    input_ids: npt.NDArray[Any],
    position_ids: npt.NDArray[Any],
    mask: Mask,
    *,
    cache: Cache,
    form: MaskForm,
    head: nn.Module | None = None,
) -> Predictions:
    """Call the model on new tokens [N] under `mask` [N, cached + N] and return its predictions after each of them.

    `position_ids` [cached + N] are those of all tokens, cached ones first. The cache is extended by the new tokens.
    Training mode, autocast and gradient settings are restored afterwards.
    """
    tensors: dict[str, Any] = {"input_ids": _batch_of_one(input_ids, model)}
    if form.kind is MaskKind.CAUSAL:
        tensors["attention_mask"] = torch.ones((1, mask.shape[1]), dtype=torch.int64, device=model.device)
    else:
        tensors["position_ids"] = _batch_of_one(position_ids[-len(input_ids) :], model)
        tensors["attention_mask"] = mask_argument(mask, position_ids, form, dtype=model.dtype, device=model.device)
    with evaluation(model):
        if head is None:
            return WholeLogits(logits_of(model(**tensors, **cache_argument(model, cache), use_cache=True)))
        with kept_from_running(head) as hidden:
            model(**tensors, **cache_argument(model, cache), use_cache=True)
        return HiddenStates(hidden[0][0], head)


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits [N, vocab_size] of a model's output, which is a plain tuple under some configurations."""
    logits: torch.Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits[0]


_modes = threading.RLock()
"""Held during a pass: when another thread's pass over the same model ends, it restores the training mode."""


def _after_fork_in_child() -> None:
    global _modes  # noqa: PLW0603 - a thread that the child lacks may have held the lock
    _modes = threading.RLock()


register_at_fork(after_in_child=_after_fork_in_child)


@contextmanager
def evaluation(model: Any) -> Iterator[None]:
    """Run a model in evaluation mode, without gradients and autocast, and restore its modules' modes afterwards."""
    with _modes:
        training = [module for module in model.modules() if module.training]
        with undone_afterwards(lambda: _set_training(training, mode=True)):
            _set_training(training, mode=False)
            # Not inference_mode: users may backpropagate through what they compute with the cache that this fills.
            with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
                yield


def _set_training(modules: Iterable[nn.Module], *, mode: bool) -> None:
    for module in modules:
        module.training = mode


def _batch_of_one(numbers: npt.NDArray[Any], model: Any) -> torch.Tensor:
    return torch.from_numpy(numbers.astype(np.int64))[None].to(model.device)
