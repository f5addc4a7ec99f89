"""Interrupts at any moment of a read or a write cost that call, and never hang the calls after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import cases
from tests.support.faults import run

INTERRUPTED = """
import random
armed = False

def interrupt(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
db = bp.open(place, memory_nbytes=0)
db.put([new_part("old", num_values=300)])
db.flush()
num_interrupts, rng = 0, random.Random(0)
while num_interrupts < ENOUGH:
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0002, 0.003))
        while True:
            ACT
    except KeyboardInterrupt:
        num_interrupts += 1

def use():
    db.put([new_part("new")])
    db.flush()
    assert values(db.fetch(wanted("old"))) == expected("old", num_values=300)
    db.close()
    print("closed")

after = threading.Thread(target=use, daemon=True)  # which is what hangs when the main thread has kept a lock
after.start()
after.join(20)
"""


@pytest.mark.parametrize("num_interrupts", cases([120, 300], by_default=[120]))
@pytest.mark.parametrize("act", ['db.fetch(wanted("old"))', 'db.put([new_part("other")])', "db.store.usage()"])
def test_whoever_is_interrupted_again_and_again_keeps_nothing_locked(
    tmp_path: Path, act: str, num_interrupts: int
) -> None:
    words, _ = run(INTERRUPTED.replace("ACT", act).replace("ENOUGH", str(num_interrupts)), tmp_path / "db")
    assert words == ["closed"]
