"""Log-likelihoods of token ids for the harness, out of the database where a prompt can be made of the ids."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from backprompt_db.integrations.lm_eval.greedy import Followed, follow
from backprompt_db.integrations.lm_eval.token_pieces import text_of

if TYPE_CHECKING:
    from backprompt_db.compute.engine import Engine
    from backprompt_db.integrations.lm_eval.greedy import GreedyPaths
    from backprompt_db.integrations.lm_eval.token_pieces import PieceFinder
    from backprompt_db.prompt.text import Text

logger = logging.getLogger(__name__)

_MAX_QUESTIONS = 64
_MAX_NEW_TOKENS = 4096
"""Tokens in a batch that a question does not share with the one before it. They bound what is in memory at once."""


@dataclass(frozen=True, slots=True)
class Question:
    """Token ids, of which the last `num_asked` are to be scored after the others."""

    ids: list[int]
    num_asked: int
    wants_greedy: bool = True
    """Whether the harness asks if each of these is the likeliest token."""


class Answer(NamedTuple):
    """What the harness is told about a question."""

    logprob: float
    """Natural log-probability of the tokens that were asked for, summed."""
    is_greedy: bool
    """Whether each of them is the likeliest token; false where that was not asked."""


def batches(questions: Sequence[Question]) -> Iterator[list[int]]:
    """Yield the numbers of questions in batches; questions that begin alike stand together."""
    order = sorted(range(len(questions)), key=lambda number: questions[number].ids)
    batch, num_new, before = list[int](), 0, list[int]()
    for number in order:
        ids = questions[number].ids
        num_more = len(ids) - _num_common(before, ids)
        if batch and (len(batch) >= _MAX_QUESTIONS or num_new + num_more > _MAX_NEW_TOKENS):
            yield batch
            batch, num_new = [], 0
        batch.append(number)
        num_new += num_more
        before = ids
    if batch:
        yield batch


def _num_common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many ids two sequences have in common at their beginning."""
    longest = min(len(left), len(right))
    same = map(operator.eq, left, right)
    return next((number for number, is_same in enumerate(same) if not is_same), longest)


class Scorer:
    """Answers questions under one model."""

    def __init__(self, engine: Engine, *, paths: GreedyPaths, namespace: str) -> None:
        self._engine = engine
        self._paths = paths
        self._namespace = namespace
        self._has_warned = False

    def answers(self, questions: Sequence[Question], finder: PieceFinder) -> list[Answer]:
        """Return the answer to each of a batch of questions."""
        divided = [finder.divide(each.ids, cut=len(each.ids) - each.num_asked) for each in questions]
        texts: dict[tuple[str, ...], Text] = {}
        pairs = [(_text(pieces[0], texts), _text(pieces[1], texts)) for pieces in divided if pieces]
        askers = [each for each, pieces in zip(questions, divided, strict=True) if pieces]
        followed = iter(self._follow(pairs, askers))
        return [
            _answer(next(followed)) if pieces else self._run(each)
            for each, pieces in zip(questions, divided, strict=True)
        ]

    def _follow(self, pairs: Sequence[tuple[Text, Text]], askers: Sequence[Question]) -> list[Followed]:
        if not pairs:
            return []
        addresses = self._engine.addresses()
        asked = {
            prompt.tips(self._namespace)[0]
            for (prompt, _), asker in zip(pairs, askers, strict=True)
            if asker.wants_greedy
        }
        known = self._paths.known(asked, addresses) if asked else {}
        paths = dict(known)
        followed = follow(self._engine, pairs, paths=paths, namespace=self._namespace)
        self._paths.save(paths, addresses, known=known)
        return followed

    def _run(self, question: Question) -> Answer:
        """Run the model on token ids that no string has; nothing is stored."""
        import torch

        from backprompt_db.compute.inference.forward import evaluation, logits_of

        if not self._has_warned:
            self._has_warned = True
            logger.warning("some requests begin or are cut inside a character or a word: those are computed each time")
        runner = self._engine.prove()
        with evaluation(runner.model):
            ids = torch.tensor([question.ids], device=runner.device)
            logprobs = logits_of(runner.model(ids[:, :-1]))[-question.num_asked :].float().log_softmax(-1)
        runner.num_calls += 1
        targets = ids[0, -question.num_asked :]
        chosen = logprobs.gather(1, targets[:, None])
        return Answer(float(chosen.sum()), bool((logprobs.argmax(-1) == targets).all()))


def _answer(followed: Followed) -> Answer:
    return Answer(float(followed.token_logprobs.sum(dtype="float64")), bool(followed.is_greedy))


def _text(pieces: Sequence[str], known: dict[tuple[str, ...], Text]) -> Text:
    """Return the text of these pieces: the same object for the same pieces, so that its segments are made once."""
    key = tuple(pieces)
    if key not in known:
        known[key] = text_of(key)
    return known[key]
