"""The demo, from choosing a model to the table: every run is a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backprompt_db.cli.demo.job import ChoiceResult, JobResult, load_task
from backprompt_db.errors import ComputeError, UnsafeLocation
from backprompt_db.system.platform import room_nbytes


def run_demo(
    *, model: str = "gpt2", directory: Path | None = None, num_requests: int | None = None, sample: int = 8
) -> int:
    """Run the job in two processes on one new database, only its best answers on another, a sample of it on none.

    Prints a table of all.

    `directory` must hold no database yet; without it a temporary one is used. Returns 0, or 1 where a promise of the
    demo was broken: it did work twice, or numbers differ. Raises `BackpromptError` where the demo cannot run.
    """
    from backprompt_db.cli.demo.choose import choose_model
    from backprompt_db.cli.demo.plain import PlainResult
    from backprompt_db.cli.demo.report import Choices, Plain, Run, failures, say, show

    task = load_task(num_requests)
    with _new_database(directory) as place:
        choice = choose_model(model)
        say(f"Model: {choice.reason}.")
        environment = _environment(is_local=choice.is_local)
        job = ["backprompt_db", "demo-run", "--model", choice.model, "--requests", str(len(task.gold)), "--dir"]
        runs = []
        for name in ("first process", "second process"):
            say(f"Scoring {task.num_pairs:,} pairs: {name}...")
            result, seconds = _run_child([*job, str(place)], environment)
            runs.append(Run(name, seconds, JobResult(**result), _nbytes_on_disk(place)))
        say("Finding only the best endpoint of each request, on an empty database...")
        with _new_database(None) as other:
            result, seconds = _run_child([*job, str(other), "--best"], environment)
        choices = Choices(seconds, ChoiceResult(**result))
    plain = None
    if sample > 0:
        say("Scoring a sample of them with transformers alone...")
        arguments = [choice.model, str(len(task.gold)), str(sample)]
        results, seconds = _run_child(["backprompt_db.cli.demo.plain", *arguments], environment)
        plain = Plain(seconds, [PlainResult(**result) for result in results])
    found = failures(runs, choices, plain)
    show(task, runs, choices, plain, found)
    return 1 if found else 0


@contextmanager
def _new_database(directory: Path | None) -> Iterator[Path]:
    from backprompt_db.database.location import MANIFEST

    if directory is None:
        with tempfile.TemporaryDirectory(prefix="backprompt-db-demo-") as temporary:
            yield Path(temporary) / "db"
    elif (directory / MANIFEST).exists():
        raise UnsafeLocation(
            f"{directory} holds a database already, and the demo begins with none", hint="Give another directory."
        )
    else:
        yield directory


def _environment(*, is_local: bool) -> dict[str, str]:
    """Return the environment of the children: they print only results, and do not look for a local model on the hub."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, **quiet, **({"HF_HUB_OFFLINE": "1"} if is_local else {})}


def _run_child(arguments: list[str], environment: dict[str, str]) -> tuple[Any, float]:
    """Run a module in a process of its own; return what it wrote as JSON, and its seconds from start to end."""
    began = time.perf_counter()
    command = [sys.executable, "-m", *arguments]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
    seconds = time.perf_counter() - began
    if child.returncode:
        raise ComputeError(
            f"a process of the demo ended with exit code {child.returncode}", hint="What it wrote above says why."
        )
    return json.loads(child.stdout), seconds


def _nbytes_on_disk(directory: Path) -> int:
    """Return what the files of a database occupy; data.mdb has holes, so its length says little."""
    return sum(room_nbytes(path.stat()) for path in directory.rglob("*") if path.is_file())
