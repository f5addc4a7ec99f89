"""Verifying: reading everything that is stored, and comparing it with the catalog."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from backprompt_db.database import Database
from backprompt_db.errors import CatalogError
from backprompt_db.maintenance.differences import Difference, differences
from backprompt_db.maintenance.existing import open_catalog
from backprompt_db.maintenance.inspection import Inspection, Kind, Problem, inspect
from backprompt_db.store.contract import Key

_UNUSABLE = frozenset({Kind.MALFORMED, Kind.MISPLACED})


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification found."""

    num_parts: int
    """Parts that were read, whatever was found."""
    nbytes: int
    """Their size, as far as they could be read."""
    problems: tuple[Problem, ...]
    catalog_problem: str | None
    """Why the catalog could not be compared with the store; None when it was."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing at all is wrong."""
        return not self.problems and self.catalog_problem is None


def verify(db: Database, *, progress: Callable[[Iterator[Inspection]], Iterable[Inspection]] = iter) -> Verification:
    """Read every part of the store, check it, and compare what is there with the catalog.

    Parts that cannot be used are removed from the store, unless `db` is read-only: they will be computed again.
    `progress` wraps the iterator of what is read, one inspection for each part. A part that is written while this
    runs may be reported as unrecorded.
    """
    num_parts = nbytes = 0
    problems = list[Problem]()
    for inspection in progress(_inspect_all(db)):
        num_parts += 1
        nbytes += inspection.nbytes
        if inspection.problem is not None:
            problems.append(inspection.problem)
    known = {Key(problem.address, problem.part) for problem in problems}
    try:
        problems += [_disagreement(found) for found in _differences(db) if found.key not in known]
    except CatalogError as error:
        return Verification(num_parts, nbytes, tuple(problems), error.message)
    return Verification(num_parts, nbytes, tuple(problems), None)


def _inspect_all(db: Database) -> Iterator[Inspection]:
    for key, _ in db.store.keys():
        inspection = inspect(db.store, key)
        yield inspection
        if inspection.problem is not None and inspection.problem.kind in _UNUSABLE:
            db.discard(key)


def _differences(db: Database) -> Iterator[Difference]:
    if db.directory is None:
        return
    with open_catalog(db.directory) as catalog:
        for found in differences(db.store, catalog):
            if found.is_stored or not db.store.has(found.key):
                yield found


def _disagreement(found: Difference) -> Problem:
    if found.is_stored:
        return Problem(*found.key, Kind.UNRECORDED, "the catalog does not have it")
    return Problem(*found.key, Kind.MISSING, "the catalog has it, the store does not")
