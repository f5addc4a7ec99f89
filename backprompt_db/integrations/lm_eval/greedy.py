"""Whether a completion is what a model itself would write, along with the log-probabilities of its tokens.

The greedy path of a prompt is what the model writes after it, always choosing the likeliest token. A path is computed
only as far as it agrees with a completion. Most disagree in their first token, which the logits after the prompt show;
and a token with more than half of the probability is the likeliest without looking further. The database remembers
the paths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from backprompt_db.catalog.records import GreedyPath
from backprompt_db.compute.healing import ending_as_written
from backprompt_db.compute.inference.forward import evaluation, logits_of
from backprompt_db.compute.inference.kv_cache import KVShape, assemble, cache_argument
from backprompt_db.prompt.representation import Arrays, Part
from backprompt_db.prompt.segments import Segment, ancestry
from backprompt_db.prompt.text import Text

if TYPE_CHECKING:
    from backprompt_db.compute.call import Addresses
    from backprompt_db.compute.engine import Engine
    from backprompt_db.compute.inference.runner import ModelRunner
    from backprompt_db.compute.plan import Need, Wanted
    from backprompt_db.database.database import Database
    from backprompt_db.prompt.ids import Address


_SCORES, _KV = frozenset({Part.SCORES}), frozenset({Part.KV})
_TO_FOLLOW = frozenset({Part.LOGITS, Part.KV})

_SURELY_LIKELIEST = math.log(0.501)
"""A token with more than half of the probability is the likeliest. The rest is a margin for rounding."""

Paths = Mapping[Segment, tuple[int, ...]]
"""The tokens that are known to follow, by the last segment of the prompt; empty where none are."""


class GreedyPaths:
    """The greedy paths that a database remembers."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._unsaved: dict[Address, tuple[int, ...]] = {}
        """Paths that were found where nothing can be saved, as in a database in memory."""

    def known(self, tips: Iterable[Segment], addresses: Addresses) -> dict[Segment, tuple[int, ...]]:
        """Return what is known of the path after each of these last segments of prompts; empty where nothing is."""
        places = {tip: addresses.address(tip) for tip in tips}
        recalled = self._db.model_metadata.greedy_paths(set(places.values())) | self._unsaved
        return {tip: recalled.get(address, ()) for tip, address in places.items()}

    def save(
        self,
        paths: Mapping[Segment, tuple[int, ...]],
        addresses: Addresses,
        *,
        known: Mapping[Segment, tuple[int, ...]],
    ) -> None:
        """Save the paths of which more is known now than in `known`."""
        new = {addresses.address(tip): path for tip, path in paths.items() if len(path) > len(known[tip])}
        if self._db.catalog is None or self._db.readonly:
            self._unsaved |= new
        elif new:
            self._db.model_metadata.save(*(GreedyPath(address, path) for address, path in new.items()))


@dataclass(frozen=True, slots=True, eq=False)
class Followed:
    """One completion after its own prompt."""

    token_ids: tuple[int, ...]
    token_logprobs: npt.NDArray[np.float32]
    """float32 [T]: natural log-probability of each token."""
    is_greedy: bool | None
    """Whether each token is the likeliest one in its place; None where that was not asked for."""


