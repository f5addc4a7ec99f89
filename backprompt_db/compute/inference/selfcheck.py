"""The self-check of a model: its packs are compared with plain forward passes before anything is stored.

There is no list of supported models. A small random tree is computed in packs, as every prompt will be, and compared
with one plain forward pass per branch: log-probabilities, and the keys and values of every layer. The last token of a
branch reacts to a change of the tokens before it; a wrong mask would cause an error as large as that reaction. So only
an error far below the reaction proves the mask. What a short check cannot see is read from the configuration
(`limits`).

Attention windows are proven on a second model over the same tensors, whose window is a few tokens. Plain passes must
change when that window grows by one: then it is used at run time, and a window that is off by one would not pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from backprompt_db.catalog.records import ModelRecord
from backprompt_db.compute.inference.forward import compute_pack, evaluation, logits_of
from backprompt_db.compute.inference.head import head_of, is_whole_head, kept_from_running
from backprompt_db.compute.inference.kv_cache import KVShape, assemble, cache_argument, shape_of
from backprompt_db.compute.inference.limits import (
    embedding_of,
    filled_window,
    is_index_dependent,
    masked_layer_types,
    masked_window,
    max_positions,
    refusal,
    with_window,
)
from backprompt_db.compute.inference.masks import MaskForm, MaskKind
from backprompt_db.compute.plan import Pack, packs, positions
from backprompt_db.errors import UnsupportedModel
from backprompt_db.prompt.representation import OWN_PARTS, Arrays, Part
from backprompt_db.prompt.segments import Segment, ancestry
from backprompt_db.prompt.text import Text

CHECK_VERSION = 2
"""Raised when the check finds more than before: then recorded verdicts are made again."""

_MAX_ERROR_OF_REACTION = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest error in units of the reaction. Rounding stays far below; a wrong mask or position reaches about 1."""

_MIN_REACTION = 1e-4
"""The least reaction: a smaller one cannot prove anything."""

_SHORT_WINDOW = 6
"""Length of a window while it is proven: shorter than any branch, longer than the segments at their ends."""

_MAX_ERROR_OF_WINDOW = 0.3
"""Largest error in units of the change by one more token in the window; a window that is off by one reaches 1."""

_CHAINS = MaskForm(MaskKind.CAUSAL)
_KV_WEIGHT = 0.1
_ALL = frozenset(OWN_PARTS)
_SEED = 20230101

_NUM_CANARY_TOKENS = 12
_NUM_SAMPLES = 128
"""How many numbers of each kind a canary has."""

