"""Processes and threads that miss the same segments at once, and claims made as another process would."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

import backprompt_db as bp
from backprompt_db.database.single_flight import Claims, SingleFlight
from backprompt_db.prompt.ids import Address, address
from tests.conftest import plain_logprobs

LONG = 30.0
LOCK = "flights.lock"
CONTEXT = "0123456789" * 20
"""200 tokens: the tokenizer never saw a digit beside another."""
ENDINGS = ["show me everyone", "create an order", "the lazy dog", "the quick brown fox", "x", "yy", "zzz", "GET /users"]
FORK: Any = multiprocessing.get_context("fork")

Logprobs = npt.NDArray[np.float32]
"""Arrays, because tensors are not sent through a pipe but shared."""


class Answer(NamedTuple):
    """What a process has to tell of its prompts."""

    logprobs: list[Logprobs]
    num_computed_tokens: int
    num_waits: int


class Child:
    """A process that does one thing and tells what came of it."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=lambda: theirs.send(work()))
        self.process.start()
        theirs.close()

    def result(self) -> Any:
        assert self._pipe.poll(LONG), "the child hangs"
        answer = self._pipe.recv()
        self.process.join(LONG)
        return answer

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


def prompts_of(endings: Sequence[str]) -> list[bp.Text]:
    return [bp.Text(CONTEXT) + ending for ending in endings]


def addresses_of(lm: bp.LanguageModel, text: bp.Text) -> list[Address]:
    return [address(segment.id, lm.weights_id, lm.tokenizer_id) for segment in text.segments()]


def take(path: Path, addresses: Sequence[Address]) -> Claims:
    """Claim something as another process would."""
    claims = SingleFlight(path).claims()
    assert all(claims.take(each) for each in addresses)
    return claims


def is_free(path: Path, one: Address) -> bool:
    with closing(SingleFlight(path).claims()) as claims:
        is_taken = claims.take(one)
        claims.give_back([one])
    return is_taken


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def hold(place: Path, text: bp.Text, begin: Any, gpt2: Any, tokenizer: Any) -> None:
    """Let a process begin and wait until it has claimed a text's segments."""
    begin.set()
    here = addresses_of(bp.LanguageModel(gpt2, tokenizer), text)
    until(lambda: not any(is_free(place / LOCK, each) for each in here))


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


def assert_right(gpt2: Any, tokenizer: Any, text: bp.Text, logprobs: Logprobs) -> None:
    ids = [token for segment in text.segments() for token in tokenizer(segment.string)["input_ids"]]
    assert np.allclose(logprobs[1:], plain_logprobs(gpt2, torch.tensor(ids))[0][1:], atol=1e-3)


def num_descriptors() -> int:
    """How many this process has of lock files."""
    return sum(link.is_symlink() and str(link.readlink()).endswith(LOCK) for link in Path("/proc/self/fd").iterdir())
