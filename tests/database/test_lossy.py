"""Databases that keep keys and values less closely: what they return says so, and exact requests never see it."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import backprompt_db as bp
from backprompt_db.compute.inference.kv_cache import CACHE_KEYWORD
from backprompt_db.database.database import Database
from backprompt_db.database.memory_cache import MemoryCache
from backprompt_db.errors import FormatError
from backprompt_db.store.memory import MemoryStore
from tests.conftest import plain_logprobs
from tests.support.databases import new_part

CONTEXT = "Pick the endpoint for the request, and say nothing else.\n"
LOSSY = pytest.mark.parametrize(("fidelity", "tolerance"), [("bfloat16", 0.05), ("int8", 0.1)])


def difference(lm: bp.LanguageModel, result: bp.ModelRepr) -> float:
    logprobs, _ = plain_logprobs(lm.model, result.input_ids)
    return float((result.token_logprobs - logprobs)[1:].abs().max())


def stored(lm: bp.LanguageModel) -> bp.Text:
    """A context whose keys and values are on disk alone."""
    context = lm.text(CONTEXT)
    context()
    lm.db.flush()
    lm.db.memory.clear()
    return context


@LOSSY
def test_a_lossy_database_says_so_and_is_close(
    make_lm: Callable[..., bp.LanguageModel], open_db: Any, fidelity: str, tolerance: float
) -> None:
    lm = make_lm(db=open_db(fidelity=fidelity))
    result = (stored(lm) + "Request: list users")()
    assert result.fidelity == fidelity
    assert result.num_cached_tokens > 0
    assert 1e-5 < difference(lm, result) < tolerance  # it was read, and it was rounded


@LOSSY
def test_exact_requests_are_never_served_from_a_lossy_database(
    make_lm: Callable[..., bp.LanguageModel], open_db: Any, fidelity: str, tolerance: float
) -> None:
    db = open_db(fidelity=fidelity)
    stored(make_lm(db=db))
    exact = make_lm(db=db, exact=True)
    hits = db.counters.num_hits
    result = exact(CONTEXT + "Request: list users")
    assert result.fidelity == "exact"
    assert result.num_cached_tokens == 0
    assert difference(exact, result) < 1e-4 < tolerance
    assert db.counters.num_hits == hits
    again = exact(CONTEXT + "Request: list users")
    assert again.num_computed_tokens == 0  # kept in memory


def test_exact_requests_to_an_exact_database_are_hits(make_lm: Callable[..., bp.LanguageModel], open_db: Any) -> None:
    db = open_db()
    make_lm(db=db)(CONTEXT)
    assert make_lm(db=db, exact=True)(CONTEXT).num_computed_tokens == 0


@pytest.mark.exhaustive
def test_what_exact_requests_keep_in_memory_goes_with_the_language_model(
    make_lm: Callable[..., bp.LanguageModel], open_db: Any
) -> None:
    db = open_db(fidelity="int8")
    gc.collect()
    kinds = Database, MemoryStore, MemoryCache
    before = [each for each in gc.get_objects() if type(each) in kinds]

    def more() -> list[object]:
        gc.collect()
        return [each for each in gc.get_objects() if type(each) in kinds and each not in before]

    others = threading.enumerate()  # of databases of earlier tests

    def num_writers() -> int:
        new = (thread for thread in threading.enumerate() if thread not in others)
        return sum(thread.name.startswith("backprompt-db") for thread in new)

    db.put([new_part("a")])  # its writer stays
    for _ in range(3):
        lm = make_lm(db=db, exact=True)
        lm(CONTEXT)
        assert len(more()) == 3
        assert num_writers() == 2
        del lm
        deadline = time.monotonic() + 20
        while num_writers() > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (more(), num_writers()) == ([], 1)


@LOSSY
def test_a_cache_from_a_lossy_database_has_the_dtype_of_the_model(
    make_lm: Callable[..., bp.LanguageModel], open_db: Any, fidelity: str, tolerance: float
) -> None:
    lm = make_lm(db=open_db(fidelity=fidelity))
    context = stored(lm)
    more = torch.tensor([lm.tokenizer("Request: list users")["input_ids"]])
    with torch.no_grad():
        cached = lm.model(more, **{CACHE_KEYWORD: context().past_key_values}).logits
        whole = lm.model(torch.cat([context().input_ids[None], more], 1)).logits[:, -more.shape[1] :]
    assert cached.dtype == torch.float32
    assert (cached.log_softmax(-1) - whole.log_softmax(-1)).abs().max() < tolerance


@LOSSY
def test_it_takes_fewer_bytes(
    make_lm: Callable[..., bp.LanguageModel], open_db: Any, fidelity: str, tolerance: float
) -> None:
    sizes = {}
    for name in ("exact", fidelity):
        lm = make_lm(db=open_db(fidelity=name))
        lm(CONTEXT * 8)
        lm.db.flush()
        sizes[name] = lm.db.counters.num_stored_nbytes
    assert sizes[fidelity] < 0.75 * sizes["exact"], tolerance


def test_a_database_keeps_its_fidelity(tmp_path: Any) -> None:
    bp.open(tmp_path / "db", fidelity="int8").close()
    with bp.open(tmp_path / "db") as db:
        assert db.fidelity == "int8"
    with pytest.raises(FormatError, match="keeps keys and values int8, not exact"):
        bp.open(tmp_path / "db", fidelity="exact")
    with pytest.raises(FormatError, match="no fidelity 'float4'"):
        bp.open(tmp_path / "other", fidelity="float4")
    assert not (tmp_path / "other").exists()
