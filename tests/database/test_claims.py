"""Claims on what is being computed: exclusive, gone with their process, and never waited for in vain."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backprompt_db.database.single_flight import PATIENCE, SWITCH, SingleFlight
from backprompt_db.prompt.ids import Address

assert sys.platform != "win32"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

A, B, C = (Address(bytes([number]) * 32) for number in (1, 2, 255))
LONG = 20.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "flights.lock"


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], object]], multiprocessing.process.BaseProcess]]:
    """Start children that end with the test."""
    children: list[Any] = []

    def start(work: Callable[[], object]) -> multiprocessing.process.BaseProcess:
        child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(0 if work() else 1))
        children.append(child)
        child.start()
        return child

    yield start
    for child in children:
        child.kill()
        child.join()


def is_free(path: Path, address: Address) -> bool:
    """Whether a call that has nothing to do with any other can take an address."""
    claims = SingleFlight(path).claims()
    is_taken = claims.take(address)
    claims.close()
    return is_taken


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_one_call_has_claimed_no_other_can_take_until_it_is_given_back(path: Path) -> None:
    single_flight = SingleFlight(path)
    one, other = single_flight.claims(), single_flight.claims()
    assert one.take(A)
    assert one.take(C)
    assert one.take(A)  # it has it
    assert [other.take(address) for address in (A, B, C)] == [False, True, False]
    one.give_back([A])
    assert [other.take(address) for address in (A, B, C)] == [True, True, False]
    one.close()
    assert other.take(C)
    other.close()
    assert all(is_free(path, address) for address in (A, B, C))


def test_a_promise_outlives_the_call_until_it_is_fulfilled(path: Path) -> None:
    claims = SingleFlight(path).claims()
    assert all([claims.take(A), claims.take(B), claims.take(C)])
    first, second = claims.promise([A]), claims.promise([B])
    claims.give_back([C])
    claims.close()
    assert [is_free(path, address) for address in (A, B, C)] == [False, False, True]
    first()
    assert [is_free(path, address) for address in (A, B, C)] == [True, False, True]
    second()
    assert is_free(path, B)


def test_what_waits_to_be_written_by_this_process_is_nothing_to_wait_for(path: Path) -> None:
    single_flight = SingleFlight(path)
    one, other = single_flight.claims(), single_flight.claims()
    one.take(A)
    fulfil = one.promise([A])
    assert other.take(A)
    assert not is_free(path, A)
    fulfil()
    one.close()
    other.close()
    assert is_free(path, A)


def test_descriptors_do_not_outlive_what_they_are_for(path: Path) -> None:
    before = num_descriptors()
    single_flight = SingleFlight(path)
    for _ in range(100):
        claims = single_flight.claims()
        claims.take(A)
        fulfil = claims.promise([A])
        claims.close()
        assert num_descriptors() == before + 1
        fulfil()
    assert num_descriptors() == before


def test_a_process_claims_no_more_than_its_descriptors_allow(path: Path) -> None:
    before = num_descriptors()
    single_flight = SingleFlight(path)
    many = [single_flight.claims() for _ in range(200)]
    assert all(claims.take(Address(bytes([number]) * 32)) for number, claims in enumerate(many))
    assert num_descriptors() - before < 100
    assert many[-1].take(A)  # although another has it: it goes alone
    for claims in many:
        claims.close()
    assert num_descriptors() == before


def test_a_claim_that_nobody_makes_opens_no_file(path: Path) -> None:
    claims = SingleFlight(path).claims()
    claims.promise([A])()
    claims.close()
    assert not path.exists()


def test_who_waits_goes_on_when_one_of_many_is_given_back(path: Path) -> None:
    single_flight = SingleFlight(path)
    holder, waiter = single_flight.claims(), single_flight.claims()
    addresses = [Address(number.to_bytes(32, "little")) for number in range(1, 201)]
    assert all(holder.take(address) for address in addresses)
    timer = threading.Timer(0.1, holder.give_back, [addresses[:1]])
    timer.start()
    assert waiter.wait_for_any(addresses, seconds=LONG)
    assert waiter.take(addresses[0])  # waiting has not taken it
    assert not waiter.wait_for_any(addresses[1:], seconds=0.01)
    timer.join()
    holder.close()
    waiter.close()


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_who_waits_for_a_process_that_dies_goes_on_at_once(path: Path, fork: Any, ending: signal.Signals) -> None:
    held = multiprocessing.get_context("fork").Event()

    def hold() -> None:
        claims = SingleFlight(path).claims()
        claims.take(A)
        held.set()
        time.sleep(LONG)

    child = fork(hold)
    assert held.wait(LONG)
    claims = SingleFlight(path).claims()
    assert not claims.wait_for_any([A], seconds=0.05)
    os.kill(child.pid, ending)
    assert claims.wait_for_any([A], seconds=LONG)
    assert claims.take(A)
    claims.close()


def test_a_forked_child_neither_has_what_its_parent_claimed_nor_gives_it_back(path: Path, fork: Any) -> None:
    single_flight = SingleFlight(path)
    claims = single_flight.claims()
    claims.take(A)
    claims.take(B)
    fulfil = claims.promise([B])

    def tidy_up() -> bool:
        is_held = not any(single_flight.claims().take(address) for address in (A, B))
        claims.give_back([A])
        fulfil()
        claims.close()
        return is_held and not any(is_free(path, address) for address in (A, B))

    child = fork(tidy_up)
    child.join(LONG)
    assert child.exitcode == 0
    assert not any(is_free(path, address) for address in (A, B))
    fulfil()
    claims.close()
    assert all(is_free(path, address) for address in (A, B))


def test_a_child_whose_parent_is_in_the_middle_of_a_call_goes_on_alone(path: Path, fork: Any) -> None:
    other, claims = SingleFlight(path).claims(), SingleFlight(path).claims()
    other.take(A)
    claims.take(B)
    child = fork(lambda: claims.take(A) and claims.take(C))
    child.join(LONG)
    assert child.exitcode == 0
    assert is_free(path, C)
    other.close()
    claims.close()


@pytest.mark.parametrize("is_off_by", ["no path", "environment"])
def test_without_single_flight_everything_can_be_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_off_by: str
) -> None:
    holder = SingleFlight(path).claims()
    holder.take(A)
    if is_off_by == "environment":
        monkeypatch.setenv(SWITCH, "0")
    claims = SingleFlight(path if is_off_by == "environment" else None).claims()
    assert claims.take(A)
    claims.promise([A])()
    claims.close()
    holder.close()


def test_a_lock_file_that_cannot_be_used_is_said_once_and_done_without(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.symlink_to(path.with_name("elsewhere"))
    single_flight = SingleFlight(path)
    for _ in range(3):
        claims = single_flight.claims()
        assert claims.take(A)
        claims.promise([A])()
        claims.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "symbolic link" in caplog.text
    assert not path.with_name("elsewhere").exists()


def test_the_lock_file_has_the_permissions_that_it_was_given(path: Path) -> None:
    claims = SingleFlight(path, mode=0o660).claims()
    claims.take(A)
    claims.close()
    assert path.stat().st_mode & 0o777 == 0o660
    assert path.stat().st_size == 0


def test_the_patience_is_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert SingleFlight(None).patience_seconds == 60
    monkeypatch.setenv(PATIENCE, "0.5")
    assert SingleFlight(None).patience_seconds == 0.5
    monkeypatch.setenv(PATIENCE, "soon")
    assert SingleFlight(None).patience_seconds == 60
    assert "'soon' is not a number of seconds" in caplog.text
