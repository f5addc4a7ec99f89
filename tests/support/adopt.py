"""Caches as a user computes them, and what adopting them must refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import backprompt_db as bp
from backprompt_db.compute.inference.kv_cache import CACHE_KEYWORD
from backprompt_db.errors import BackpromptError

MakeLM = Callable[..., bp.LanguageModel]

TOLERANCE = 1e-4
PIECES = [
    "Pick the endpoint for the request.\nGET /users lists users. POST /orders creates an order.\n",
    "Request: show me everyone who signed up this week",
    "\nEndpoint:",
]
CHECKS: list[Any] = ["sample", "full"]


def chain(lm: bp.LanguageModel, pieces: Sequence[str] = PIECES) -> bp.Text:
    return sum(map(lm.text, pieces), start=lm.text(""))


def ids_of(tokenizer: Any, pieces: Sequence[str] = PIECES) -> torch.Tensor:
    return torch.tensor([[token for piece in pieces for token in tokenizer(piece)["input_ids"]]])


def plain(model: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
    """What a user does: one pass over a prompt's tokens that fills a cache."""
    with torch.no_grad():
        return model(input_ids, use_cache=True, **{CACHE_KEYWORD: DynamicCache(), **inputs})


def tensors(cache: Any) -> torch.Tensor:
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])


def num_stored(db: bp.Database) -> int:
    db.flush()
    return db.counters.num_stored


def assert_refused(
    lm: bp.LanguageModel, text: bp.Text, cache: Any, *, error: type[BackpromptError], match: str, **told: Any
) -> None:
    for check in CHECKS:
        with pytest.raises(error, match=match):
            lm.adopt(text, cache, check=check, **told)
    assert num_stored(lm.db) == 0
