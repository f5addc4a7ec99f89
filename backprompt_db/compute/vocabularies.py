"""Tokens as strings for whoever shows a result: out of the catalog, else out of the tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from backprompt_db.database.vocabulary import open_vocabulary, vocabulary_of
from backprompt_db.errors import CatalogError, ModelMismatch

if TYPE_CHECKING:
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.database.database import Database
    from backprompt_db.prompt.ids import TokenizerId
    from backprompt_db.views.scene import Vocabulary

logger = logging.getLogger(__name__)

_MAX_REMEMBERED = 4

_remembered: dict[TokenizerId, Vocabulary] = {}
"""Opening one takes a fifth of a second, and a notebook shows result after result."""


def vocabulary(db: Database, source: ModelSource, tokenizer_id: TokenizerId) -> Vocabulary:
    """Return the tokens of a tokenizer; loads it where the catalog does not know them, and never the model.

    Raises `ModelMismatch` where it is loaded, and is another one.
    """
    if tokenizer_id not in _remembered:
        found = _recorded(db, tokenizer_id) or _loaded(source, tokenizer_id)
        if len(_remembered) >= _MAX_REMEMBERED:
            _remembered.clear()
        _remembered[tokenizer_id] = found
    return _remembered[tokenizer_id]


def _recorded(db: Database, tokenizer_id: TokenizerId) -> Vocabulary | None:
    try:
        return None if db.catalog is None else open_vocabulary(db.catalog, tokenizer_id)
    except CatalogError as error:
        logger.info("the catalog cannot be read: %s", error)
        return None


def _loaded(source: ModelSource, tokenizer_id: TokenizerId) -> Vocabulary:
    tokenizer = source.tokenizer
    if tokenizer.id != tokenizer_id:
        raise ModelMismatch("the tokenizer has changed since this was computed", hint="Run the text again.")
    found = vocabulary_of(tokenizer.definition()) if tokenizer.is_fast else None
    return found or _Names(tokenizer.tokenizer)


class _Names:
    """The tokens of a tokenizer that cannot tell where they lie in a text: each by what it decodes to, alone."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def pieces(self, _: str, ids: Sequence[int]) -> list[str]:
        return [self.token(each) for each in ids]

    def token(self, token_id: int) -> str:
        # Models may predict ids that no token has, to fill their last matrix up.
        return str(self._tokenizer.decode([token_id])) if token_id < len(self._tokenizer) else ""
