"""From texts to results: which parts of which segments a run or a score needs, and the result made of them.

`Recomputer` gives the same parts without anything that is stored, for checks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from backprompt_db.compute import plan
from backprompt_db.compute.call import Call
from backprompt_db.compute.engine import Engine
from backprompt_db.compute.healing import Ending, Healed, merged_donors
from backprompt_db.compute.inference.loading import ModelSource, PretrainedModel
from backprompt_db.compute.keeping import Keep, Keeper
from backprompt_db.compute.plan import Need, Wanted
from backprompt_db.database.database import MEMORY
from backprompt_db.database.opening import open_database
from backprompt_db.errors import ModelMismatch, PromptError
from backprompt_db.prompt.ids import ModelIds
from backprompt_db.prompt.representation import Array, Arrays, Part
from backprompt_db.prompt.segments import Segment, ancestry
from backprompt_db.prompt.text import ModelRepr

_SCORES, _LOGITS, _KV = (frozenset({part}) for part in (Part.SCORES, Part.LOGITS, Part.KV))

Parts = Mapping[Need, Arrays]
"""Parts of segments that were found or computed."""

_NEEDED_BY_OTHERS = frozenset({Part.LOGITS, Part.KV})


def run(engine: Engine, keeper: Keeper, texts: Sequence[Healed], *, keep: Keep) -> list[ModelRepr]:
    """Return the representation of each text; everything that is missing is computed together."""
    segments = [each.segments for each in texts]
    addresses = engine.addresses()
    ends = {each.tips[0]: _LOGITS for each in texts if len(each.tips) == 1}
    stored = {end: parts for end, parts in ends.items() if engine.is_stored(end, ids=addresses.ids, parts=parts)}
    call = engine.represent(
        plan.merged([dict.fromkeys(itertools.chain(*segments), _SCORES), stored]),
        keep=keeper.of_run([tip for each in texts for tip in each.tips], keep, addresses),
        welcome=ends,
        addresses=addresses,
        donors=merged_donors(texts),
    )
    return [_result(each, some, call, fidelity=engine.fidelity) for each, some in zip(texts, segments, strict=True)]


def logits(engine: Engine, result: ModelRepr) -> Array:
    """Return the logits after a result's text; those that nobody has asked for before are computed and stored.

    Raises `ModelMismatch` where the model has changed since the text was run.
    """
    tip = result.segments[-1]
    addresses = engine.addresses()
    if addresses.ids != result.ids:
        raise ModelMismatch("the model has changed since this was computed", hint="Run the text again.")
    call = engine.represent({tip: _LOGITS}, keep={tip: _LOGITS}, addresses=addresses)
    return call.found[tip, Part.LOGITS]["logits"]


def past_key_values(engine: Engine, healed: Healed) -> list[Arrays]:
    """Return the keys and values of each segment of a text; those that are not stored are computed and stored."""
    segments = healed.segments
    keep = dict.fromkeys(healed.tips, _SCORES | _KV)
    call = engine.represent(dict.fromkeys(segments, _KV), keep=keep, donors=healed.donors)
    return [call.found[segment, Part.KV] for segment in segments]


class Scored(NamedTuple):
    """A completion after a prompt."""

    logprob: float
    """Its natural log-probability, summed over its tokens."""
    num_tokens: int
    """How many tokens it adds to those of the prompt."""


def scored(engine: Engine, keeper: Keeper, endings: Sequence[Ending], *, keep: Keep) -> list[Scored]:
    """Return the log-probability of each completion.

    It is that of prompt and completion less that of the prompt, each with the tokens of its joined string. Raises
    `PromptError` where they differ in their first token, which nothing predicts.
    """
    wanted = dict.fromkeys([segment for ending in endings for segment in (*ending.segments, *ending.without)], _SCORES)
    addresses = engine.addresses()
    kept = keeper.of_endings(endings, keep, addresses)
    found = engine.represent(wanted, keep=kept, addresses=addresses, donors=merged_donors(endings)).found
    for ending in endings:
        if ending.without and not ending.segments[0].parents:
            first, alone = (found[each[0], Part.SCORES]["input_ids"].numpy()[0] for each in ending[:2])
            if first != alone:
                raise PromptError(
                    "the first token of the prompt crosses the seam, and nothing predicts it",
                    hint="Give the prompt one more word.",
                )
    return [
        Scored(
            logprob(found, ending.segments) - logprob(found, ending.without),
            num_tokens(found, ending.segments) - num_tokens(found, ending.without),
        )
        for ending in endings
    ]


def logprob(found: Parts, segments: Iterable[Segment]) -> float:
    """Return the sum of the log-probabilities of segments; a first token, which is in both sums, counts for nothing."""
    rows = ((segment, found[segment, Part.SCORES]["token_logprobs"].numpy()) for segment in segments)
    return sum(float(row[0 if segment.parents else 1 :].sum(dtype=np.float64)) for segment, row in rows)


def num_tokens(found: Parts, segments: Iterable[Segment]) -> int:
    """Return how many tokens segments have."""
    return sum(found[segment, Part.SCORES]["input_ids"].shape[0] for segment in segments)


class Recomputer:
    """A model that computes everything anew, ancestors included, in a database of its own in memory."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source

    @property
    def name(self) -> str:
        """The name that people give the model."""
        return self._source.name

    @property
    def ids(self) -> ModelIds:
        """The ids of the model and the tokenizer."""
        return self._source.ids

    @property
    def kv_dtype(self) -> str:
        """The safetensors name of the dtype of keys and values."""
        return self._source.runner.kv_dtype

    def compute(self, wanted: Wanted) -> Parts:
        """Return the wanted parts. Raises a `ComputeError` where the model cannot be used."""
        keep = dict.fromkeys(ancestry(wanted), _NEEDED_BY_OTHERS)
        with open_database(MEMORY) as db:
            return Engine(self._source, db, deterministic=False, progress=False).represent(wanted, keep=keep).found


