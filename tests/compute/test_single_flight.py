"""Several processes, or threads, that miss the same segments at once: each segment is computed by one of them."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backprompt_db as bp
from backprompt_db.database.database import Database
from backprompt_db.database.single_flight import PATIENCE, SWITCH, Claims, SingleFlight
from tests.conftest import tiny_gpt2
from tests.support.databases import FaultyStore
from tests.support.operations import back_door
from tests.support.single_flight import (
    CONTEXT,
    ENDINGS,
    FORK,
    LOCK,
    LONG,
    Answer,
    Child,
    Logprobs,
    addresses_of,
    assert_right,
    hold,
    in_thread,
    is_free,
    num_descriptors,
    prompts_of,
    take,
    until,
)

assert sys.platform != "win32"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def start() -> Iterator[Callable[[Callable[[], object]], Child]]:
    """Start children that end with the test."""
    children: list[Child] = []

    def one(work: Callable[[], object]) -> Child:
        children.append(Child(work))
        return children[-1]

    yield one
    for child in children:
        child.process.kill()
        child.process.join()


@pytest.fixture
def place(tmp_path: Path, gpt2: Any, tokenizer: Any) -> Path:
    """A database in which the model is proven, and nothing of the prompts is stored."""
    with bp.open(tmp_path / "db") as db:
        bp.LanguageModel(gpt2, tokenizer, db=db)("Something else.")
    return tmp_path / "db"


@pytest.fixture
def run(place: Path, gpt2: Any, tokenizer: Any) -> Callable[..., Answer]:
    """Run prompts, one after the other, as one process does that opens the database and closes it."""

    def answer(prompts: Sequence[Any], **options: Any) -> Answer:
        with bp.open(place, **options) as db:
            lm = bp.LanguageModel(gpt2, tokenizer, db=db, progress=False)
            logprobs = [lm(prompt).token_logprobs.numpy() for prompt in prompts]
            return Answer(logprobs, lm.counters.num_computed_tokens, db.counters.num_waits)

    return answer


@pytest.mark.parametrize("pace", ["at once", "while nobody can commit"])
def test_eight_processes_compute_a_shared_prefix_once(
    place: Path, run: Any, start: Any, gpt2: Any, tokenizer: Any, pace: str
) -> None:
    is_slow = pace == "while nobody can commit"
    barrier = FORK.Barrier(9)
    children = [start(lambda text=text: (barrier.wait(LONG), run([text]))[1]) for text in prompts_of(ENDINGS)]
    if is_slow:
        with back_door(place):  # holds the lock of all who write
            barrier.wait(LONG)
            time.sleep(0.5)
    else:
        barrier.wait(LONG)
    answers = [child.result() for child in children]
    shutil.rmtree(place)
    alone = run(prompts_of(ENDINGS))
    total = sum(answer.num_computed_tokens for answer in answers)
    assert alone.num_computed_tokens > 200 + len(ENDINGS)
    assert total <= 1.1 * alone.num_computed_tokens
    if is_slow:
        assert sorted(answer.num_waits for answer in answers)[:2] == [0, 1]
        assert total == alone.num_computed_tokens
    for answer, text in zip(answers, prompts_of(ENDINGS), strict=True):
        assert_right(gpt2, tokenizer, text, answer.logprobs[0])


def test_the_results_are_the_same_without_single_flight(
    place: Path, run: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = run(prompts_of(ENDINGS[:3]))
    for option in ("argument", "environment"):
        shutil.rmtree(place)
        if option == "environment":
            monkeypatch.setenv(SWITCH, "0")
        others = run(prompts_of(ENDINGS[:3]), single_flight=option == "environment")
        assert all(np.array_equal(a[1:], b[1:]) for a, b in zip(here.logprobs, others.logprobs, strict=True))
        assert (others.num_computed_tokens, others.num_waits) == (here.num_computed_tokens, 0)
        assert not (place / LOCK).exists()


def test_a_hit_does_not_touch_the_lock_file(place: Path, run: Any) -> None:
    run(prompts_of(ENDINGS[:2]))
    (place / LOCK).unlink()
    assert run(prompts_of(ENDINGS[:2])).num_computed_tokens == 0
    assert not (place / LOCK).exists()


def test_who_waits_for_a_killed_process_goes_on_at_once(
    place: Path, run: Any, start: Any, gpt2: Any, tokenizer: Any
) -> None:
    text = bp.Text(CONTEXT) + "x"
    holds, waits = FORK.Event(), FORK.Event()
    holder = start(lambda: (holds.wait(LONG), run([text])))
    waiter = start(lambda: (waits.wait(LONG), run([text]))[1])
    with back_door(place):  # the holder's writer cannot commit
        hold(place, text, holds, gpt2, tokenizer)
        waits.set()
        time.sleep(0.3)
        holder.signal(signal.SIGKILL)
    answer = waiter.result()
    assert (answer.num_computed_tokens, answer.num_waits) == (201, 1)
    assert run([text]).num_computed_tokens == 0


def test_who_waits_for_a_stopped_process_computes_after_a_while(
    place: Path, run: Any, start: Any, gpt2: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PATIENCE, "0.2")
    text = bp.Text(CONTEXT) + "x"
    holds, waits = FORK.Event(), FORK.Event()
    holder = start(lambda: (holds.wait(LONG), run([text]))[1])
    waiter = start(lambda: (waits.wait(LONG), run([text]))[1])
    with back_door(place):
        hold(place, text, holds, gpt2, tokenizer)
        holder.signal(signal.SIGSTOP)
    waits.set()
    answer = waiter.result()
    assert (answer.num_computed_tokens, answer.num_waits) == (201, 1)
    holder.signal(signal.SIGCONT)
    assert np.array_equal(holder.result().logprobs[0][1:], answer.logprobs[0][1:])


def test_waiting_in_vain_is_said(
    place: Path, run: Any, gpt2: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = bp.Text(CONTEXT) + "x"
    holder = take(place / LOCK, addresses_of(bp.LanguageModel(gpt2, tokenizer), text))
    monkeypatch.setenv(PATIENCE, "0.05")
    assert run([text])[1:] == (201, 1)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "computing 2 segments for 0.05 s" in caplog.text
    holder.close()


def test_a_child_that_is_forked_meanwhile_changes_nothing(
    tmp_path: Path, make_lm: Callable[..., bp.LanguageModel], start: Any
) -> None:
    store = FaultyStore()
    db = Database(store, directory=None, single_flight=SingleFlight(tmp_path / LOCK))
    lm = make_lm(db=db)
    store.may_write.clear()
    text = bp.Text("a") + "b"
    here = lm(text)

    def work() -> tuple[Logprobs, int]:
        db.single_flight.patience_seconds = 0.1
        logprobs = lm(text).token_logprobs.numpy()
        store.may_write.set()  # its own, for which the end of this process waits
        return logprobs, db.counters.num_waits

    logprobs, num_waits = start(work).result()
    assert np.array_equal(logprobs[1:], here.token_logprobs.numpy()[1:])
    assert num_waits == 1
    assert not any(is_free(tmp_path / LOCK, each) for each in addresses_of(lm, text))
    store.may_write.set()
    db.flush()
    until(lambda: all(is_free(tmp_path / LOCK, each) for each in addresses_of(lm, text)))
    db.close()


def test_parts_that_the_other_has_not_kept_are_computed(
    place: Path, run: Any, gpt2: Any, tokenizer: Any, make_lm: Callable[..., bp.LanguageModel]
) -> None:
    text = bp.Text("Pick one.\n") + "jumps over"
    run(["Pick one.\n"])
    with bp.open(place, single_flight=False) as other, bp.open(place) as db:
        lm = make_lm(db=db)
        holder = take(place / LOCK, addresses_of(lm, text)[1:])
        thread, results = in_thread(lambda: lm.past_key_values(text.on(lm)))
        until(lambda: db.counters.num_waits == 1)
        make_lm(db=other).score("Pick one.\n", ["jumps over"])  # keeps scores alone
        other.flush()
        holder.close()
        thread.join(LONG)
        num_tokens = len(tokenizer("jumps over")["input_ids"])
        assert (lm.counters.num_computed_tokens, lm.counters.num_cached_tokens) == (
            num_tokens,
            len(tokenizer("Pick one.\n")["input_ids"]),
        )
        assert results[0].get_seq_length() == lm(text).input_ids.numel()


class LateSingleFlight(SingleFlight):
    """Single flight of a call in which others finish between its first look at the database and its claims."""

    def __init__(self, path: Path, meanwhile: Callable[[], object]) -> None:
        super().__init__(path)
        self._meanwhile = meanwhile

    def claims(self) -> Claims:
        self._meanwhile()
        return super().claims()


def test_what_was_stored_between_planning_and_claiming_is_found(
    place: Path, run: Any, make_lm: Callable[..., bp.LanguageModel]
) -> None:
    text = bp.Text(CONTEXT) + "x" + "y"
    with bp.open(place) as db:
        db.single_flight = LateSingleFlight(place / LOCK, lambda: run([bp.Text(CONTEXT) + "x"], single_flight=False))
        lm = make_lm(db=db)
        lm(text)
        assert lm.counters.num_computed_tokens == 1
        assert db.counters.num_waits == 0


def test_models_of_different_weights_do_not_wait_for_each_other(place: Path, run: Any, tokenizer: Any) -> None:
    text = bp.Text(CONTEXT) + "x"
    holder = take(place / LOCK, addresses_of(bp.LanguageModel(tiny_gpt2(seed=1), tokenizer), text))
    assert run([text])[1:] == (201, 0)
    holder.close()


def test_no_descriptors_are_left(place: Path, gpt2: Any, tokenizer: Any) -> None:
    with bp.open(place) as db:
        lm = bp.LanguageModel(gpt2, tokenizer, db=db)
        for number in range(20):
            lm(bp.Text("Pick one.\n") + str(number))
        db.flush()
        until(lambda: num_descriptors() == 0)


def test_who_may_only_read_waits_for_nobody(gpt2: Any, tokenizer: Any, start: Any) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    with bp.open(place / "db") as db:
        lm = bp.LanguageModel(gpt2, tokenizer, db=db)
        lm("Something else.")
        text = bp.Text(CONTEXT) + "x"
        here = addresses_of(lm, text)
    for path in [place, *place.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    holder = take(place / "db" / LOCK, here)

    def work() -> tuple[bool, int, int]:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with bp.open(place / "db") as db:
            lm = bp.LanguageModel(gpt2, tokenizer, db=db)
            lm(text)
            return db.readonly, lm.counters.num_computed_tokens, db.counters.num_waits

    assert start(work).result() == (True, 201, 0)
    holder.close()
    shutil.rmtree(place)


def test_processes_with_overlapping_prompts_neither_block_each_other_nor_compute_twice(
    place: Path, run: Any, start: Any, gpt2: Any, tokenizer: Any
) -> None:
    """Branches, batches and chains of a few strings, in any order: what could wait in a circle would."""
    pieces = [" The quick", " brown fox", " jumps over", " the lazy dog"]

    def prompts(seed: int) -> list[bp.Text]:
        dice = random.Random(seed)
        texts = [bp.Text(dice.choice(pieces)) + dice.choice(pieces) + dice.choice(pieces) for _ in range(6)]
        some = dice.sample(pieces, 2)
        return [*texts, bp.Text(dice.choice(pieces)) + bp.parallel(*some) + dice.choice(pieces)]

    def work(seed: int) -> tuple[int, list[Logprobs]]:
        with bp.open(place) as db:
            lm = bp.LanguageModel(gpt2, tokenizer, db=db, deterministic=seed % 2 == 0, progress=False)
            barrier.wait(LONG)
            texts = prompts(seed)
            results = [*lm(texts[:3]), *map(lm, texts[3:5]), *lm(texts[5:])]
            return lm.counters.num_computed_tokens, [result.token_logprobs.numpy() for result in results]

    barrier = FORK.Barrier(6)
    children = [start(lambda seed=seed: work(seed)) for seed in range(6)]
    answers = [child.result() for child in children]
    segments = {segment for seed in range(6) for text in prompts(seed) for segment in text.segments()}
    assert sum(num for num, _ in answers) == sum(len(tokenizer(each.string)["input_ids"]) for each in segments)
    for seed, (_, results) in enumerate(answers):
        for text, logprobs in zip(prompts(seed)[:6], results, strict=False):  # the last has branches
            assert_right(gpt2, tokenizer, text, logprobs)
