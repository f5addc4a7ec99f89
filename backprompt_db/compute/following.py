"""Whether completions are what a model itself would go on with, token by token, along with their log-probabilities.

What it goes on with after a prompt, the likeliest token each time, is the prompt's greedy path. It is looked at only as
far as it agrees with a completion: most disagree in their first token, which the logits after the prompt show, and a
token more likely than all others together needs no look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from backprompt_db.compute.answers import completion_segments
from backprompt_db.compute.forward import evaluation, logits_of
from backprompt_db.compute.kvcache import KVShape, assemble
from backprompt_db.representation import Arrays, Part
from backprompt_db.text import Segment, Text, ancestry

if TYPE_CHECKING:
    from backprompt_db.compute.engine import Engine
    from backprompt_db.compute.job import Need
    from backprompt_db.compute.source import ModelSource

_SCORES, _KV = frozenset({Part.SCORES}), frozenset({Part.KV})
_TO_FOLLOW = frozenset({Part.LOGITS, Part.KV})

_SURELY_LIKELIEST = math.log(0.501)
"""A token with more than half of the probability is the likeliest; rounding does not reach as far as this."""

Paths = Mapping[Segment, tuple[int, ...]]
"""The beginnings of greedy paths, by the last segment of the prompt; an empty one says that nothing is known of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Followed:
    """What was found of one completion after its own prompt."""

    token_ids: npt.NDArray[np.int32]
    """int32 [T]."""
    token_logprobs: npt.NDArray[np.float32]
    """float32 [T]: natural log-probability of each token."""
    is_greedy: bool | None
    """Whether each token is the likeliest one in its place; None where that was not asked for."""


def follow(
    engine: Engine,
    source: ModelSource,
    pairs: Sequence[tuple[Text, Text]],
    *,
    paths: MutableMapping[Segment, tuple[int, ...]],
    namespace: str,
) -> list[Followed]:
    """Return what is found of each pair of a prompt and a completion; all that is missing is computed together.

    `paths` has what is known of the greedy paths of those prompts for which it matters, and more of them afterwards. Of
    completions, and of the last segment of a prompt, only scores are stored: that one usually is a question, and what
    is asked in its place has other tokens. Raises `PromptError` where nothing predicts a completion's first token.
    """
    endings = [completion_segments([prompt], [completion], namespace=namespace)[0] for prompt, completion in pairs]
    tips = [ending[0].parents[0] for ending in endings]
    wanted = dict.fromkeys([segment for ending in endings for segment in ending], _SCORES)
    asked = {tip: wanted.get(tip, frozenset()) | _TO_FOLLOW for tip in tips if paths.get(tip) == ()}
    found, _ = engine.represent(wanted | asked, keep=dict.fromkeys(tips, _SCORES) | wanted)
    paths.update({tip: (int(found[tip, Part.LOGITS]["logits"].torch().argmax()),) for tip in asked})
    scored = [_scored(found, ending) for ending in endings]
    open_ones = [(tip, *scores) for tip, scores in zip(tips, scored, strict=True) if _is_open(paths, tip, *scores)]
    if open_ones:
        _walk(engine, source, open_ones, paths, found)
    return [
        Followed(ids, logprobs, _begins(paths[tip], ids) if tip in paths else None)
        for tip, (ids, logprobs) in zip(tips, scored, strict=True)
    ]


def _scored(
    found: Mapping[Need, Arrays], ending: Sequence[Segment]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    scores = [found[segment, Part.SCORES] for segment in ending]
    ids = np.concatenate([part["input_ids"].numpy() for part in scores]).astype(np.int32, copy=False)
    return ids, np.concatenate([part["token_logprobs"].numpy() for part in scores]).astype(np.float32, copy=False)


def _is_open(
    paths: MutableMapping[Segment, tuple[int, ...]],
    tip: Segment,
    ids: npt.NDArray[np.int32],
    logprobs: npt.NDArray[np.float32],
) -> bool:
    """Whether a path must be followed further to know; a path that surely goes on with the completion is extended."""
    path = paths.get(tip)
    if path is None or len(path) >= len(ids) or not _begins(tuple(ids.tolist()), np.array(path)):
        return False
    if (logprobs[len(path) :] > _SURELY_LIKELIEST).all():
        paths[tip] = tuple(ids.tolist())
        return False
    return True


def _begins(path: Sequence[int], ids: npt.NDArray[np.integer]) -> bool:
    """Whether a path begins with all of `ids`."""
    return tuple(path[: len(ids)]) == tuple(ids.tolist())


def _walk(
    engine: Engine,
    source: ModelSource,
    completions: Sequence[tuple[Segment, npt.NDArray[np.int32], npt.NDArray[np.float32]]],
    paths: MutableMapping[Segment, tuple[int, ...]],
    found: Mapping[Need, Arrays],
) -> None:
    """Extend each prompt's path by one pass over a completion, up to the first token that is not the likeliest."""
    tips = [tip for tip, _, _ in completions]
    needed = {segment: _KV for segment in ancestry(tips) if (segment, Part.KV) not in found}
    kv = {**found, **engine.represent(needed, keep=dict.fromkeys(tips, _SCORES))[0]}
    for tip, ids, logprobs in completions:
        if _is_open(paths, tip, ids, logprobs):  # another completion may have shown it meanwhile
            likeliest = _likeliest(source, [kv[segment, Part.KV] for segment in ancestry([tip])], ids[:-1])
            path = (paths[tip][0], *likeliest)
            num_same = next((n for n, token in enumerate(ids.tolist()) if path[n] != token), len(ids) - 1)
            paths[tip] = path[: num_same + 1]


def _likeliest(source: ModelSource, kv: Sequence[Arrays], ids: npt.NDArray[np.int32]) -> list[int]:
    """Return the likeliest token after each of `ids`, which follow what has these keys and values."""
    runtime = source.runtime
    num_tokens = sum(arrays["keys"].shape[2] for arrays in kv)
    cache = assemble(KVShape.of(kv[0]), kv, capacity=num_tokens + len(ids), device=runtime.device).cache()
    with evaluation(runtime.model):
        output = runtime.model(
            input_ids=torch.from_numpy(ids.astype(np.int64))[None].to(runtime.device),
            past_key_values=cache,
            use_cache=True,
        )
    runtime.num_calls += 1
    likeliest: list[int] = logits_of(output).argmax(-1).tolist()
    return likeliest
