"""Tokens with their log-probabilities, of as many representations as fit into a bound: those that were used most."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from backprompt_db.maintenance.inspection import inspect
from backprompt_db.maintenance.vocabulary import Vocabulary, open_vocabulary
from backprompt_db.representation import Arrays, Part
from backprompt_db.store.contract import Key, Store

if TYPE_CHECKING:
    from backprompt_db.catalog import Catalog
    from backprompt_db.keys import TokenizerId
    from backprompt_db.maintenance.forest import Forest, Node

MAX_TOKENS = 200_000
"""Of all representations together."""
MAX_PARTS = 10_000
"""Each is a read of its own."""
_LEAST = -1e6
"""Stands for the log-probability of what a model says is impossible: JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The tokens of one text, or of its beginning."""

    ids: Sequence[int]
    logprobs: Sequence[float | None]
    """None where nothing predicts a token."""
    pieces: Sequence[str] | None
    """Each token as a string; None where the catalog does not know the tokenizer."""


def read_token_scores(
    store: Store,
    catalog: Catalog,
    found: Forest,
    *,
    max_text: int,
    watch: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> dict[int, TokenScores]:
    """Return the tokens of the nodes that were used most, by index, of each those of its first `max_text` characters.

    What cannot be read is left out. `watch` is given the indexes of all nodes to be read, and yields them.
    """

    @cache
    def vocabulary(tokenizer_id: TokenizerId) -> Vocabulary | None:
        return open_vocabulary(catalog, tokenizer_id)

    scores = dict[int, TokenScores]()
    for index in watch(list(_most_used(found))):
        node = found.nodes[index]
        arrays = inspect(store, Key(node.address, Part.SCORES)).arrays
        if arrays is not None:
            scores[index] = _token_scores(node, arrays, vocabulary(node.tokenizer_id), max_text=max_text)
    return scores


def _most_used(found: Forest) -> Iterator[int]:
    having = [index for index, node in enumerate(found.nodes) if Part.SCORES in node.nbytes]
    having.sort(key=lambda index: (found.nodes[index].num_hits, found.nodes[index].used_at), reverse=True)
    num_tokens = 0
    for index in having[:MAX_PARTS]:
        if num_tokens + found.nodes[index].num_tokens <= MAX_TOKENS:
            num_tokens += found.nodes[index].num_tokens
            yield index


def _token_scores(node: Node, arrays: Arrays, vocabulary: Vocabulary | None, *, max_text: int) -> TokenScores:
    ids, logprobs = (arrays[name].numpy().tolist() for name in ("input_ids", "token_logprobs"))
    pieces = None if vocabulary is None else vocabulary.pieces(node.text, ids)
    count = len(ids) if len(node.text) <= max_text else _num_within(pieces, max_text)
    known = (None if math.isnan(logprob) else round(min(max(logprob, _LEAST), 0.0), 3) for logprob in logprobs[:count])
    return TokenScores(ids[:count], list(known), None if pieces is None else pieces[:count])


def _num_within(pieces: Sequence[str] | None, max_text: int) -> int:
    """Return how many of the tokens lie within so many characters; without their strings as many as characters."""
    ends = itertools.accumulate(map(len, pieces)) if pieces is not None else itertools.count(1)
    return sum(1 for _ in itertools.takewhile(lambda end: end <= max_text, ends))
