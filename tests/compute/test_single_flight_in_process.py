"""Single flight within one process: what threads share, what a failed call frees, and how long a claim lasts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import backprompt_db as bp
from backprompt_db.compute.inference.forward import PassResult
from backprompt_db.compute.inference.runner import ModelRunner
from backprompt_db.compute.plan import Pack
from backprompt_db.database.database import Database
from backprompt_db.database.single_flight import SingleFlight
from backprompt_db.errors import StoreError
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from tests.support.databases import BROKEN, FaultyStore
from tests.support.single_flight import (
    CONTEXT,
    LOCK,
    LONG,
    Logprobs,
    addresses_of,
    assert_right,
    in_thread,
    is_free,
    num_descriptors,
    prompts_of,
    take,
    until,
)


def test_a_computation_that_fails_is_nobody_elses_problem(
    lm: bp.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = bp.Text(CONTEXT) + "x"
    lm("Something else.")
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "compute", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lm(text)
    assert lm.db.directory is not None
    assert all(is_free(lm.db.directory / LOCK, each) for each in addresses_of(lm, text))
    until(lambda: num_descriptors() == 0)
    assert lm(text).num_computed_tokens == 201


def test_what_a_failed_call_had_not_computed_is_free_before_the_rest_is_written(
    tmp_path: Path, make_lm: Callable[..., bp.LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FaultyStore()
    db = Database(store, directory=None, single_flight=SingleFlight(tmp_path / LOCK))
    lm = make_lm(db=db, deterministic=True)  # a pass for each segment
    store.may_write.clear()
    text = bp.Text("a") + "b"
    compute = ModelRunner.compute

    def fail_at_second(runner: ModelRunner, pack: Pack, **arguments: Any) -> PassResult:
        if pack.segments[0].string == "b":
            raise KeyboardInterrupt
        return compute(runner, pack, **arguments)

    monkeypatch.setattr(ModelRunner, "compute", fail_at_second)
    with pytest.raises(KeyboardInterrupt):
        lm(text)
    assert [is_free(tmp_path / LOCK, each) for each in addresses_of(lm, text)] == [False, True]
    store.may_write.set()
    db.close()
    assert is_free(tmp_path / LOCK, addresses_of(lm, text)[0])


@pytest.mark.parametrize("error", [None, BROKEN], ids=["written", "given up"])
def test_what_is_computed_is_claimed_until_it_is_written_or_given_up(
    tmp_path: Path, make_lm: Callable[..., bp.LanguageModel], error: StoreError | None
) -> None:
    store = FaultyStore()
    db = Database(store, directory=None, single_flight=SingleFlight(tmp_path / LOCK))
    lm = make_lm(db=db)
    store.may_write.clear()
    lm(bp.Text("a") + "b")
    here = addresses_of(lm, bp.Text("a") + "b")
    assert not any(is_free(tmp_path / LOCK, each) for each in here)
    store.error = error
    store.may_write.set()
    with pytest.raises(StoreError) if error else nullcontext():
        db.flush()
    until(lambda: all(is_free(tmp_path / LOCK, each) for each in here))
    store.error = None
    db.close()


def test_threads_with_one_database_compute_what_they_share_once(
    gpt2: Any, make_lm: Callable[..., bp.LanguageModel], db: Database
) -> None:
    make_lm(db=db)("Something else.")
    before = db.counters.num_computed_tokens
    barrier = threading.Barrier(4)
    models = [make_lm(db=db) for _ in range(4)]
    texts = prompts_of(["x", "x", "y", "z"])

    def work(lm: bp.LanguageModel, text: bp.Text) -> Logprobs:
        barrier.wait(LONG)
        return lm(text).token_logprobs.numpy()

    threads = [in_thread(partial(work, lm, text)) for lm, text in zip(models, texts, strict=True)]
    for (thread, results), text in zip(threads, texts, strict=True):
        thread.join(LONG)
        assert_right(gpt2, models[0].tokenizer, text, results[0])
    assert db.counters.num_computed_tokens - before == 203


def test_what_nobody_else_computes_is_not_held_up(lm: bp.LanguageModel) -> None:
    assert lm.db.directory is not None
    lm("Something else.")
    context = bp.Text("Pick one.\n")
    busy, free = context + "The quick brown fox", context + "jumps over"
    (busy_address,) = addresses_of(lm, busy)[1:]
    holder = take(lm.db.directory / LOCK, [busy_address])
    thread, results = in_thread(lambda: lm([busy + " and more", free], keep="all"))
    until(lambda: all(lm.db.has(Key(each, Part.KV)) for each in addresses_of(lm, free)))
    until(lambda: lm.db.counters.num_waits == 1)
    assert not lm.db.has(Key(busy_address, Part.KV))
    assert is_free(lm.db.directory / LOCK, addresses_of(lm, busy + " and more")[-1])  # who waits holds nothing
    holder.close()
    thread.join(LONG)
    assert lm.db.counters.num_waits == 1
    for text, result in zip([busy + " and more", free], results[0], strict=True):
        assert_right(lm.model, lm.tokenizer, text, result.token_logprobs.numpy())
