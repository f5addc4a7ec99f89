"""How a model proves itself: its packs against plain forward passes, before anything of it is stored.

There is no list of supported models. A small random tree is computed in packs, as every prompt will be, and compared
with one plain forward pass per branch: log-probabilities, and the keys and values of every layer. The same quantities
computed with a wrong mask show how much the model reacts at all; an error that is not far below that reaction proves
nothing. What a short check cannot see is read from the configuration: windows longer than the check, rotary scalings
that change with the total length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import DynamicCache

from backprompt_db.compute.forward import MaskForm, compute_pack, evaluation
from backprompt_db.compute.kvcache import KVShape, shape_of
from backprompt_db.compute.plan import packs, positions
from backprompt_db.errors import UnsupportedModel
from backprompt_db.representation import Arrays, Part
from backprompt_db.text import Segment, Text, ancestry

_MAX_CHECKED_WINDOW = 1024
_MAX_ERROR_OF_REACTION = 0.05
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.2}
"""Largest error of a log-probability, and of keys and values in units of their standard deviation, times ten."""

_KV_WEIGHT = 0.1
_ALL = frozenset(Part)
_SEED = 20230101


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a model may be computed, and how exact that was."""

    form: MaskForm | None
    """None for a refused model."""
    max_error: float | None
    """Largest absolute error of a log-probability, or a tenth of the largest error of keys and values in units of their
    standard deviation, whichever is larger."""
    reason: str | None
    """Why packs, or the whole model, were refused."""

    @property
    def kind(self) -> str:
        """`packs`, `chains` (one segment per pass, plain chains only) or `refused`."""
        return "refused" if self.form is None else "chains" if self.form is MaskForm.CAUSAL else "packs"


@dataclass(frozen=True, slots=True)
class _Tree:
    """Segments with random tokens, and the branches that a plain forward pass can compute."""

    input_ids: dict[Segment, list[int]]
    branches: list[list[Segment]]

    @property
    def segments(self) -> list[Segment]:
        return list(self.input_ids)

    @property
    def num_tokens(self) -> dict[Segment, int]:
        return {segment: len(ids) for segment, ids in self.input_ids.items()}


def probe_shape(model: Any) -> KVShape:
    """Return the shape of the model's keys and values, from one pass over one token.

    Raises `UnsupportedModel` for a model whose state is something else.
    """
    try:
        shape = shape_of(_plain_pass(model, [0])[1])
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} does not run on a transformers cache ({_one_line(error)})",
            hint="Only decoder-only models that fill a transformers Cache can be used.",
        ) from error
    if isinstance(shape, str):
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be cached by segments: {shape}",
            hint="Only decoder-only attention models can be used.",
        )
    return shape


def examine(model: Any, shape: KVShape) -> Verdict:
    """Return how `model` may be computed: in packs, in chains, or not at all."""
    reason = _refusal(model)
    if reason:
        return Verdict(None, None, reason)
    window = attention_window(model)
    if window is not None and window > _MAX_CHECKED_WINDOW:
        return Verdict(None, None, f"it attends to a window of {window:,} tokens, longer than a check can prove")
    failures: list[str] = []
    forms = [MaskForm.BOOLEAN, MaskForm.ADDITIVE, MaskForm.CAUSAL] if window is None else [MaskForm.CAUSAL]
    for form in forms:
        tree = _chain(model, window or 0) if form is MaskForm.CAUSAL else _branching(model)
        error, failure = _attempt(model, shape, form, tree)
        if failure is None:
            return Verdict(form, error, f"packs are wrong: {failures[-1]}" if failures and form is forms[-1] else None)
        failures.append(f"{form.value} mask: {failure}")
    return Verdict(None, None, "; ".join(failures))


def attention_window(model: Any) -> int | None:
    """Return the shortest attention window of any layer, None where every layer sees the whole context."""
    config = model.config.get_text_config()
    windows = [
        getattr(layer, "sliding_window", None) or 1
        for layer in DynamicCache(config=config).layers
        if getattr(layer, "is_sliding", False)
    ]
    if "local" in str(getattr(config, "attention_layers", "")):
        windows.append(config.window_size)
    longest = max_positions(model)
    windows = [int(window) for window in windows if longest is None or window < longest]
    return min(windows, default=None)


