"""The vocabulary of a tokenizer, from the catalog: token ids as strings, without the tokenizer's files or a model.

A definition is named by its own digest, the tokenizer id, so a forged or damaged one is found out without a secret. It
serves to show and to count tokens; no prompt that is run is tokenised with it.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from backprompt_db.prompt.ids import TokenizerId, tokenizer_id

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from backprompt_db.catalog.catalog import Catalog


MAX_NBYTES = 1 << 27
"""Longer definitions are neither kept nor read. The longest known, of 256,000 tokens, have a third of this size."""

_UNKNOWN_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_ANCHOR = "a"


def packed(definition: str) -> bytes:
    """Return a definition as the catalog keeps it; nothing for one that is too long."""
    raw = definition.encode()
    return zlib.compress(raw) if len(raw) <= MAX_NBYTES else b""


def open_vocabulary(catalog: Catalog, tokenizer_id: TokenizerId) -> Vocabulary | None:
    """Return the tokens of a tokenizer; `None` where the catalog does not know them, or not these.

    Raises `CatalogError` when the catalog cannot be read.
    """
    facts = _recorded_facts(catalog, tokenizer_id)
    return None if facts is None else _vocabulary(facts)


def open_tokenizer(catalog: Catalog, tokenizer_id: TokenizerId) -> Tokenizer | None:
    """Return the tokenizer itself, with what it puts before a prompt; `None` and errors as for `open_vocabulary`."""
    facts = _recorded_facts(catalog, tokenizer_id)
    return None if facts is None else _tokenizer(facts, facts["tokenizer"])


def vocabulary_of(definition: str) -> Vocabulary | None:
    """Return the tokens of the tokenizer that a whole definition describes; `None` where it cannot be made."""
    return _vocabulary(json.loads(definition))


def _recorded_facts(catalog: Catalog, tokenizer_id: TokenizerId) -> Mapping[str, Any] | None:
    kept = catalog.definition(tokenizer_id)
    return _facts(kept, tokenizer_id) if kept else None


def _facts(kept: bytes, expected: TokenizerId) -> Mapping[str, Any] | None:
    unpacking = zlib.decompressobj()
    try:
        definition = unpacking.decompress(kept, MAX_NBYTES).decode()
    except (zlib.error, UnicodeDecodeError):
        return None
    return json.loads(definition) if unpacking.eof and tokenizer_id(definition) == expected else None


def _vocabulary(facts: Mapping[str, Any]) -> Vocabulary | None:
    # What it does after tokenising, adding start tokens and trimming offsets, would only be in the way.
    tokenizer = _tokenizer(facts, {**facts["tokenizer"], "post_processor": None})
    return None if tokenizer is None else Vocabulary(tokenizer, facts["start_ids"])


def _tokenizer(facts: Mapping[str, Any], serialised: Mapping[str, Any]) -> Tokenizer | None:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(json.dumps(serialised))
    except Exception:  # noqa: BLE001 - the library's only class, for a definition that another version wrote
        return None
    tokenizer.encode_special_tokens = facts["split_special_tokens"]
    return tokenizer


class Vocabulary:
    """The tokens of one tokenizer, as strings."""

    def __init__(self, tokenizer: Tokenizer, start_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._start_ids = list(start_ids)
        self._added = {number: str(token.content) for number, token in tokenizer.get_added_tokens_decoder().items()}
        self._anchor = tokenizer.encode(_ANCHOR, add_special_tokens=False).ids

    def pieces(self, text: str, ids: Sequence[int]) -> list[str]:
        """Return one string for each token of `text`.

        Where `ids` are the text's own tokens, the strings are slices of the text, which join to it; of tokens that
        share a character the first one has it, and the others are empty. Start tokens have their names. Ids that the
        tokenizer would not give this text are turned into strings one by one.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids, start = list(ids), len(self._start_ids)
        if ids == encoding.ids:
            return _slices(text, encoding)
        if ids == self._start_ids + encoding.ids:
            return [*map(self.token, ids[:start]), *_slices(text, encoding)]
        return [self.token(each) for each in ids]

    def token(self, token_id: int) -> str:
        """Return what a token adds to a text. Special tokens have names, and so have parts of characters.

        One that is not in the vocabulary is `""`.
        """
        if token_id in self._added:
            return self._added[token_id]
        name = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if name is None:
            return ""
        added = self._decoded_after_another(token_id)
        return str(name) if not added or _UNKNOWN_CHARACTER in added else added

    def _decoded_after_another(self, token_id: int) -> str:
        # Alone, or at the beginning, decoders take away the space that many tokens begin with.
        before, both = (self._tokenizer.decode(ids) for ids in (self._anchor, [*self._anchor, token_id]))
        return str(both[len(before) :]) if both.startswith(before) else str(self._tokenizer.decode([token_id]))


def _slices(text: str, encoding: Encoding) -> list[str]:
    """Cut a text where its tokens end. What lies between two tokens, such as spaces, goes to the later one."""
    ends = list(itertools.accumulate((end for _, end in encoding.offsets), max))
    if ends:
        ends[-1] = len(text)
    return [text[begin:end] for begin, end in itertools.pairwise([0, *ends])]
