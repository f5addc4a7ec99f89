"""The rounds of the torture: one without a limit, one with, each followed by damage to copies of what it left.

Then a large store and catalogs are damaged, and holders of locks are stopped.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import backprompt_db as bp
from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.database.config import Config, write_config
from backprompt_db.operations.verify import Found
from tests.support.faults import ROOT
from tests.torture.damage import IN_THE_STORE, damaged_copy
from tests.torture.journal import counts, problems
from tests.torture.large import fill_large
from tests.torture.report import Report

if sys.platform != "win32":
    from tests.torture.conductor import HANG_SECONDS, Conductor
    from tests.torture.holders import stop_some_holders
assert sys.platform != "win32"

_MAX_NBYTES = 8_000_000
_SECONDS_PER_DAMAGE = 8.0
_SURVEY_SECONDS = 10 * HANG_SECONDS


def torture_round(directory: Path, report: Report, *, seconds: float, dice: random.Random) -> None:
    """Run one round in an empty directory; what goes wrong is in the report."""
    num_damages = max(1, round(seconds / _SECONDS_PER_DAMAGE))
    for name, share in (("unlimited", 0.6), ("limited", 0.4)):
        _work(directory / name, report, seconds=seconds * share, is_limited=name == "limited", dice=dice)
        for number in range(num_damages if report.is_good else 0):
            _damage(directory / name, directory / f"damaged {name} {number}", report, dice=dice)
    _damage_large(directory / "large", report, number=num_damages, dice=dice)
    _damage_catalogs(directory / "catalogs", report, number=2 * num_damages, dice=dice)
    stop_some_holders(directory / "stopped", report, number=max(1, num_damages // 3), dice=dice)


def _work(directory: Path, report: Report, *, seconds: float, is_limited: bool, dice: random.Random) -> None:
    fidelity = dice.choice(list(Fidelity))
    report.add({fidelity.value: 1})
    with bp.open(directory / "db", fidelity=fidelity.value) as db:
        assert db.catalog is not None  # it is made now, so that no command misses it
    write_config(directory / "db", Config(max_nbytes=_MAX_NBYTES if is_limited else None))
    conductor = Conductor(directory, seed=dice.randrange(2**32), is_limited=is_limited)
    conductor.run(seconds)
    report.problems += [*conductor.problems, *problems(directory / "journals")]
    report.add(conductor.counts + counts(directory / "journals"))
    found = _survey(directory, report)
    if not is_limited:
        found["lost"] = found["missing"]
    report.problems += [
        f"{directory}: the survey {name} {Found(found[name])!r}" for name in ("found", "left") if found[name]
    ]
    report.add({name: found[name] for name in ("checked", "wrong", "lost", "dangling", "num_quarantined")})


def _damage_large(directory: Path, report: Report, *, number: int, dice: random.Random) -> None:
    fill_large(directory)
    for copy in range(number):
        _damage(directory, directory.with_name(f"damaged large {copy}"), report, dice=dice, names=IN_THE_STORE)


def _damage_catalogs(directory: Path, report: Report, *, number: int, dice: random.Random) -> None:
    directory.mkdir()
    arguments = [str(directory), str(dice.randrange(2**32)), str(number)]
    command = [sys.executable, "-W", "error", "-m", "tests.torture.catalogs", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        report.problems.append(f"{directory}: the damage to catalogs ended with {done.returncode}\n{done.stderr}")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    report.problems += found["problems"]
    report.add(found["counts"])


def _damage(directory: Path, copy: Path, report: Report, *, dice: random.Random, names: Sequence[str] = ()) -> None:
    how = damaged_copy(directory, copy, dice=dice, names=names)
    report.add({"damages": 1})
    found = _survey(copy, report, "--mend")
    if found["wrong"] or found["wrong again"]:
        report.problems.append(f"{copy}: wrong values after {how}")
    report.add({name: found[name] for name in ("checked", "missing", "quarantined", "refused")})
    if report.is_good:
        shutil.rmtree(copy)


def _survey(directory: Path, report: Report, *options: str) -> Counter[str]:
    command = [sys.executable, "-W", "error", "-m", "tests.torture.survey", str(directory), *options]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_SURVEY_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        report.fail("hangs", f"the survey of {directory} takes more than {_SURVEY_SECONDS} s")
        return Counter()
    if done.returncode:
        report.add({"deaths": int(done.returncode < 0)})
        report.problems.append(f"the survey of {directory} ended with {done.returncode}\n{done.stderr[-3000:]}")
        return Counter()
    return Counter(json.loads(done.stdout))
