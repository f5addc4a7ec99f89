"""From texts to what a caller gets: which parts of which segments a question needs, and the answer put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from backprompt_db.compute.plan import Need, Wanted
from backprompt_db.errors import PromptError
from backprompt_db.prompt.ids import ModelIds
from backprompt_db.prompt.representation import Arrays, Part
from backprompt_db.prompt.segments import Segment, ancestry
from backprompt_db.prompt.text import ModelRepr, Text

if TYPE_CHECKING:
    from backprompt_db.compute.engine import Engine

_SCORES = frozenset({Part.SCORES})


def run(engine: Engine, texts: Sequence[Text], *, namespace: str) -> list[ModelRepr]:
    """Return the representation of each text; what is missing of all of them is computed together."""
    segments = [text.segments(namespace) for text in texts]
    tips = [text.tips(namespace) for text in texts]
    addresses = engine.addresses()
    found, computed = engine.represent(run_needs(segments, tips), keep={}, addresses=addresses)
    return [
        _result(text, each, tip, found, computed, ids=addresses.ids, fidelity=engine.fidelity)
        for text, each, tip in zip(texts, segments, tips, strict=True)
    ]


def run_needs(segments: Iterable[Sequence[Segment]], tips: Iterable[tuple[Segment, ...]]) -> Wanted:
    """Return what running texts needs: the scores of each segment, and the logits where a text has one last segment."""
    wanted = dict.fromkeys([segment for each in segments for segment in each], _SCORES)
    return wanted | {tip[0]: frozenset({Part.SCORES, Part.LOGITS}) for tip in tips if len(tip) == 1}


def score(
    engine: Engine, prompts: Sequence[Text], completions: Sequence[Text], *, namespace: str
) -> npt.NDArray[np.float64]:
    """Return the log-probability of each completion after each prompt: [num_prompts, num_completions]."""
    endings = completion_segments(prompts, completions, namespace=namespace)
    wanted = dict.fromkeys([segment for ending in endings for segment in ending], _SCORES)
    found, _ = engine.represent(wanted, keep=wanted)
    sums = [
        sum(float(found[segment, Part.SCORES]["token_logprobs"].numpy().sum(dtype=np.float64)) for segment in ending)
        for ending in endings
    ]
    return np.array(sums).reshape(len(prompts), len(completions))


def completion_segments(prompts: Sequence[Text], completions: Sequence[Text], *, namespace: str) -> list[list[Segment]]:
    """Return the segments of each completion after each prompt, prompt by prompt.

    Raises `PromptError` where nothing predicts the first token of one of them.
    """
    endings: list[list[Segment]] = []
    for prompt in prompts:
        tips, known = prompt.tips(namespace), prompt.segments(namespace)
        endings += [ancestry(completion.place(tips, namespace), without=known) for completion in completions]
    if not all(endings) or any(len(segment.parents) != 1 for ending in endings for segment in ending):
        raise PromptError(
            "a completion is empty, or directly follows parallel branches, where nothing predicts its first token",
            hint="Put the text that asks for the completion after the branches.",
        )
    return endings


def _result(
    text: Text,
    segments: Sequence[Segment],
    tips: tuple[Segment, ...],
    found: Mapping[Need, Arrays],
    computed: set[Segment],
    *,
    ids: ModelIds,
    fidelity: str,
) -> ModelRepr:
    """Collect the parts of one text. A computed segment counts for the first text that has it."""
    scores = tuple(found[segment, Part.SCORES] for segment in segments)
    num_tokens = {segment: part["input_ids"].shape[0] for segment, part in zip(segments, scores, strict=True)}
    is_computed = tuple(segment in computed for segment in segments)
    num_computed = sum(num_tokens[segment] for segment in segments if segment in computed)
    computed.difference_update(segments)
    return ModelRepr(
        text=text,
        scores=scores,
        last_logits=found[tips[0], Part.LOGITS]["logits"] if len(tips) == 1 else None,
        num_cached_tokens=sum(num_tokens.values()) - num_computed,
        num_computed_tokens=num_computed,
        is_computed=is_computed,
        ids=ids,
        fidelity=fidelity,
    )