def max_positions(model: Any) -> int | None:
    """Return how many positions the model has; None where it has no limit."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def _refusal(model: Any) -> str | None:
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    scalings = _rope_types(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    changing = sorted({"dynamic", "longrope"} & set(scalings))
    if changing:
        return f"its {changing[0]} rotary scaling changes with the total length, so a prefix is not what it was"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"its weights are on several devices ({', '.join(sorted(map(str, devices)))})"
    return None


def _rope_types(parameters: Any) -> Iterator[str]:
    if isinstance(parameters, dict):
        yield str(parameters.get("rope_type") or parameters.get("type"))
        for value in parameters.values():
            yield from _rope_types(value)


def _branching(model: Any) -> _Tree:
    root = Text("root")
    left, right = root + "left", root + "right"
    tips = [(left + "leaf").tips()[0], right.tips()[0], (root + "third").tips()[0]]
    return _tree(model, tips, {"root": 7, "left": 5, "right": 4, "leaf": 3, "third": 6})


def _chain(model: Any, window: int) -> _Tree:
    (tip,) = (Text("root") + "left" + "leaf").tips()
    return _tree(model, [tip], {"root": 7 + window // 2, "left": 5 + window // 2, "leaf": 9})


def _tree(model: Any, tips: list[Segment], lengths: dict[str, int]) -> _Tree:
    random = np.random.default_rng(_SEED)
    vocab_size = model.get_input_embeddings().num_embeddings
    segments = ancestry(tips)
    input_ids = {s: [int(i) for i in random.integers(vocab_size, size=lengths[s.string])] for s in segments}
    return _Tree(input_ids, [ancestry([tip]) for tip in tips])


def _attempt(model: Any, shape: KVShape, form: MaskForm, tree: _Tree) -> tuple[float, str | None]:
    """Return the error of one mask form on one tree, and why it does not do."""
    try:
        expected = _plain_branches(model, tree)
        in_passes = [_in_passes(model, shape, form, tree, max_segments=1)]
        if form is not MaskForm.CAUSAL:
            in_passes += [_in_passes(model, shape, form, tree, max_segments=limit) for limit in (None, 3)]
    except Exception as refusal:  # noqa: BLE001 - whatever a model says of a mask that it does not take
        return math.inf, _one_line(refusal)
    error = max(_difference(expected, actual, tree.segments) for actual in in_passes)
    reaction = _difference(expected, _plain_jumble(model, tree), tree.branches[0][-1:])
    tolerance = _TOLERANCE.get(shape.dtype, 0.0)
    if not error <= tolerance:
        return error, f"off by {error:.1e}, more than {tolerance:.0e}"
    if not error <= _MAX_ERROR_OF_REACTION * reaction:
        return error, f"off by {error:.1e}, and a wrong mask by only {reaction:.1e}"
    return error, None


_Computed = dict[Segment, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
"""Of each segment: log-probabilities after its last token [vocab_size], keys and values in standard deviations."""


def _in_passes(model: Any, shape: KVShape, form: MaskForm, tree: _Tree, *, max_segments: int | None) -> _Computed:
    """Compute the tree as prompts are computed."""
    starts = positions(tree.segments, tree.num_tokens)
    parts: dict[tuple[Segment, Part], Arrays] = {}
    for pack in packs(tree.segments, tree.num_tokens, max_segments=max_segments):
        computed, _ = compute_pack(
            model, pack, form=form, shape=shape, input_ids=tree.input_ids, starts=starts,
            context=[parts[segment, Part.KV] for segment in pack.context],
            predictions={segment: parts[segment, Part.LOGITS]["logits"] for segment in pack.predictors},
            produce=dict.fromkeys(pack.segments, _ALL),
        )  # fmt: skip
        parts.update(computed)
    return {
        segment: _measure(
            parts[segment, Part.LOGITS]["logits"].torch(),
            parts[segment, Part.KV]["keys"].torch(),
            parts[segment, Part.KV]["values"].torch(),
        )
        for segment in tree.segments
    }


def _plain_branches(model: Any, tree: _Tree) -> _Computed:
    """Compute each branch in one plain forward pass over its tokens: the oracle."""
    computed: _Computed = {}
    for branch in tree.branches:
        computed.update(_plain(model, branch, tree, lambda segment: segment not in computed))
    return computed


def _plain_jumble(model: Any, tree: _Tree) -> _Computed:
    """Compute the tree as if every segment saw all others before it, in another order: what a wrong mask gives."""
    jumbled = [*tree.segments[1:-1], tree.segments[0], tree.segments[-1]] if len(tree.branches) == 1 else tree.segments
    tail = tree.branches[0][-1]
    return _plain(model, [*(other for other in jumbled if other != tail), tail], tree, lambda segment: segment == tail)


def _plain(model: Any, chain: list[Segment], tree: _Tree, is_wanted: Callable[[Segment], bool]) -> _Computed:
    logits, cache = _plain_pass(model, [token for segment in chain for token in tree.input_ids[segment]])
    computed, begin = {}, 0
    for segment in chain:
        end = begin + len(tree.input_ids[segment])
        if is_wanted(segment):
            keys = torch.stack([layer.keys[0, :, begin:end] for layer in cache.layers])
            values = torch.stack([layer.values[0, :, begin:end] for layer in cache.layers])
            computed[segment] = _measure(logits[end - 1], keys, values)
        begin = end
    return computed


def _plain_pass(model: Any, input_ids: list[int]) -> tuple[torch.Tensor, Any]:
    """Call the model as any user would. The cache has no knowledge of windows: every token stays in it."""
    ids = torch.tensor([input_ids], device=model.device)
    with evaluation(model):
        output = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=DynamicCache(), use_cache=True
        )
    return output.logits[0], output.past_key_values


def _measure(
    logits: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    scaled = [(kv.double() / kv.double().std().clamp_min(1e-12)).flatten().cpu().numpy() for kv in (keys, values)]
    return torch.log_softmax(logits.double(), -1).cpu().numpy(), np.concatenate(scaled)


def _difference(expected: _Computed, actual: _Computed, segments: list[Segment]) -> float:
    """Return the largest error of any of `segments`; infinite for numbers that are not finite."""
    worst = 0.0
    for segment in segments:
        (logprobs, kv), (other_logprobs, other_kv) = expected[segment], actual[segment]
        errors = np.abs(logprobs - other_logprobs).max(), _KV_WEIGHT * np.abs(kv - other_kv).max()
        worst = max(worst, *(float(error) if np.isfinite(error) else math.inf for error in errors))
    return worst


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def recorded(kind: str, mask_form: str | None, *, max_error: float | None, reason: str | None) -> Verdict | None:
    """Return a verdict that was recorded, None for a model that was never checked."""
    if kind not in ("packs", "chains", "refused"):
        return None
    return Verdict(MaskForm(mask_form) if mask_form else None, max_error, reason)
