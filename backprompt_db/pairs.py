"""The language model of a `(model, tokenizer)` pair, which texts may be built with."""

from __future__ import annotations

import weakref
from typing import Any

from backprompt_db.model import LanguageModel

_models_of_pairs: weakref.WeakValueDictionary[tuple[int, int], LanguageModel] = weakref.WeakValueDictionary()


def language_model_of(model: Any, tokenizer: Any) -> LanguageModel:
    """Return the `LanguageModel` of a pair of objects on the default database, the same one as long as it is in use."""
    pair = id(model), id(tokenizer)
    lm = _models_of_pairs.get(pair)
    if lm is None:
        lm = _models_of_pairs[pair] = LanguageModel(model, tokenizer)
    return lm
