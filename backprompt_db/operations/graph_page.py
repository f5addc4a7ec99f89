"""What is put into a page that shows a whole database: columns of its nodes, within bounds, and what was left out."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from backprompt_db.database.vocabulary import Vocabulary, open_vocabulary
from backprompt_db.operations.forest import Forest, Measure
from backprompt_db.operations.inspection import inspect
from backprompt_db.prompt.representation import Arrays, Part
from backprompt_db.store.contract import Key, Store
from backprompt_db.views.formatting import duration, plural, size

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.operations.forest import Node
    from backprompt_db.prompt.ids import TokenizerId


MAX_CHARACTERS = 50_000_000
"""The most that all texts together may have: a browser has to hold them."""

MAX_TOKENS = 200_000
"""The most that is shown, of all representations together."""
MAX_PARTS = 10_000
"""Each of them is read by itself."""
_LEAST = -1e6
"""Stands for the log-probability of what a model says is impossible: JSON has no infinity."""

_NUM_ADDRESS_DIGITS = 16
_NUM_ID_DIGITS = 8

_Value = TypeVar("_Value", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Codes:
    """A column with few values: the values, the most frequent first, and the place among them of each row's."""

    values: Sequence[Any]
    places: Sequence[int]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The tokens of one text, or of its beginning."""

    ids: Sequence[int]
    logprobs: Sequence[float | None]
    """None where nothing predicts a token."""
    pieces: Sequence[str] | None
    """Each token as a string; None where the catalog does not know the tokenizer."""


def page_contents(found: Forest, tokens: Mapping[int, TokenScores] | None, *, max_text: int) -> dict[str, Any]:
    """Return what `views.page.html_page` shows, in JSON's types.

    `tokens` are those of some nodes, by index; None if nobody wants any. Each text is cut to its first `max_text`
    characters.
    """
    models = _codes([(node.weights_id, node.model_name) for node in found.nodes])
    namespaces, labels = (_codes([getattr(node, name) for node in found.nodes]) for name in ("namespace", "label"))
    return {
        "totals": _totals(found),
        "remarks": list(_remarks(found, tokens, max_text=max_text)),
        "half_life_seconds": found.half_life_seconds,
        "models": [_model(*model) for model in models.values],
        "namespaces": namespaces.values,
        "labels": labels.values,
        "nodes": {
            **_places(found),
            **_texts(found, max_text),
            **_numbers(found),
            "models": models.places,
            "namespaces": namespaces.places,
            "labels": labels.places,
        },
        "tokens": {index: _columns(scores) for index, scores in (tokens or {}).items()},
    }


def affordable_text(found: Forest, max_text: int) -> int:
    """Return how many characters of each text can be shown, at most `max_text`, within `MAX_CHARACTERS` in all."""
    lengths = [len(node.text) for node in found.nodes]
    while sum(min(length, max_text) for length in lengths) > MAX_CHARACTERS and max_text > 1:
        max_text //= 2
    return max_text


def _columns(scores: TokenScores) -> dict[str, Any]:
    return {"ids": scores.ids, "logprobs": scores.logprobs, "pieces": scores.pieces}


def _codes(column: Sequence[_Value]) -> Codes:
    values = [value for value, _ in Counter(column).most_common()]
    places = {value: place for place, value in enumerate(values)}
    return Codes(values, [places[value] for value in column])


def _model(weights_id: bytes, name: str | None) -> str:
    return f"{(name or '?').rstrip('/').rpartition('/')[2]} ({weights_id.hex()[:_NUM_ID_DIGITS]})"


def _places(found: Forest) -> dict[str, Any]:
    """Return where nodes stand. What few nodes have is given by their indexes."""
    numbered = list(enumerate(found.nodes))
    return {
        "addresses": [node.address.hex()[:_NUM_ADDRESS_DIGITS] for node in found.nodes],
        "parents": [node.parents[0] if node.parents else -1 for node in found.nodes],
        "other_parents": {index: node.parents[1:] for index, node in numbered if len(node.parents) > 1},
        "absent_parents": {index: node.num_absent_parents for index, node in numbered if node.num_absent_parents},
        "pinned": [index for index, node in numbered if node.is_pinned],
    }


def _texts(found: Forest, max_text: int) -> dict[str, Any]:
    """Return texts, and the lengths of those that were shortened."""
    lengths = {index: len(node.text) for index, node in enumerate(found.nodes)}
    return {
        "texts": [node.text[:max_text] for node in found.nodes],
        "shortened": {index: length for index, length in lengths.items() if length > max_text},
    }


def _numbers(found: Forest) -> dict[str, Any]:
    """Return numbers: sizes are -1 for what is not stored, times are seconds before the page, -1 for never."""
    return {
        "num_tokens": [node.num_tokens for node in found.nodes],
        **{f"{part.name.lower()}_nbytes": [node.nbytes.get(part, -1) for node in found.nodes] for part in Part},
        "compute_seconds": [float(f"{node.compute_seconds:.6g}") for node in found.nodes],
        "num_hits": [node.num_hits for node in found.nodes],
        "created_seconds": [_seconds_before(found, node.created_at) for node in found.nodes],
        "used_seconds": [_seconds_before(found, node.last_used_at) for node in found.nodes],
    }


def _seconds_before(found: Forest, at: float | None) -> float:
    return -1 if at is None else round(max(0.0, found.at - at), 3)


def _remarks(found: Forest, tokens: Mapping[int, TokenScores] | None, *, max_text: int) -> Iterator[str]:
    """Yield what is left out, a line each."""
    num_shortened = sum(len(node.text) > max_text for node in found.nodes)
    num_scores = sum(Part.SCORES in node.nbytes for node in found.nodes)
    if not found.is_whole:
        yield f"Only the newest {len(found.nodes):,} representations are on this page; --limit takes more."
    if num_shortened:
        has_room = affordable_text(found, 2 * max_text) > max_text
        what = "--max-text takes" if has_room else "of fewer segments there is room for"
        yield (
            f"Of {num_shortened:,} {'text' if num_shortened == 1 else 'texts'} only the first {max_text:,} characters"
            f" are shown and searched; {what} more."
        )
    if tokens is not None and len(tokens) < num_scores:
        yield f"Log-probabilities are those of {len(tokens):,} of {num_scores:,} segments that have any: the most used."
    if tokens is None and num_scores:
        yield "Log-probabilities of tokens were left out, by --no-tokens."


def _totals(found: Forest) -> str:
    if not found.nodes:
        return "Nothing is stored here, or nothing is selected. Run a prompt, then make this page again."
    tokens, nbytes, seconds = (
        sum(found.weights(measure)) for measure in (Measure.TOKENS, Measure.NBYTES, Measure.SAVED_SECONDS)
    )
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(found.at))
    facts = (plural(int(tokens), "token"), size(int(nbytes)), f"{duration(seconds)} saved", made)
    return f"{plural(len(found.nodes), 'segment')} · {' · '.join(facts)}"


def read_token_scores(
    store: Store,
    catalog: Catalog,
    found: Forest,
    *,
    max_text: int,
    watch: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> dict[int, TokenScores]:
    """Return the tokens of the most used nodes, by index: those of the first `max_text` characters of each.

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
    """Return how many tokens lie within so many characters; without their strings, one for each character."""
    ends = itertools.accumulate(map(len, pieces)) if pieces is not None else itertools.count(1)
    return sum(1 for _ in itertools.takewhile(lambda end: end <= max_text, ends))