def pretrained_recomputer(name_or_path: str, *, dtype: str | None = None) -> Recomputer:
    """Return the model of that name or directory, loaded. Raises `ModelMismatch` where it cannot be."""
    model = Recomputer(PretrainedModel(name_or_path, {} if dtype is None else {"dtype": dtype}, known_ids=None))
    try:
        _ = model.ids
    except (OSError, ValueError, AttributeError) as error:  # any that transformers raises for a name, a path or a dtype
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelMismatch(
            f"{name_or_path} cannot be loaded: {reason}", hint="Give a causal language model's name or path."
        ) from error
    return model


def _result(healed: Healed, segments: Sequence[Segment], call: Call, *, fidelity: str) -> ModelRepr:
    """Collect the parts of one text. A segment that was computed counts for the first text that contains it."""
    found, computed = call.found, call.computed
    scores = tuple(found[segment, Part.SCORES] for segment in segments)
    lengths = {segment: part["input_ids"].shape[0] for segment, part in zip(segments, scores, strict=True)}
    is_computed = tuple(segment in computed for segment in segments)
    num_computed = sum(lengths[segment] for segment in segments if segment in computed)
    computed.difference_update(segments)
    after = found.get((segments[-1], Part.LOGITS)) if len(healed.tips) == 1 else None
    return ModelRepr(
        text=healed.text,
        segments=tuple(segments),
        scores=scores,
        last_logits=None if after is None else after["logits"],
        store_logits=call.spare.get(segments[-1]),
        num_cached_tokens=sum(lengths.values()) - num_computed,
        num_computed_tokens=num_computed,
        is_computed=is_computed,
        num_model_calls=call.num_model_calls,
        seconds=call.seconds,
        ids=call.addresses.ids,
        fidelity=fidelity,
    )
