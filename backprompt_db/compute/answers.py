"""From texts to results: which parts of which segments a run or a score needs, and the result made of them.

`Recomputer` gives the same parts without anything that is stored, for checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from backprompt_db.compute.engine import Engine
from backprompt_db.compute.healing import Ending, Healed, merged_donors
from backprompt_db.compute.inference.loading import ModelSource, PretrainedModel
from backprompt_db.compute.plan import Need, Wanted
from backprompt_db.database.database import MEMORY
from backprompt_db.database.opening import open_database
from backprompt_db.errors import ModelMismatch, PromptError
from backprompt_db.prompt.ids import ModelIds
from backprompt_db.prompt.representation import Arrays, Part
from backprompt_db.prompt.segments import Segment, ancestry
from backprompt_db.prompt.text import ModelRepr

_SCORES = frozenset({Part.SCORES})
_NEEDED_BY_OTHERS = frozenset({Part.LOGITS, Part.KV})


def run(engine: Engine, texts: Sequence[Healed]) -> list[ModelRepr]:
    """Return the representation of each text; everything that is missing is computed together."""
    segments = [each.segments for each in texts]
    addresses = engine.addresses()
    wanted = run_needs(segments, [each.tips for each in texts])
    found, computed = engine.represent(wanted, keep={}, addresses=addresses, donors=merged_donors(texts))
    return [
        _result(each, some, found, computed, ids=addresses.ids, fidelity=engine.fidelity)
        for each, some in zip(texts, segments, strict=True)
    ]


def run_needs(segments: Iterable[Sequence[Segment]], tips: Iterable[tuple[Segment, ...]]) -> Wanted:
    """Return the parts that a run needs: the scores of each segment, the logits after a single last segment."""
    wanted = dict.fromkeys([segment for each in segments for segment in each], _SCORES)
    return wanted | {tip[0]: frozenset({Part.SCORES, Part.LOGITS}) for tip in tips if len(tip) == 1}


def score(engine: Engine, endings: Sequence[Ending]) -> npt.NDArray[np.float64]:
    """Return the log-probability of each completion: [num_endings].

    It is that of prompt and completion less that of the prompt, each with the tokens of its joined string. Raises
    `PromptError` where they differ in their first token, which nothing predicts.
    """
    wanted = dict.fromkeys([segment for ending in endings for segment in (*ending.segments, *ending.without)], _SCORES)
    found, _ = engine.represent(wanted, keep=wanted, donors=merged_donors(endings))
    for ending in endings:
        if ending.without and not ending.segments[0].parents:
            first, alone = (found[each[0], Part.SCORES]["input_ids"].numpy()[0] for each in ending[:2])
            if first != alone:
                raise PromptError(
                    "the first token of the prompt crosses the seam, and nothing predicts it",
                    hint="Give the prompt one more word.",
                )
    return np.array([_sum(found, ending.segments) - _sum(found, ending.without) for ending in endings])


def _sum(found: Mapping[Need, Arrays], segments: Iterable[Segment]) -> float:
    """Return the sum of the log-probabilities of segments; a first token, which is in both sums, counts for nothing."""
    rows = ((segment, found[segment, Part.SCORES]["token_logprobs"].numpy()) for segment in segments)
    return sum(float(row[0 if segment.parents else 1 :].sum(dtype=np.float64)) for segment, row in rows)


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

    def compute(self, wanted: Wanted) -> Mapping[Need, Arrays]:
        """Return the wanted parts. Raises a `ComputeError` where the model cannot be used."""
        keep = dict.fromkeys(ancestry(wanted), _NEEDED_BY_OTHERS)
        with open_database(MEMORY) as db:
            found, _ = Engine(self._source, db, deterministic=False, progress=False).represent(wanted, keep=keep)
        return found


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


def _result(
    healed: Healed,
    segments: Sequence[Segment],
    found: Mapping[Need, Arrays],
    computed: set[Segment],
    *,
    ids: ModelIds,
    fidelity: str,
) -> ModelRepr:
    """Collect the parts of one text. A segment that was computed counts for the first text that contains it."""
    scores = tuple(found[segment, Part.SCORES] for segment in segments)
    num_tokens = {segment: part["input_ids"].shape[0] for segment, part in zip(segments, scores, strict=True)}
    is_computed = tuple(segment in computed for segment in segments)
    num_computed = sum(num_tokens[segment] for segment in segments if segment in computed)
    computed.difference_update(segments)
    tips = healed.tips
    return ModelRepr(
        text=healed.text,
        segments=tuple(segments),
        scores=scores,
        last_logits=found[tips[0], Part.LOGITS]["logits"] if len(tips) == 1 else None,
        num_cached_tokens=sum(num_tokens.values()) - num_computed,
        num_computed_tokens=num_computed,
        is_computed=is_computed,
        ids=ids,
        fidelity=fidelity,
    )