def follow(
    engine: Engine,
    pairs: Sequence[tuple[Text, Text]],
    *,
    paths: MutableMapping[Segment, tuple[int, ...]],
    namespace: str,
) -> list[Followed]:
    """Return the scores of each pair of a prompt and a completion; all that is missing is computed together.

    `paths` holds what is known of the greedy paths of those prompts for which they matter; what is found is added to
    it. Of completions, and of the last segment of a prompt, only scores are stored: the last segment usually is a
    question, and other questions do not go on from it.

    Raises `PromptError` where nothing predicts a completion's first token.
    """
    endings = [ending_as_written(prompt, completion, namespace=namespace) for prompt, completion in pairs]
    tips = [ending[0].parents[0] for ending in endings]
    wanted = dict.fromkeys([segment for ending in endings for segment in ending], _SCORES)
    asked = {tip: wanted.get(tip, frozenset()) | _TO_FOLLOW for tip in tips if paths.get(tip) == ()}
    keep = _kept(tips) | wanted
    found = engine.represent(wanted | asked, keep=keep).found
    paths.update({tip: (int(found[tip, Part.LOGITS]["logits"].torch().argmax()),) for tip in asked})
    scored = [_scored(found, ending) for ending in endings]
    for tip, (ids, logprobs) in zip(tips, scored, strict=True):
        if _is_open(paths, tip, ids) and _is_sure(logprobs[len(paths[tip]) :]):
            paths[tip] = ids
    unknown = [(tip, ids) for tip, (ids, _) in zip(tips, scored, strict=True) if _is_open(paths, tip, ids)]
    if unknown:
        _walk(engine, unknown, paths, found, keep=keep)
    return [
        Followed(ids, logprobs, paths[tip][: len(ids)] == ids if tip in paths else None)
        for tip, (ids, logprobs) in zip(tips, scored, strict=True)
    ]


def _kept(tips: Iterable[Segment]) -> dict[Segment, frozenset[Part]]:
    """Return what to store of the last segments of prompts: only scores, unless other prompts go on from there."""
    followed = {parent for segment in ancestry(tips) for parent in segment.parents}
    return {tip: _SCORES for tip in tips if tip not in followed}


def _scored(found: Mapping[Need, Arrays], ending: Sequence[Segment]) -> tuple[tuple[int, ...], npt.NDArray[np.float32]]:
    scores = [found[segment, Part.SCORES] for segment in ending]
    ids = np.concatenate([part["input_ids"].numpy() for part in scores])
    logprobs = np.concatenate([part["token_logprobs"].numpy() for part in scores])
    return tuple(ids.tolist()), logprobs.astype(np.float32, copy=False)


def _is_open(paths: Paths, tip: Segment, ids: tuple[int, ...]) -> bool:
    """Whether it is open if the path goes on with `ids`: all that is known of it is the beginning of `ids`."""
    path = paths.get(tip)
    return path is not None and len(path) < len(ids) and ids[: len(path)] == path


def _is_sure(logprobs: npt.NDArray[np.float32]) -> bool:
    """Whether each of these tokens is certainly the likeliest one."""
    return bool((logprobs > _SURELY_LIKELIEST).all())


def _walk(
    engine: Engine,
    completions: Sequence[tuple[Segment, tuple[int, ...]]],
    paths: MutableMapping[Segment, tuple[int, ...]],
    found: Mapping[Need, Arrays],
    *,
    keep: Wanted,
) -> None:
    """Extend each prompt's path by one pass over a completion, up to the first token that is not the likeliest."""
    runner = engine.prove()  # first: all may be found of a model whose files are others by now
    needed = {segment: _KV for segment in ancestry(tip for tip, _ in completions) if (segment, Part.KV) not in found}
    kv = {**found, **engine.represent(needed, keep=keep).found}
    for tip, ids in completions:
        if _is_open(paths, tip, ids):  # another completion may have shown it meanwhile
            likeliest = _likeliest(runner, [kv[segment, Part.KV] for segment in ancestry([tip])], ids[:-1])
            path = (paths[tip][0], *likeliest)
            num_same = next((n for n, token in enumerate(ids) if path[n] != token), len(ids) - 1)
            paths[tip] = path[: num_same + 1]


def _likeliest(runner: ModelRunner, kv: Sequence[Arrays], ids: Sequence[int]) -> list[int]:
    """Return the likeliest token after each of `ids`, which follow the segments with these keys and values."""
    num_tokens = sum(arrays["keys"].shape[2] for arrays in kv)
    cache = assemble(KVShape.of(kv[0]), kv, capacity=num_tokens + len(ids), device=runner.device).cache()
    with evaluation(runner.model):
        output = runner.model(
            input_ids=torch.tensor([ids], device=runner.device),
            **cache_argument(runner.model, cache),
            use_cache=True,
        )
    runner.num_calls += 1
    likeliest: list[int] = logits_of(output).argmax(-1).tolist()
    return likeliest
