"""A write without effect, in a process of its own: a writer that hangs must not make who looks for it hang too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from backprompt_db.errors import StoreError, StoreLocked
from backprompt_db.store.environment import LMDB_GENERATION
from backprompt_db.store.registry import release, shared_environment

_SECONDS = 10.0
_SCRIPT = """
import lmdb, sys
from backprompt_db.store.locks import give_turn, take_turn
with lmdb.open(sys.argv[1], create=False, lib_version=int(sys.argv[2])) as environment:
    num_cleared = environment.reader_check()
    turn = take_turn(sys.argv[1])
    environment.begin(write=True).abort()
    give_turn(turn)
print(num_cleared)
"""


def probe(store: Path, *, timeout_seconds: float = _SECONDS) -> int:
    """Take the turn of a writer in a store, and return how many slots of dead readers were cleared.

    Raises `StoreLocked` when the turn does not come in time, and `StoreError` when nothing can be written.
    """
    if not (store / "lock.mdb").exists():  # which LMDB would make with whatever permissions the umask leaves
        release(shared_environment(store, readonly=False))
    command = [sys.executable, "-c", _SCRIPT, str(store), str(LMDB_GENERATION)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        raise StoreLocked(
            f"somebody has been writing to {store} for {timeout_seconds:g} s or longer",
            hint="Look for a process that is stopped or hangs, and end it: what it was writing is undone.",
        ) from None
    if done.returncode:
        lines = done.stderr.splitlines() or ["it was killed"]
        raise StoreError(f"nothing can be written to {store}: {lines[-1]}", hint="Mend what the message says.")
    return int(done.stdout)
