"""The harness's token ids, divided into the pieces of a prompt that have exactly these tokens.

The harness tokenises a context and its continuation as one string, cuts the ids in two, and cuts off the beginning of
what is too long. A prompt is made of strings that are tokenised one by one. So the ids are cut where a string can begin
and end, and each string is tried: tokenising it must give its ids again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backprompt_db.compute.tokens import encode_strings, start_ids
from backprompt_db.prompt.text import Text

_MIN_TOKENS = 8
"""A piece of so many tokens ends at a blank line: mostly between few-shot examples."""
_LINE_TOKENS = 64
"""A piece of so many tokens ends with its line."""
_MAX_TOKENS = 256
"""After so many, a piece ends at the next place where a string can begin."""

_MAX_REMEMBERED_STRINGS = 50_000


class PieceFinder:
    """Divides token ids into strings that have these tokens, with any Hugging Face tokenizer.

    Where a piece ends depends only on what precedes it and on the next token. So sequences with a common beginning
    share its pieces, whatever else is asked at the same time.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._start_ids = start_ids(tokenizer)
        self._tokens: dict[int, str] = {}
        self._strings: dict[tuple[bool, tuple[int, ...]], str | None] = {}

    def divide(self, ids: Sequence[int], *, cut: int) -> tuple[list[str], list[str]] | None:
        """Return the pieces that have the first `cut` of a prompt's tokens, and the pieces that have the others.

        Returns None where there are no such pieces: a character may lie on both sides of the cut, or a tokenizer may
        put start tokens before a prompt that has none.
        """
        before = self._pieces(ids, 0, cut)
        after = self._pieces(ids, cut, len(ids))
        return None if before is None or after is None else (before, after)

    def _pieces(self, ids: Sequence[int], begin: int, end: int) -> list[str] | None:
        """Return the pieces that have the tokens from `begin` to `end`; None where there are none."""
        pieces, places = list[str](), [begin]
        for index in range(begin + 1, end):
            if self._is_due(ids, places[-1], index) and self._can_begin(ids[index]):
                string = self._string(ids, places[-1], index)
                if string is not None:
                    pieces.append(string)
                    places.append(index)
        while places[-1] < end:
            last = self._string(ids, places[-1], end)
            if last is not None:
                return [*pieces, last]
            if not pieces:
                return None
            pieces.pop()
            places.pop()
        return pieces

    def _is_due(self, ids: Sequence[int], begin: int, index: int) -> bool:
        """Whether a piece that begins at `begin` had better end before the token at `index`."""
        num_tokens = index - begin
        if num_tokens < _MIN_TOKENS or num_tokens >= _MAX_TOKENS:
            return num_tokens >= _MAX_TOKENS
        before, after = self._token(ids[index - 2]) + self._token(ids[index - 1]), self._token(ids[index])
        is_line = before.endswith("\n") or after.startswith("\n")
        is_blank = before.endswith("\n\n") or (before.endswith("\n") and after.startswith("\n"))
        return is_blank or (is_line and num_tokens >= _LINE_TOKENS)

    def _can_begin(self, token_id: int) -> bool:
        """Whether a string can begin with a token: not with half of a character, and sometimes not inside a word."""
        return self._remembered((False, (token_id,))) is not None

    def _string(self, ids: Sequence[int], begin: int, end: int) -> str | None:
        """Return the string that has the tokens from `begin` to `end` in this place, None if no string has."""
        return self._remembered((begin == 0, tuple(ids[begin:end])))

    def _remembered(self, piece: tuple[bool, tuple[int, ...]]) -> str | None:
        if piece not in self._strings:
            if len(self._strings) >= _MAX_REMEMBERED_STRINGS:
                self._strings.clear()
            self._strings[piece] = self._find(*piece)
        return self._strings[piece]

    def _find(self, is_first: bool, ids: tuple[int, ...]) -> str | None:  # noqa: FBT001 - it is half of the key
        start = tuple(self._start_ids) if is_first else ()
        has_more = ids[: len(start)] == start and len(ids) > len(start)
        string = self._decode(ids[len(start) :] if has_more else ids)
        if not string:
            return None
        (encoded,) = encode_strings(self._tokenizer, [string])
        given = encoded if tuple(encoded[: len(start)]) == start else [*start, *encoded]
        return string if tuple(given) == ids else None

    def _token(self, token_id: int) -> str:
        if token_id not in self._tokens:
            self._tokens[token_id] = self._decode((token_id,))
        return self._tokens[token_id]

    def _decode(self, ids: Sequence[int]) -> str:
        string: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return string


def text_of(pieces: Sequence[str]) -> Text:
    """Return the text that consists of these pieces."""
    return sum(map(Text, pieces), Text(""))
