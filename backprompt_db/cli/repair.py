"""`verify` and `reindex`: finding what is wrong, and mending the catalog."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import typer

from backprompt_db.cli.location import DbOption, open_quietly
from backprompt_db.cli.output import JsonOption, emit, emit_json, literal, size

if TYPE_CHECKING:
    from backprompt_db.database import Database
    from backprompt_db.maintenance.inspection import Inspection, Problem
    from backprompt_db.maintenance.reindex import Reindexing
    from backprompt_db.maintenance.verify import Verification

PROBLEMS = 1
"""The exit code of `verify` when it found something."""


def verify(*, db: DbOption = None, as_json: JsonOption = False) -> None:
    """Read everything in the store, check it, and compare it with the catalog.

    Checked are each part's digest, its format, and that it is what its address is the name of. Parts that cannot be
    used are removed and will be computed again. Exits with 1 if anything is wrong.
    """
    from backprompt_db.maintenance.verify import verify as check

    with open_quietly(db) as database:
        found = check(database, progress=_Bar(database) if sys.stderr.isatty() else iter)
    if as_json:
        emit_json(found)
    else:
        _print_verification(found)
    raise typer.Exit(0 if found.is_clean else PROBLEMS)


class _Bar:
    """A progress bar on stderr around what is being read."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def __call__(self, inspections: Iterator[Inspection]) -> Iterable[Inspection]:
        from rich.console import Console
        from rich.progress import track

        num_parts = sum(1 for _ in self._database.store.keys())
        return track(inspections, "Verifying", total=num_parts, console=Console(stderr=True), transient=True)


def _print_verification(found: Verification) -> None:
    lines = [_line(problem) for problem in found.problems]
    if found.catalog_problem is not None:
        lines.append(found.catalog_problem)
    emit(*map(literal, lines), wrap=False)
    verdict = "no problems" if found.is_clean else f"{len(found.problems):,} of them with problems"
    emit(f"{found.num_parts:,} parts read, {size(found.nbytes)}: {verdict}.")
    if not found.is_clean:
        emit("What was lost is computed again when it is asked for. Run `backprompt-db reindex` to mend the catalog.")


def _line(problem: Problem) -> str:
    return f"{problem.kind.value}: {problem.part.name.lower()} of {problem.address.hex()}: {problem.detail}"


def reindex(*, db: DbOption = None, as_json: JsonOption = False) -> None:
    """Make the catalog agree with the store: add what it lacks, forget what is gone.

    Hits, pins and labels of what stays are kept. A damaged catalog is moved aside and built anew.
    """
    from backprompt_db.maintenance.reindex import reindex as rebuild

    with open_quietly(db) as database:
        done = rebuild(database)
    if as_json:
        emit_json(done)
    else:
        _print_reindexing(done)


def _print_reindexing(done: Reindexing) -> None:
    if done.moved_aside is not None:
        emit(literal(f"The damaged catalog is now {done.moved_aside}."), wrap=False)
    emit(f"{done.num_added:,} parts added, {done.num_forgotten:,} forgotten.")
    if done.num_unreadable:
        emit(f"{done.num_unreadable:,} parts cannot be used; `backprompt-db verify` tells why and removes them.")
