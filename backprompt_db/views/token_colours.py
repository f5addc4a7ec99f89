"""A result in a notebook: every token, coloured by how much it surprised the model, and the likeliest next tokens.

Surprise is minus the log-probability, in nats. Styles are inline. Colours are transparent and lie over the page's own
background, so that the tokens can be read in light and dark. Markup in texts is shown as text.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from backprompt_db.views import palette
from backprompt_db.views.formatting import plural, visible
from backprompt_db.views.scene import ScoredSegment, Vocabulary

NUM_TOKENS = 10_000
"""Tokens that are shown at most. Of more, the first and the last ones are shown."""

_MOST_NATS = 8.0
"""The surprise with the deepest colour."""
_DEEPEST = 0.75
_SURPRISE = ",".join(map(str, palette.channels(palette.SURPRISE)))
_PROBABILITY = ",".join(map(str, palette.channels(palette.PROBABILITY)))
_BLOCK = (
    "font-family:ui-monospace,Menlo,Consolas,monospace;font-size:13px;line-height:1.9;max-height:32em;overflow:auto"
)
_WRAP = "white-space:pre-wrap;overflow-wrap:anywhere"
_NAMES = {False: "cached", True: "computed"}
_LINES = {False: f"2px solid {palette.STORED}", True: f"2px dashed {palette.COMPUTED}"}
"""The line below the tokens of a segment. Its form differs, too, not only its colour."""
_UNDEFINED = "outline:1px dotted;outline-offset:-1px"
_NOTHING = "◌"
"""Stands for a token that adds no character, because another token of the same character shows it."""


class _Numbers:
    """Replaces a vocabulary that is not known: tokens are shown by their ids."""

    def pieces(self, _: str, ids: Sequence[int]) -> list[str]:
        return [self.token(each) for each in ids]

    def token(self, token_id: int) -> str:
        return f"[{token_id}]"


def coloured_tokens(
    segments: Sequence[ScoredSegment],
    *,
    num_cached_tokens: int,
    num_computed_tokens: int,
    likeliest: Sequence[tuple[int, float]],
    vocabulary: Vocabulary | None,
) -> str:
    """Return HTML: the tokens of a result, and the `likeliest` next ones with their log-probabilities.

    Without a `vocabulary`, tokens are shown by their ids.
    """
    vocabulary = vocabulary or _Numbers()
    summary = _summary(segments, f"{num_cached_tokens:,} cached, {num_computed_tokens:,} computed")
    return (
        f"<div><div>{summary}</div><div>{_legend()}</div>"
        f'<div style="{_BLOCK};{_WRAP}" tabindex="0">{"".join(_body(segments, vocabulary))}</div>'
        f"{_next_tokens(likeliest, vocabulary)}</div>"
    )


def _summary(segments: Sequence[ScoredSegment], origins: str) -> str:
    nats = -np.concatenate([np.asarray(segment.logprobs, dtype=np.float64) for segment in segments])
    defined = nats[~np.isnan(nats)]
    parts = [f"{plural(nats.size, 'token')}: {origins}"]
    if defined.size:
        mean = float(defined.mean())
        perplexity = math.exp(mean) if mean < math.log(1e300) else math.inf
        parts.append(f"log-probability {-defined.sum():,.2f}")
        parts.append(f"{mean:.3f} nats per token")
        parts.append(f"perplexity {perplexity:,.2f}")
    if nats.size > defined.size:
        parts.append(f"{plural(nats.size - defined.size, 'token')} that nothing predicts")
    return html.escape(" · ".join(parts))


def _legend() -> str:
    scale = "".join(
        f'<span style="{_shade(level)};padding:0 .4em">{level:g}{"+" if level == _MOST_NATS else ""}</span>'
        for level in (0.0, 2.0, 4.0, 6.0, _MOST_NATS)
    )
    lines = " ".join(
        f'<span style="border-bottom:{_LINES[is_computed]}">{_NAMES[is_computed]}</span>' for is_computed in _NAMES
    )
    undefined = f'<span style="{_UNDEFINED};padding:0 .4em;margin:0 .4em">undefined</span>'
    return f"<small>surprise in nats {scale}{undefined}{lines}</small>"


def _body(segments: Sequence[ScoredSegment], vocabulary: Vocabulary) -> Iterator[str]:
    """Yield each segment's tokens. Of very many tokens, those in the middle are only counted."""
    ends = list(itertools.accumulate(len(segment.token_ids) for segment in segments))
    hidden = range(NUM_TOKENS // 2, max(NUM_TOKENS // 2, ends[-1] - NUM_TOKENS // 2))
    for number, (segment, end) in enumerate(zip(segments, ends, strict=True)):
        begin = end - len(segment.token_ids)
        if hidden.start < begin and end <= hidden.stop:
            continue
        spans = list(_spans(segment, vocabulary))
        before, after = spans[: max(0, hidden.start - begin)], spans[max(0, hidden.stop - begin) :]
        gap = f"<i>… {plural(len(hidden), 'token')} not shown …</i>" if begin <= hidden.start < end and hidden else ""
        shown = "".join([*before, gap, *after]) if hidden else "".join(spans)
        yield _segment(number, shown, is_computed=segment.is_computed)


def _segment(number: int, spans: str, *, is_computed: bool) -> str:
    name = _NAMES[is_computed]
    return (
        f'<span data-segment="{number}" data-state="{name}" style="border-bottom:{_LINES[is_computed]}"'
        f' title="segment {number}: {name}">{spans}</span>'
    )


def _spans(segment: ScoredSegment, vocabulary: Vocabulary) -> Iterator[str]:
    strings = vocabulary.pieces(segment.text, segment.token_ids)
    for string, token_id, logprob in zip(strings, segment.token_ids, segment.logprobs, strict=True):
        yield f'<span title="{_facts(token_id, logprob)}" style="{_shade(-logprob)}">{_readable(string)}</span>'


def _facts(token_id: int, logprob: float) -> str:
    known = "undefined" if math.isnan(logprob) else f"log-probability {logprob:.3f}, {math.exp(logprob):.2%}"
    return f"token {token_id}: {known}"


def _shade(nats: float) -> str:
    if math.isnan(nats):
        return _UNDEFINED
    depth = min(max(nats, 0.0) / _MOST_NATS, 1.0) * _DEEPEST
    return f"background:rgba({_SURPRISE},{depth:.2f})"


def _readable(string: str) -> str:
    """Return a token as HTML. A space before a word stays a space; other spaces, tabs and line ends get a mark."""
    if not string:
        return _mark(_NOTHING)
    is_plain_first = string[0] == " " and string.strip() != ""
    head, rest = (" ", string[1:]) if is_plain_first else ("", string)
    return head + "".join(_BLANKS.get(character) or html.escape(visible(character)) for character in rest)


def _on_one_line(string: str) -> str:
    return _readable(string).replace("\n", "")


def _mark(character: str) -> str:
    return f'<span style="opacity:.45">{character}</span>'


_BLANKS = {" ": _mark("·"), "\t": _mark("→") + "\t", "\n": _mark("↵") + "\n"}


def _next_tokens(likeliest: Sequence[tuple[int, float]], vocabulary: Vocabulary) -> str:
    """Return the likeliest next tokens as HTML; nothing where the text has no single last token."""
    if not likeliest:
        return ""
    tokens = " ".join(
        f'<span title="{_facts(token_id, logprob)}" style="background:rgba({_PROBABILITY},{math.exp(logprob) / 2:.2f});'
        f'padding:0 .3em">{_on_one_line(vocabulary.token(token_id))} <small>{math.exp(logprob):.1%}</small></span>'
        for token_id, logprob in likeliest
    )
    return f'<div style="{_BLOCK};{_WRAP}">then {tokens}</div>'
