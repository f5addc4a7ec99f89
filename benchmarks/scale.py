"""A database of a million small representations beside one of a thousand, and several processes that read at once."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import Measurement
from benchmarks.scale_data import NUM_KV, Building, build_kv, build_scores
from benchmarks.timing import Times, median_seconds
from benchmarks.workload import REPETITIONS, in_fresh_process

NUM_REPRESENTATIONS = int(os.environ.get("BACKPROMPT_BENCH_ENTRIES", "1000000"))
NUM_FEW = 1_000
NUMS_PROCESSES = (1, 2, 4, 8)
_NUM_SLOW = 3
"""How often what takes seconds is repeated."""


def scale(directory: Path) -> list[Measurement]:
    """Make the databases, look at them from fresh processes, then rebuild the large one's catalog."""
    many, few, large = (directory / "scratch" / name for name in ("many", "few", "kv"))
    building = in_fresh_process(partial(build_scores, num_representations=NUM_REPRESENTATIONS), many)
    in_fresh_process(partial(build_scores, num_representations=NUM_FEW), few)
    in_fresh_process(build_kv, large)
    return [
        *_of_building(building),
        *_of_lookups(many, few),
        *_of_stats(many),
        *_of_the_catalog(many),
        _of_memory(many),
        *_of_reads_at_once(many, large),
        *_of_reindexing(many),
    ]


def _of_building(building: Building) -> list[Measurement]:
    what = f"{building.num_representations:,} representations, in groups of tens of thousands"
    return [
        Measurement(f"scale, {name}", f"{what}, {how}", building.num_representations / seconds, "1/s")
        for name, how, seconds in (
            ("store", "put into the store", building.store_seconds),
            ("record", "entered into the catalog, and a tenth of them used", building.catalog_seconds),
        )
    ]


def _of_lookups(many: Path, few: Path) -> list[Measurement]:
    sides = {"many": (many, NUM_REPRESENTATIONS), "few": (few, NUM_FEW)}
    lookups = _alternately(lambda name: _probe("lookup", *sides[name])["seconds"], sides)
    openings = _alternately(lambda name: _probe("opening", *sides[name])["seconds"], sides)
    times = f"{_us(lookups.median('many'))} / {_us(lookups.median('few'))}"
    return [
        Measurement(
            "scale, lookup",
            f"one representation's scores in a fresh process: {NUM_REPRESENTATIONS:,} over {NUM_FEW:,} ({times})",
            lookups.median("many") / lookups.median("few"),
            "x",
            2,
            is_lower_better=True,
        ),
        Measurement(
            "scale, open",
            f"open to the first hit among {NUM_REPRESENTATIONS:,}, all imported ({NUM_FEW:,}: {openings.ms('few')})",
            openings.median("many") * 1e3,
            "ms",
            100,
            is_lower_better=True,
        ),
    ]


def _of_stats(many: Path) -> list[Measurement]:
    answers = [_probe("stats", many) for _ in range(_NUM_SLOW)]
    command = [sys.executable, "-m", "backprompt_db", "stats", "--db", str(many), "--json"]

    def run(_: int) -> None:
        done = subprocess.run(command, check=True, capture_output=True)
        found = json.loads(done.stdout)
        assert (found["num_representations"], found["catalog_problem"]) == (NUM_REPRESENTATIONS, None)

    whole = median_seconds(run)
    what = f"{NUM_REPRESENTATIONS:,} representations, {answers[0]['nbytes'] / 1e6:,.0f} MB"
    return [
        Measurement("scale, stats", f"what `stats` shows of {what}", _median(answers), "s", 1, is_lower_better=True),
        Measurement(
            "scale, stats", f"`backprompt-db stats` of {what}, whole process", whole, "s", 1, is_lower_better=True
        ),
    ]


def _of_the_catalog(many: Path) -> list[Measurement]:
    chosen = [_probe("eviction_order", many) for _ in range(_NUM_SLOW)]
    listed = [_probe("listing", many) for _ in range(REPETITIONS)]
    among = f"among {NUM_REPRESENTATIONS:,}"
    return [
        Measurement(
            "scale, eviction order",
            f"the 10,000 that go first {among}",
            _median(chosen, "one call"),
            "s",
            2,
            is_lower_better=True,
        ),
        Measurement(
            "scale, eviction order",
            f"a tenth of the bytes in one list, {among}",
            _median(chosen, "all"),
            "s",
            2,
            is_lower_better=True,
        ),
        Measurement("scale, ls", f"the newest 20 {among}", _median(listed, "ls") * 1e3, "ms"),
        Measurement("scale, find", f"one {among} by its address", _median(listed, "find") * 1e3, "ms"),
    ]


def _of_memory(many: Path) -> Measurement:
    answers = [_probe("memory", many) for _ in range(_NUM_SLOW)]
    before, more = (statistics.median(values) / 1e6 for values in zip(*map(_before_and_more, answers), strict=True))
    what = f"an idle process with {NUM_REPRESENTATIONS:,} representations open, over one that has imported all"
    return Measurement("scale, memory", f"{what} ({before:.0f} MB)", more, "MB")


def _before_and_more(answer: dict[str, float]) -> tuple[float, float]:
    return answer["before"], answer["after"] - answer["before"]


def _of_reindexing(many: Path) -> list[Measurement]:
    unchanged = _probe("reindex", many)["seconds"]
    (many / "catalog.sqlite").unlink()
    rebuilt = _probe("reindex", many)["seconds"]
    what = f"reindexing {NUM_REPRESENTATIONS:,} parts"
    return [
        Measurement("scale, reindex", f"{what} when nothing has changed", NUM_REPRESENTATIONS / unchanged, "parts/s"),
        Measurement("scale, reindex", f"{what} without a catalog", NUM_REPRESENTATIONS / rebuilt, "parts/s"),
    ]


def _of_reads_at_once(many: Path, large: Path) -> list[Measurement]:
    kv = {number: _at_once(number, "read_kv", large, NUM_KV) for number in NUMS_PROCESSES}
    scores = {number: _at_once(number, "read_scores", many, NUM_REPRESENTATIONS) for number in NUMS_PROCESSES}
    found = []
    for number in NUMS_PROCESSES:
        who = f"{number} process{'es' if number > 1 else ''}"
        latency, rate = (_median(kv[number], "latency"), sum(each["nbytes_rate"] for each in kv[number]))
        found.append(Measurement(f"{who}, kv", f"4.7 MB each, median {_us(latency)}", rate / 1e9, "GB/s"))
        latency, rate = (_median(scores[number], "latency"), sum(each["rate"] for each in scores[number]))
        found.append(Measurement(f"{who}, scores", f"median {_us(latency)}", rate, "1/s"))
    return found


def _at_once(number: int, name: str, directory: Path, num_representations: int) -> list[dict[str, float]]:
    """Run a probe in several processes that begin to read together."""
    command = _command(name, directory, num_representations)
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(number)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    answers = [json.loads(child.communicate()[0]) for child in children]
    assert not any(child.returncode for child in children)
    return answers


def _alternately(run: Callable[[str], float], names: dict[str, Any]) -> Times:
    return Times.collect([{name: run(name) for name in names} for _ in range(REPETITIONS)])


def _probe(name: str, directory: Path, num_representations: int = NUM_REPRESENTATIONS) -> dict[str, float]:
    """Return what a probe measures in a fresh process."""
    command = _command(name, directory, num_representations)
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def _command(name: str, directory: Path, num_representations: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.scale_probes", name, str(directory), str(num_representations)]


def _median(answers: list[dict[str, float]], name: str = "seconds") -> float:
    return statistics.median(answer[name] for answer in answers)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs"