_Measured = dict[Segment, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
"""For each segment, log-probabilities after its last token [vocab_size], and keys and values in standard deviations."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a model may be computed, and how exact that was."""

    form: MaskForm | None
    """None for a refused model."""
    max_error: float | None
    """The larger of two errors: the largest absolute error of a log-probability, and a tenth of the largest error of
    keys and values in units of their standard deviation."""
    reason: str | None
    """Why packs, or the whole model, were refused."""

    @property
    def kind(self) -> str:
        """`packs`, `chains` (one segment per pass, plain chains only) or `refused`."""
        return "refused" if self.form is None else "chains" if self.form.kind is MaskKind.CAUSAL else "packs"


def examine(model: Any) -> Verdict:
    """Return how `model` may be computed: in packs, in chains, or not at all."""
    reason = refusal(model)
    if reason:
        return Verdict(None, None, reason)
    try:
        shape = probe_shape(model)
    except UnsupportedModel as unsupported:
        return Verdict(None, None, unsupported.message)
    failures: list[str] = []
    for proof, forms in _trials(model, shape):
        for form in forms:
            error, failure = proof.attempt(form)
            if failure is None:
                return Verdict(form, error, _why_no_packs(model, failures) if form == _CHAINS else None)
            failures.append(f"{form.name} mask: {failure}" if form != _CHAINS else f"plain chain: {failure}")
    return Verdict(None, None, "; ".join(failures))


def recorded(model: Any, record: ModelRecord) -> Verdict | None:
    """Return the verdict that was recorded for a model, with the model's windows; None if it was never checked."""
    if record.verdict == "refused":
        return Verdict(None, record.max_error, record.reason)
    forms = [*_forms(model, masked_window(model)), *_forms(model, None), _CHAINS]
    return next(
        (Verdict(form, record.max_error, record.reason) for form in forms if form.name == record.mask_form), None
    )


def probe_shape(model: Any) -> KVShape:
    """Return the shape of the model's keys and values, from one pass over two tokens.

    Raises `UnsupportedModel` for a model whose state is something else.
    """
    try:
        logits, cache = _plain_pass(model, [0, 0])
        shape = shape_of(cache, num_tokens=2) if len(logits) == 2 else "its logits are not one row per token"
    except Exception as error:
        raise _unsupported(f"it does not run on a cache of keys and values ({_one_line(error)})") from error
    if isinstance(shape, str):
        raise _unsupported(shape)
    return shape


def proven_head(model: Any) -> nn.Module | None:
    """Return the module that alone makes the model's logits of hidden states, None where that is not proven."""
    head = head_of(model)
    if head is None:
        return None
    tokens = np.random.default_rng(_SEED).integers(embedding_of(model).num_embeddings, size=2).tolist()
    with evaluation(model):
        with kept_from_running(head, skip=False) as kept:
            logits, _ = _plain_pass(model, tokens)
        # The embedding of a padding token is zero, and logits that are all zero prove nothing.
        return head if is_whole_head(head, kept, logits) and bool(logits.any()) else None


def canary_numbers(
    model: Any, shape: KVShape, *, form: MaskForm, head: nn.Module | None, longest: int | None
) -> dict[str, tuple[float, ...]]:
    """Return numbers of a fixed pass over a few tokens, computed as prompts are; `longest` is the number of positions.

    They are the log-probabilities of its tokens, and samples of the last logits and of the keys and values.
    """
    (segment,) = Text("canary").tips()
    random = np.random.default_rng(_SEED)
    vocab_size = embedding_of(model).num_embeddings
    ids = random.integers(vocab_size, size=min(_NUM_CANARY_TOKENS, longest or _NUM_CANARY_TOKENS))
    computed = compute_pack(
        model, Pack((segment,), ()), form=form, head=head, input_ids={segment: ids.tolist()}, starts={segment: 0},
        context=assemble(shape, (), capacity=len(ids), device=model.device), predictions={}, produce={segment: _ALL},
        followers={},
    )  # fmt: skip
    parts = {name: array.torch() for part in OWN_PARTS for name, array in computed.parts[segment, part].items()}
    logprobs = parts["token_logprobs"][1:]
    return {"logprobs": tuple(logprobs.tolist())} | {
        name: _sampled(parts[name], random) for name in ("logits", "keys", "values")
    }


def _sampled(numbers: torch.Tensor, random: np.random.Generator) -> tuple[float, ...]:
    """Return some of the numbers, at random places: equal steps might meet one dimension only."""
    places = torch.from_numpy(random.integers(numbers.numel(), size=_NUM_SAMPLES))
    return tuple(numbers.flatten()[places].double().tolist())


@dataclass(frozen=True, slots=True)
class _Tree:
    """Segments with random tokens, and the branches that plain passes compute; the first ends with a single token."""

    input_ids: dict[Segment, list[int]]
    branches: list[list[Segment]]
    vocab_size: int

    @property
    def segments(self) -> list[Segment]:
        return list(self.input_ids)

    @property
    def num_tokens(self) -> dict[Segment, int]:
        return {segment: len(ids) for segment, ids in self.input_ids.items()}


def _forms(model: Any, window: int | None) -> list[MaskForm]:
    layer_types = masked_layer_types(model) if window else ()
    kinds = (MaskKind.BOOLEAN, MaskKind.ADDITIVE)
    return [MaskForm(kind, window, types) for types in dict.fromkeys([layer_types, ()]) for kind in kinds]


def _trials(model: Any, shape: KVShape) -> Iterator[tuple[_Proof, list[MaskForm]]]:
    """Yield the forms to try with the proof that they need, the most capable forms first."""
    window = masked_window(model)
    takes_masks = not is_index_dependent(model)
    if takes_masks and window:
        yield _Proof(model, shape, _branching(model, masked=window), masked=window), _forms(model, window)
    if takes_masks and filled_window(model) is None:
        yield _Proof(model, shape, _branching(model)), _forms(model, None)
    yield _Proof(model, shape, _chain(model)), [_CHAINS]


def _why_no_packs(model: Any, failures: list[str]) -> str:
    window = filled_window(model)
    why = [f"its attention window of {window:,} tokens"] if window else []
    return f"packs are wrong: {'; '.join([*why, *failures]) or 'token counts enter it'}"


def _branching(model: Any, *, masked: int | None = None) -> _Tree:
    root = Text("root")
    left, right = root + "left", root + "right"
    tips = [(left + "leaf").tips()[0], right.tips()[0], (root + "third").tips()[0]]
    num_filled = filled_window(model, masked=masked) or 0
    lengths = {"root": 7 + num_filled, "left": 5, "leaf": 1, "right": 4, "third": 1}
    return _tree(model, tips, lengths, max_positions(model, masked=masked))


def _chain(model: Any) -> _Tree:
    (tip,) = (Text("root") + "left" + "right" + "leaf").tips()
    lengths = {"root": 7 + (filled_window(model) or 0), "left": 5, "right": 9, "leaf": 1}
    return _tree(model, [tip], lengths, max_positions(model))


def _tree(model: Any, tips: list[Segment], lengths: dict[str, int], longest: int | None) -> _Tree:
    random = np.random.default_rng(_SEED)
    embedding = embedding_of(model)
    vocab_size = embedding.num_embeddings
    segments = ancestry(tips)
    if longest is not None:  # the model may have fewer positions than the check has tokens
        lengths = {name: min(length, max(1, longest - 16)) for name, length in lengths.items()}
    input_ids = {s: [int(i) for i in random.integers(vocab_size, size=lengths[s.string])] for s in segments}
    padding = getattr(embedding, "padding_idx", None)
    if padding is not None:  # some models count positions by tokens that are not padding
        input_ids[segments[0]][-1] = int(padding)
    return _Tree(input_ids, [ancestry([tip]) for tip in tips], vocab_size)


class _Proof:
    """A tree, the results of plain passes over its branches, and how much other tokens change the end of the first.

    With a `masked` window, all of this is done with a second model whose window is short.
    """

    def __init__(self, model: Any, shape: KVShape, tree: _Tree, *, masked: int | None = None) -> None:
        self._model, self._shape, self._tree, self._masked = model, shape, tree, masked

    def attempt(self, form: MaskForm) -> tuple[float, str | None]:
        """Return the error of one mask form, and why it fails, None if it does not."""
        try:
            error, reaction, reaction_to_window = self._error(form), self._reaction, self._reaction_to_window
        except Exception as refused:  # noqa: BLE001 - any that a model raises for a mask that it does not take
            return math.inf, _one_line(refused)
        if not math.isfinite(error):
            return error, "some of its numbers are not finite"
        if not reaction >= _MIN_REACTION:
            return error, f"its output hardly depends on what precedes a token ({reaction:.1e}), which proves nothing"
        if not reaction_to_window >= _MIN_REACTION:
            return error, f"its output hardly depends on its window ({reaction_to_window:.1e}), which proves nothing"
        if not error <= _MAX_ERROR_OF_REACTION.get(self._shape.dtype, 0.0) * reaction:
            return error, f"off by {error:.1e}, where other tokens change {reaction:.1e}"
        if not error <= _MAX_ERROR_OF_WINDOW * reaction_to_window:
            return error, f"off by {error:.1e}, where one token more in the window changes {reaction_to_window:.1e}"
        return error, None

    @cached_property
    def _subject(self) -> Any:
        return self._model if self._masked is None else self._with_window(_SHORT_WINDOW)

    def _with_window(self, num_tokens: int) -> Any:
        with evaluation(self._model):  # no other thread's pass may change a module during the copy
            return with_window(self._model, masked=self._masked or 0, num_tokens=num_tokens)

    @cached_property
    def _expected(self) -> _Measured:
        return _plain_branches(self._subject, self._tree)

    @cached_property
    def _reaction(self) -> float:
        *before, last = self._tree.branches[0]
        others = {s: [(token + 1) % self._tree.vocab_size for token in self._tree.input_ids[s]] for s in before}
        changed = _plain(self._subject, self._tree.branches[0], {**self._tree.input_ids, **others})
        return _difference(self._expected, {last: changed[last]})

    @cached_property
    def _reaction_to_window(self) -> float:
        """How much one more token in the window changes; infinite without a window to prove."""
        if self._masked is None:
            return math.inf
        return _difference(self._expected, _plain_branches(self._with_window(_SHORT_WINDOW + 1), self._tree))

    def _error(self, form: MaskForm) -> float:
        expected = self._expected  # before the model runs in any other way
        model, form = self._subject, form if self._masked is None else replace(form, window=_SHORT_WINDOW)
        limits = (1,) if form == _CHAINS else (None, 2)
        in_passes = [_in_passes(model, self._shape, form, self._tree, max_segments=limit) for limit in limits]
        again = _plain(model, self._tree.branches[0], self._tree.input_ids)  # the model must not remember other calls
        return max(_difference(expected, computed) for computed in (*in_passes, again))


def _in_passes(model: Any, shape: KVShape, form: MaskForm, tree: _Tree, *, max_segments: int | None) -> _Measured:
    """Compute the tree as prompts are computed."""
    starts, head = positions(tree.segments, tree.num_tokens), proven_head(model)
    parts: dict[tuple[Segment, Part], Arrays] = {}
    for pack in packs(tree.segments, tree.num_tokens, max_segments=max_segments):
        context = [parts[segment, Part.KV] for segment in pack.context]
        num_tokens = sum(tree.num_tokens[segment] for segment in (*pack.context, *pack.segments))
        computed = compute_pack(
            model, pack, form=form, head=head, input_ids=tree.input_ids, starts=starts,
            context=assemble(shape, context, capacity=num_tokens, device=model.device),
            predictions={segment: parts[segment, Part.LOGITS]["logits"] for segment in pack.predictors},
            produce=dict.fromkeys(pack.segments, _ALL), followers={},
        )  # fmt: skip
        parts.update(computed.parts)
    return {
        segment: _measure(
            parts[segment, Part.LOGITS]["logits"].torch(),
            parts[segment, Part.KV]["keys"].torch(),
            parts[segment, Part.KV]["values"].torch(),
        )
        for segment in tree.segments
    }


def _plain_branches(model: Any, tree: _Tree) -> _Measured:
    """Compute each branch in one plain forward pass over its tokens: the oracle."""
    computed: _Measured = {}
    for branch in tree.branches:
        computed = {**_plain(model, branch, tree.input_ids), **computed}
    return computed


def _plain(model: Any, chain: list[Segment], input_ids: dict[Segment, list[int]]) -> _Measured:
    logits, cache = _plain_pass(model, [token for segment in chain for token in input_ids[segment]])
    computed, begin = {}, 0
    for segment in chain:
        end = begin + len(input_ids[segment])
        keys = torch.stack([layer.keys[0, :, begin:end] for layer in cache.layers])
        values = torch.stack([layer.values[0, :, begin:end] for layer in cache.layers])
        computed[segment] = _measure(logits[end - 1], keys, values)
        begin = end
    return computed


def _plain_pass(model: Any, input_ids: list[int]) -> tuple[torch.Tensor, Any]:
    """Call the model as any user would. The cache does not know of windows: every token stays in it."""
    ids = torch.tensor([input_ids], device=model.device)
    cache = DynamicCache()
    with evaluation(model):
        output = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), **cache_argument(model, cache), use_cache=True
        )
    return logits_of(output), cache


def _measure(
    logits: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    scaled = [(kv.double() / kv.double().std().clamp_min(1e-12)).flatten().cpu().numpy() for kv in (keys, values)]
    return torch.log_softmax(logits.double(), -1).cpu().numpy(), np.concatenate(scaled)


def _difference(expected: _Measured, actual: _Measured) -> float:
    """Return the largest error of any segment of `actual`; infinite for numbers that are not finite."""
    worst = 0.0
    for segment, (logprobs, kv) in actual.items():
        expected_logprobs, expected_kv = expected[segment]
        errors = np.abs(logprobs - expected_logprobs).max(), _KV_WEIGHT * np.abs(kv - expected_kv).max()
        worst = max(worst, *(float(error) if np.isfinite(error) else math.inf for error in errors))
    return worst


def _unsupported(reason: str) -> UnsupportedModel:
    return UnsupportedModel(reason, hint="Only decoder-only models that fill a transformers Cache can be used.")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
