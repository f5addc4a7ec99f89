"""The torture itself: it works, it finds what is wrong, and says what is needed to see it again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.prompt.representation import Array, Part
from tests.support.faults import address_of, keys_of, prompt, wanted_of
from tests.torture.report import Report
from tests.torture.values import dtype_of, empty_span, is_right_in_place, new_parts, wrong

if sys.platform != "win32":
    from tests.torture.conductor import Conductor
    from tests.torture.holders import stop_a_holder
    from tests.torture.journal import counts, problems
assert sys.platform != "win32"


def test_workers_are_hurt_and_nothing_goes_wrong(tmp_path: Path) -> None:
    with bp.open(tmp_path / "db") as db:
        assert db.catalog is not None
    conductor = Conductor(tmp_path, seed=1, is_limited=False, names=["writer0", "forker0", "clerk0"])
    conductor.run(1.0)
    assert [*conductor.problems, *problems(tmp_path / "journals")] == []
    assert counts(tmp_path / "journals")["checked"] > 0


@pytest.mark.parametrize("fidelity", Fidelity)
def test_values_of_any_dtype_are_right_in_any_fidelity_and_others_are_wrong(tmp_path: Path, fidelity: Fidelity) -> None:
    some = [segment for number in range(5) for segment in prompt(number)]
    assert {dtype_of(address_of(segment)) for segment in some} == {"F32", "F16", "BF16"}
    with bp.open(tmp_path / "db", fidelity=fidelity.value, memory_nbytes=0) as db:
        db.put(new_parts(some))
        db.flush()
        found = db.fetch(wanted_of(some))
        assert set(found) == set(keys_of(some))
        assert wrong(found, fidelity) == []
        for key in keys_of(some, [Part.KV]):
            span = empty_span(key.address)
            assert db.load(key, span, dtype_of(key.address)) is not None
            assert is_right_in_place(key, span, fidelity)
            span.keys[0, 0, 0, 0] += 1
            assert not is_right_in_place(key, span, fidelity)
    for key, arrays in found.items():
        name, array = next(iter(arrays.items()))
        flipped = bytearray(array.data)
        flipped[0] ^= 1
        changed = {**arrays, name: Array(array.dtype, array.shape, memoryview(flipped))}
        assert wrong({key: changed}, fidelity) == [key]


@pytest.mark.exhaustive
def test_who_waits_too_long_for_a_stopped_holder_is_reported_with_what_it_did(tmp_path: Path) -> None:
    report = Report(seed=7)
    stop_a_holder(tmp_path / "held", "a lock on collect.lock", report, seconds=0.0, names=["evict --to 1MB", "ls"])
    assert report.counts["stops"] == report.counts["kills"] == 1
    assert [problem for problem in report.problems if "evict" in problem and "eviction.py" in problem]
    assert not [problem for problem in report.problems if "'ls'" in problem]
    assert "seed 7" in str(report)
