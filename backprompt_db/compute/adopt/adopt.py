"""Taking over keys and values that the user computed: checked, then stored as if a pass had computed them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from backprompt_db.compute import plan
from backprompt_db.compute.adopt.crosscheck import (
    Deviation,
    Recomputed,
    Tokens,
    can_sample,
    deviations,
    recomputed_in_part,
)
from backprompt_db.compute.adopt.given_cache import KVTensors, cached_tokens
from backprompt_db.compute.answers import Recomputer
from backprompt_db.compute.healing import Healed
from backprompt_db.compute.inference.head import LogitsQuery, WholeLogits
from backprompt_db.errors import ModelMismatch, PromptError, StoreReadOnly
from backprompt_db.prompt.representation import OWN_PARTS, Array, Arrays, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.prompt.text import Text

if TYPE_CHECKING:
    from backprompt_db.compute.engine import Engine
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.compute.inference.runner import ModelRunner
    from backprompt_db.compute.plan import Need

Check = Literal["sample", "full"]
"""How much is computed again: the first layer and one token in 16 (`sample`), or everything (`full`)."""

_OTHERS = (Part.SCORES, Part.LOGITS)


@dataclass(frozen=True, eq=False, kw_only=True)
class Adopted:
    """What `lm.adopt` took over.

    Attributes:
        text: the text whose keys and values were taken.
        num_tokens: how many tokens it has.
        num_stored_tokens: how many of them got keys and values; what was stored before stays as it is.
        num_checked_tokens: how many were computed again in all layers; in the first layer, all of them were.
        max_error: the largest error that was found, in root mean squares of its layer.
        fidelity: `exact`, or the fidelity of the lossy database that keeps them.
    """

    text: Text
    num_tokens: int
    num_stored_tokens: int
    num_checked_tokens: int
    max_error: float
    fidelity: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AdoptArguments:
    """The cache and logits that a user gives, and how much of them to check."""

    cache: Any
    logits: torch.Tensor | None
    """The logits after every token, [T, vocab_size] for each row of the cache; or None."""
    row: int | None
    check: Check


@dataclass(frozen=True, slots=True, eq=False)
class _CheckResult:
    """The largest error that a check found, and the parts of segments that it computed on the way."""

    max_error: float
    num_checked_tokens: int
    parts: Mapping[Segment, dict[Part, Arrays]]


def adopt(engine: Engine, source: ModelSource, healed: Healed, arguments: AdoptArguments) -> Adopted:
    """Store the keys and values that a cache holds of a text, with the logits after it; see `LanguageModel.adopt`.

    Raises `StoreReadOnly` where nothing may be stored, `PromptError` for a cache that does not fit the text, and
    `ModelMismatch` for numbers that are not what this model makes of it.
    """
    _require_possible(engine, arguments)
    ids, runner = source.ids, engine.prove()
    tokens = _tokens_of(source, runner, healed.segments)
    given = cached_tokens(arguments.cache, runner.shape, num_tokens=len(tokens), row=arguments.row)
    logits = None if arguments.logits is None else _logits_of(arguments.logits, tokens, row=arguments.row)
    began = time.perf_counter()
    result = _check(source, runner, tokens, given, logits, check=arguments.check)
    seconds = (time.perf_counter() - began) / result.num_checked_tokens
    if source.ids != ids:
        raise ModelMismatch("the model changed while the cache was checked", hint="Adopt it again; nothing was stored.")
    from_logits = {} if logits is None else _parts_of(tokens, logits)
    num_stored = 0
    for segment, kv in _divided(tokens, given):
        parts = {Part.KV: kv, **from_logits.get(segment, {}), **result.parts.get(segment, {})}
        new = {part: arrays for part, arrays in parts.items() if not engine.is_stored(segment, ids=ids, parts=[part])}
        num_tokens = tokens.num_tokens[segment]
        engine.store(segment, new, ids=ids, num_tokens=num_tokens, seconds=seconds * num_tokens)
        num_stored += num_tokens if Part.KV in new else 0
    return Adopted(
        text=healed.text,
        num_tokens=len(tokens),
        num_stored_tokens=num_stored,
        num_checked_tokens=result.num_checked_tokens,
        max_error=result.max_error,
        fidelity=engine.fidelity,
    )


def _require_possible(engine: Engine, arguments: AdoptArguments) -> None:
    if arguments.check not in ("sample", "full"):
        raise PromptError(f"check={arguments.check!r} is no check", hint='Give "sample" or "full".')
    if not engine.keeps:
        raise StoreReadOnly("this database may only be read", hint="Adopt into one that you may write to.")
    if engine.is_deterministic:
        raise PromptError(
            "with deterministic=True every stored value is one that this model computed in a pass of its own",
            hint="Run the text, or adopt with a LanguageModel that is not deterministic.",
        )


def _tokens_of(source: ModelSource, runner: ModelRunner, segments: list[Segment]) -> Tokens:
    """Tokenise segments. Raises `ContextLengthExceeded` and `ModelMismatch` where the model cannot read them."""
    input_ids = source.tokenizer.encode(segments)
    num_tokens = {segment: len(ids) for segment, ids in input_ids.items()}
    starts = plan.positions(segments, num_tokens)
    plan.check_context_length(starts, num_tokens, runner.max_positions)
    plan.check_vocabulary(input_ids.values(), runner.vocab_size)
    places = [starts[segment] + np.arange(num_tokens[segment]) for segment in segments]
    joined = np.concatenate([np.asarray(input_ids[segment], dtype=np.int64) for segment in segments])
    return Tokens(segments, num_tokens, joined, np.concatenate(places))


def _logits_of(logits: Any, tokens: Tokens, *, row: int | None) -> torch.Tensor:
    """Return the logits after each token of the text, without those of the padding before it."""
    rows: torch.Tensor = logits.detach() if isinstance(logits, torch.Tensor) else torch.empty(0)
    if rows.dim() == 3 and (row or 0) < len(rows):
        rows = rows[row or 0]
    if rows.dim() == 2 and row is not None:
        rows = rows[-len(tokens) :]
    if rows.dim() != 2 or len(rows) != len(tokens):
        raise PromptError(
            f"the logits have shape {list(getattr(logits, 'shape', ()))}, the text has {len(tokens):,} tokens",
            hint="Give the logits after every token, [T, vocab_size], as a model returns them; or none.",
        )
    if rows.isnan().any():
        raise ModelMismatch("some of the logits are not numbers", hint="Compute them again; nothing was stored.")
    return rows


def _check(
    source: ModelSource,
    runner: ModelRunner,
    tokens: Tokens,
    given: KVTensors,
    logits: torch.Tensor | None,
    *,
    check: Check,
) -> _CheckResult:
    """Compare what was given with what the model makes of the text. Raises `ModelMismatch` where they differ."""
    found: Mapping[Need, Arrays] = {}
    if check == "sample" and can_sample(runner, tokens):
        steps, num_checked = recomputed_in_part(runner, tokens, given), len(tokens.sample)
    else:
        found = Recomputer(source).compute(dict.fromkeys(tokens.segments, frozenset(OWN_PARTS)))
        steps, num_checked = _recomputed_in_full(tokens, found), len(tokens)
    parts = {segment: {part: found[segment, part] for part in _OTHERS} for segment in tokens.segments if found}
    max_error = 0.0
    for computed in steps:
        for off in deviations(computed, given, logits, dtype=runner.kv_dtype):
            if not off.is_rounding:
                raise _mismatch(source, tokens, off)
            max_error = max(max_error, off.size)
        parts = {**_last_logits(tokens, computed), **parts}
    return _CheckResult(max_error, num_checked, parts)


def _recomputed_in_full(tokens: Tokens, found: Mapping[Need, Arrays]) -> Iterator[Recomputed]:
    """Yield all tokens of each segment in all layers, and the logits after its last token."""
    for segment, end in tokens.ends.items():
        kv = KVTensors(*(found[segment, Part.KV][name].torch() for name in ("keys", "values")))
        yield Recomputed(np.arange(end + 1 - tokens.num_tokens[segment], end + 1), slice(None), kv)
        last = KVTensors(kv.keys[:, :, -1:], kv.values[:, :, -1:])
        yield Recomputed(np.array([end]), slice(None), last, found[segment, Part.LOGITS]["logits"].torch()[None])


def _last_logits(tokens: Tokens, computed: Recomputed) -> dict[Segment, dict[Part, Arrays]]:
    """Return the logits after the last segments of the text, if they were computed."""
    if computed.logits is None:
        return {}
    rows = dict(zip(computed.places.tolist(), computed.logits, strict=True))
    ends = {tip: tokens.ends[tip] for tip in tokens.tips}
    return {tip: {Part.LOGITS: _logits_part(rows[end])} for tip, end in ends.items() if end in rows}


def _parts_of(tokens: Tokens, logits: torch.Tensor) -> dict[Segment, dict[Part, Arrays]]:
    """Return the scores and logits of each segment, from the logits after every token."""
    logprobs = _token_logprobs(tokens, logits)
    parts = {}
    for segment, end in tokens.ends.items():
        own = slice(end + 1 - tokens.num_tokens[segment], end + 1)
        scores = {
            "input_ids": Array.from_numpy(tokens.input_ids[own].astype(np.int32)),
            "token_logprobs": Array.from_numpy(logprobs[own].copy()),
        }
        parts[segment] = {Part.SCORES: scores, Part.LOGITS: _logits_part(logits[end])}
    return parts


def _token_logprobs(tokens: Tokens, logits: torch.Tensor) -> npt.NDArray[np.float32]:
    """Return the log-probability of each token [T]; NaN where nothing predicts it."""
    predictors = np.arange(-1, len(tokens) - 1)
    for segment, end in tokens.ends.items():
        first = end + 1 - tokens.num_tokens[segment]
        predictors[first] = tokens.ends[segment.parents[0]] if len(segment.parents) == 1 else -1
    logprobs = np.full(len(tokens), np.nan, dtype=np.float32)
    predicted = np.flatnonzero(predictors >= 0)
    query = LogitsQuery(predictors[predicted], tokens.input_ids[predicted], predictors[:0])
    logprobs[predicted], _ = WholeLogits(logits).read(query)
    return logprobs


def _logits_part(logits: torch.Tensor) -> Arrays:
    return {"logits": Array.from_torch(logits.clone())}


def _divided(tokens: Tokens, given: KVTensors) -> Iterator[tuple[Segment, Arrays]]:
    """Yield each segment with its own keys and values."""
    for segment, end in tokens.ends.items():
        own = slice(end + 1 - tokens.num_tokens[segment], end + 1)
        yield (
            segment,
            {
                "keys": Array.from_torch(given.keys[:, :, own]),
                "values": Array.from_torch(given.values[:, :, own]),
            },
        )


def _mismatch(source: ModelSource, tokens: Tokens, off: Deviation) -> ModelMismatch:
    token = source.tokenizer.tokenizer.decode([int(tokens.input_ids[off.token])])
    return ModelMismatch(
        f"this is not what {source.name} makes of the text: at token {off.token}, {token!r}, {off.what} is off by "
        f"{off.size:.2g}, where rounding stays below {off.limit:g}",
        hint="Another text, other tokens, positions or mask, or another dtype give such a cache. Nothing was stored.",
    )
