"""Where a long string is cut into segments: where the database remembers, else where the tokenizer says."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import TYPE_CHECKING

from backprompt_db.catalog import CutsRecord
from backprompt_db.errors import PromptError
from backprompt_db.keys import utf8
from backprompt_db.text import Text

if TYPE_CHECKING:
    from backprompt_db.compute.source import ModelSource
    from backprompt_db.notes import Notes

_CUTS = b"backprompt-db/cuts/1\0"


def pieces(string: str, num_tokens: int, *, source: ModelSource, notes: Notes) -> list[str]:
    """Return a string in pieces of about that many tokens, which have together exactly the tokens of the string.

    Loads the tokenizer only where nobody has cut it before. Raises `PromptError` for what is no number of tokens.
    """
    if not isinstance(num_tokens, int) or num_tokens < 1:
        raise PromptError(f"split={num_tokens!r} is not a number of tokens", hint="Give an int of 1 or more.")
    if not isinstance(string, str) or not string:
        Text(string)  # says what is wrong
        return [string]
    _, tokenizer_id = source.ids
    key = hashlib.sha256(_CUTS + tokenizer_id + num_tokens.to_bytes(8, "big") + utf8(string)).digest()
    known = notes.recall(lambda catalog: catalog.cuts(key))
    if known is None:
        known = CutsRecord(key, tuple(source.tokenizer.cuts(string, num_tokens)))
        notes.save(known)
    return [string[first:last] for first, last in pairwise((0, *known.offsets, len(string)))]
