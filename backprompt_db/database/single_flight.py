"""Single flight: of several processes that miss the same representation at once, one computes it and the others wait.

A lock of the kernel says that a representation is being computed: a byte of one lock file for each address. It is gone
with the process that held it. Only time depends on these locks: a process that cannot use them, or has waited for long
enough, computes for itself, and the store keeps what comes first.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from backprompt_db.prompt.ids import Address
from backprompt_db.system.holders import is_held_by_stopped
from backprompt_db.system.locks import NOTICE_SECONDS, ByteLocks
from backprompt_db.system.platform import register_at_fork

logger = logging.getLogger(__name__)

SWITCH = "BACKPROMPT_DB_SINGLE_FLIGHT"
"""The environment variable that turns waiting off when it is 0."""

PATIENCE = "BACKPROMPT_DB_FLIGHT_SECONDS"
"""The environment variable that says how long to wait without progress."""

_PATIENCE_SECONDS = 60.0

_FIRST_PAUSE_SECONDS = 0.001
_LONGEST_PAUSE_SECONDS = 0.05

_MAX_WATCHED = 16
"""How many of the addresses that are waited for are looked at in turn; one that is free is enough."""

_MAX_LOCKS = 2048
"""With more than this to be written, nothing is claimed: for each byte the kernel looks through all locked ones."""

_MAX_OPEN_FILES = 64
"""Each call whose parts are not written yet has a descriptor, and a process may not have many."""


class SingleFlight:
    """What all processes that use one database are computing. Without a `path`, nobody waits for anybody.

    The lock file is made with the permissions `mode` when the first of them begins.
    """

    def __init__(self, path: Path | None, *, mode: int = 0o600) -> None:
        self.patience_seconds = _patience_seconds()
        self._path = None if os.environ.get(SWITCH) == "0" else path
        self._mode = mode
        self._has_failed = False
        self._open: weakref.WeakSet[Claims] = weakref.WeakSet()
        self._queued: set[Address] = set()
        """What this process has computed and not written yet: it must not wait for itself."""
        _instances.add(self)

    def claims(self) -> Claims:
        """Return the claims of one call, which closes them at its end."""
        return Claims(self)

    def _open_locks(self) -> ByteLocks | None:
        if self._path is None or len(self._open) >= _MAX_OPEN_FILES:
            return None
        try:
            return ByteLocks(self._path, mode=self._mode)
        except (OSError, NotImplementedError) as error:
            self._report(error)
            return None

    def _report(self, error: Exception) -> None:
        if not self._has_failed:
            logger.warning("computing without regard to what other processes compute: %s", error)
        self._has_failed = True

    def _after_fork_in_child(self) -> None:
        for claims in list(self._open):
            claims._forget()
        self._open = weakref.WeakSet()
        self._queued.clear()


class Claims:
    """The addresses that one call computes: while it holds one, no other call in any process can take it."""

    def __init__(self, single_flight: SingleFlight) -> None:
        self._single_flight = single_flight
        self._locks: ByteLocks | None = None
        self._is_alone = False
        self._num_users = 1
        self._mutex = threading.Lock()

    def take(self, address: Address) -> bool:
        """Claim a representation; False where another call is computing it."""
        queued = self._single_flight._queued
        if self._is_alone or address in queued or len(queued) >= _MAX_LOCKS:
            return True
        if self._locks is None and not self._open():
            return True
        assert self._locks is not None  # noqa: S101 - it was opened
        try:
            return self._locks.try_lock(_offset(address))
        except OSError as error:  # such as too many locks
            self._single_flight._report(error)
            self.go_alone()
            return True

    def give_back(self, addresses: Iterable[Address]) -> None:
        """Let others take these."""
        if self._locks is not None:
            for address in addresses:
                with suppress(OSError):
                    self._locks.unlock(_offset(address))

    def promise(self, addresses: Sequence[Address]) -> Callable[[], None]:
        """Keep these, even after `close`, until the returned function is called, when they are written or given up.

        Nobody else can find them before that.
        """
        if self._locks is None:
            return _nothing
        with self._mutex:
            self._num_users += 1
        self._single_flight._queued.update(addresses)
        return partial(self._fulfil, addresses)

    def wait_for_any(self, addresses: Sequence[Address], *, seconds: float) -> bool:
        """Wait until one of the addresses is free, which is not taken; False when after `seconds` none is.

        It may have been computed and written, or its holder has failed, or died. False also when all holders are
        stopped, as far as this user may know.
        """
        watched = addresses[:: 1 + (len(addresses) - 1) // _MAX_WATCHED]
        deadline = time.monotonic() + seconds
        look_at = time.monotonic() + NOTICE_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        while not any(map(self._is_free, watched)):
            now = time.monotonic()
            seconds_left = deadline - now
            if seconds_left <= 0 or (now >= look_at and all(map(self._is_held_by_stopped, watched))):
                return False
            look_at = look_at if now < look_at else now + NOTICE_SECONDS
            time.sleep(min(pause, seconds_left))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        return True

    def go_alone(self) -> None:
        """From now on take everything, whoever else may be computing it."""
        self._is_alone = True

    def close(self) -> None:
        """Give back all that is not promised; to be called once."""
        with self._mutex:
            self._num_users -= 1
            is_last = not self._num_users
        if is_last and self._locks is not None:
            self._single_flight._open.discard(self)
            self._locks.close()

    def _open(self) -> bool:
        self._locks = self._single_flight._open_locks()
        self._is_alone = self._locks is None
        if not self._is_alone:
            self._single_flight._open.add(self)
        return not self._is_alone

    def _is_free(self, address: Address) -> bool:
        is_free = self.take(address)
        if is_free:
            self.give_back([address])
        return is_free

    def _is_held_by_stopped(self, address: Address) -> bool:
        path = self._single_flight._path
        return path is not None and is_held_by_stopped(path, _offset(address))

    def _fulfil(self, addresses: Sequence[Address]) -> None:
        self._single_flight._queued.difference_update(addresses)
        self.give_back(addresses)
        self.close()

    def _forget(self) -> None:
        """Hold nothing any more, and give nothing back: the parent of this process still holds it."""
        self._locks = None
        self._is_alone = True
        self._mutex = threading.Lock()


def _nothing() -> None:
    """Do nothing: the addresses that were written had not been claimed."""


def _offset(address: Address) -> int:
    """Return the byte that stands for an address; with 2^62 of them, no two addresses meet."""
    return int.from_bytes(address[:8], "big") >> 2


def _patience_seconds() -> float:
    setting = os.environ.get(PATIENCE, "")
    try:
        return float(setting) if setting else _PATIENCE_SECONDS
    except ValueError:
        logger.warning("%s=%r is not a number of seconds: taking %g", PATIENCE, setting, _PATIENCE_SECONDS)
        return _PATIENCE_SECONDS


_instances: weakref.WeakSet[SingleFlight] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for single_flight in list(_instances):
        single_flight._after_fork_in_child()


register_at_fork(after_in_child=_after_fork_in_child)
