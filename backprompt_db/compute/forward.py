"""How a miss is computed: one pack, one call of the model, sliced into the parts of its segments."""

from __future__ import annotations

import enum
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache

from backprompt_db.compute.kvcache import KVBuffer, KVShape, assemble
from backprompt_db.compute.plan import Pack, attention_mask, token_offsets
from backprompt_db.errors import UnsupportedModel
from backprompt_db.representation import Array, Arrays, Part
from backprompt_db.text import Segment

_ROWS_AT_ONCE = 64
"""Rows of logits that are turned into log-probabilities at a time: [64, vocab_size] in float32 stays in the cache."""


class MaskForm(enum.Enum):
    """How a model takes the attention mask of a pack."""

    BOOLEAN = "boolean"
    """True where a token attends."""
    ADDITIVE = "additive"
    """0 where a token attends, the dtype's minimum elsewhere: added to the attention scores."""
    CAUSAL = "causal"
    """Only plain causal attention over what is in the cache: a pass holds one segment of a plain chain."""


def compute_pack(
    model: Any,
    pack: Pack,
    *,
    form: MaskForm,
    shape: KVShape,
    input_ids: Mapping[Segment, Sequence[int]],
    starts: Mapping[Segment, int],
    context: Sequence[Arrays],
    predictions: Mapping[Segment, Array],
    produce: Mapping[Segment, frozenset[Part]],
) -> tuple[dict[tuple[Segment, Part], Arrays], float]:
    """Run the model once and return the parts of the pack's segments that `produce` names, and the seconds it took.

    `context` holds the keys and values of `pack.context`, in that order; `predictions` the logits of the context
    segments that predict a first token.
    """
    began = time.perf_counter()
    num_tokens = {segment: len(input_ids[segment]) for segment in (*pack.context, *pack.segments)}
    ids = np.concatenate([np.asarray(input_ids[segment]) for segment in pack.segments])
    places = np.concatenate([starts[segment] + np.arange(num_tokens[segment]) for segment in pack.segments])
    num_context = sum(num_tokens[segment] for segment in pack.context)
    buffer = assemble(shape, context, capacity=num_context + len(ids), device=model.device)
    cache = buffer.cache()
    logits = forward(model, ids, places, attention_mask(pack, num_tokens), cache=cache, form=form)
    if len(logits) != len(ids) or not buffer.is_filled_by(cache):
        raise UnsupportedModel(
            f"{type(model).__name__} gave no logits, or no keys and values, for some of its tokens",
            hint="Run it with transformers directly; nothing of this pass was stored.",
        )
    logprobs = _token_logprobs(logits, ids, pack, num_tokens, predictions)
    parts: dict[tuple[Segment, Part], Arrays] = {}
    for begin, segment in token_offsets(pack, num_tokens):
        end = begin + num_tokens[segment]
        for part in produce[segment]:
            parts[segment, part] = _slice(part, ids, logprobs, logits, buffer, num_context, begin, end)
    return parts, time.perf_counter() - began


def forward(
    model: Any,
    input_ids: npt.NDArray[Any],
    position_ids: npt.NDArray[Any],
    mask: npt.NDArray[np.bool_],
    *,
    cache: Cache,
    form: MaskForm,
) -> torch.Tensor:
    """Call the model on new tokens [N] that see `mask` [N, cached + N]; return logits [N, vocab_size].

    The cache is extended by the new tokens. Training mode, autocast and gradient settings are left as found.
    """
    tensors = {"input_ids": torch.from_numpy(input_ids.astype(np.int64))[None].to(model.device)}
    if form is MaskForm.CAUSAL:
        tensors["attention_mask"] = torch.ones((1, mask.shape[1]), dtype=torch.int64, device=model.device)
    else:
        tensors["position_ids"] = torch.from_numpy(position_ids.astype(np.int64))[None].to(model.device)
        tensors["attention_mask"] = _mask_tensor(mask, form, model)
    with evaluation(model):
        output = model(**tensors, past_key_values=cache, use_cache=True)
    return logits_of(output)


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits [N, vocab_size] of a model's output, which a configuration may turn into a plain tuple."""
    logits: torch.Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits[0]


_modes = threading.RLock()
"""Held for a pass: another thread's pass over the same model must not end with the restoring of its training mode."""


def _after_fork_in_child() -> None:
    global _modes  # noqa: PLW0603 - a thread that does not exist here may have held it
    _modes = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


@contextmanager
def evaluation(model: Any) -> Iterator[None]:
    """Run a model in evaluation mode, without gradients and autocast, and restore its modules' modes afterwards."""
    with _modes:
        training = [module for module in model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            # Not inference_mode: users may backpropagate through what follows the cache that this fills.
            with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
                yield
        finally:
            for module in training:
                module.training = True


def _mask_tensor(mask: npt.NDArray[np.bool_], form: MaskForm, model: Any) -> torch.Tensor:
    allowed = torch.from_numpy(mask)[None, None].to(model.device)
    if form is MaskForm.BOOLEAN:
        return allowed
    added = torch.zeros(allowed.shape, dtype=model.dtype, device=model.device)
    return added.masked_fill_(~allowed, torch.finfo(model.dtype).min)


def _token_logprobs(
    logits: torch.Tensor,
    input_ids: npt.NDArray[Any],
    pack: Pack,
    num_tokens: Mapping[Segment, int],
    predictions: Mapping[Segment, Array],
) -> npt.NDArray[np.float32]:
    """Return the log-probability of each new token [N]; NaN where nothing, or more than one segment, precedes it."""
    predictor = np.arange(-1, len(input_ids) - 1)
    last_token = {segment: begin + num_tokens[segment] - 1 for begin, segment in token_offsets(pack, num_tokens)}
    outside: list[tuple[int, torch.Tensor]] = []
    for begin, segment in token_offsets(pack, num_tokens):
        parent = segment.parents[0] if len(segment.parents) == 1 else None
        predictor[begin] = -1 if parent is None else last_token.get(parent, -1)
        if parent is not None and parent in predictions:
            outside.append((begin, predictions[parent].torch().to(logits.device)))
    result = np.full(len(input_ids), np.nan, dtype=np.float32)
    inside = np.flatnonzero(predictor >= 0)
    for rows in np.array_split(inside, max(1, -(-len(inside) // _ROWS_AT_ONCE))):
        result[rows] = _logprobs_of(logits[torch.from_numpy(predictor[rows])], input_ids[rows])
    for index, row in outside:
        result[index] = _logprobs_of(row[None], input_ids[index : index + 1])[0]
    return result


def _logprobs_of(logits: torch.Tensor, targets: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the float32 log-softmax of each row of `logits` [n, vocab_size] at its target."""
    rows = logits.float()
    chosen = rows.gather(1, torch.from_numpy(targets.astype(np.int64)).to(rows.device)[:, None])[:, 0]
    result: npt.NDArray[np.float32] = (chosen - rows.logsumexp(1)).cpu().numpy()
    return result


def _slice(
    part: Part,
    input_ids: npt.NDArray[Any],
    logprobs: npt.NDArray[np.float32],
    logits: torch.Tensor,
    buffer: KVBuffer,
    num_context: int,
    begin: int,
    end: int,
) -> Arrays:
    if part is Part.SCORES:
        ids = input_ids[begin:end].astype(np.int32)
        return {"input_ids": Array.from_numpy(ids), "token_logprobs": Array.from_numpy(logprobs[begin:end].copy())}
    if part is Part.LOGITS:
        return {"logits": Array.from_torch(logits[end - 1].clone())}
    return buffer.slice(num_context + begin, num_context + end)
