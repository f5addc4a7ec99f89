"""Verifying: whether what is stored is whole, lies under its own name, and is what the catalog lists."""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backprompt_db.catalog.connection import catalog_flaws
from backprompt_db.database.location import CATALOG, STORE
from backprompt_db.database.opening import open_catalog
from backprompt_db.database.reconcile import Difference, differences
from backprompt_db.database.signatures import changed_rows
from backprompt_db.errors import CatalogError, StoreError
from backprompt_db.operations.inspection import Inspection, Kind, Problem, inspect
from backprompt_db.store.contract import Key

if TYPE_CHECKING:
    from backprompt_db.database.database import Database
    from backprompt_db.store.check import Flaw

_UNUSABLE = frozenset({Kind.MALFORMED, Kind.MISPLACED})


class Found(enum.IntFlag):
    """Which kinds of problems were found. The sum is the exit code of `backprompt-db verify`, where 2 is an error."""

    NOTHING = 0
    DATA = 1
    """Parts that are damaged, malformed, misplaced or cannot be read."""
    STRUCTURE = 4
    """Records of the store that do not fit together."""
    CATALOG = 8
    """The catalog is damaged, or does not say what the store holds."""
    RECOMPUTATION = 16
    """Values that differ from what the model computes."""


_SORTS = {
    Kind.INCOMPLETE: Found.STRUCTURE,
    Kind.ORPHANED: Found.STRUCTURE,
    Kind.FOREIGN: Found.STRUCTURE,
    Kind.UNRECORDED: Found.CATALOG,
    Kind.MISSING: Found.CATALOG,
    Kind.DIFFERENT: Found.RECOMPUTATION,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What a verification looks at."""

    structure: bool = True
    """Whether to check that records, keys and sizes agree in store and catalog. Reads no blobs."""
    share: float = 1.0
    """The share of the parts that is read and checked: 1 for all, 0 for none."""
    seed: int = field(default_factory=lambda: random.SystemRandom().randrange(2**32))
    """The seed of the choice; the same seed chooses the same parts of the same store."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification found."""

    num_parts: int
    """How many parts were read, whatever was found."""
    nbytes: int
    """Their size, as far as they could be read."""
    problems: tuple[Problem, ...]
    catalog_problem: str | None
    """What is wrong with the catalog itself, or why it could not be compared with the store."""
    store_problem: str | None = None
    """Why the store's records could not be walked through."""
    changed_rows: Mapping[str, int] = field(default_factory=dict)
    """By table: how many rows of what the catalog remembers are not what was written. They are not used."""

    @property
    def found(self) -> Found:
        """Which kinds of problems were found."""
        found = Found.NOTHING if self.catalog_problem is None and not self.changed_rows else Found.CATALOG
        if self.store_problem is not None:
            found |= Found.STRUCTURE
        for problem in self.problems:
            found |= _SORTS.get(problem.kind, Found.DATA)
        return found

    @property
    def is_clean(self) -> bool:
        """Whether nothing at all is wrong."""
        return not self.found


Progress = Callable[[Iterator[Inspection]], Iterable[Inspection]]
"""Wraps the iterator of what is read, one inspection for each part."""


def verify(db: Database, *, checks: Checks | None = None, progress: Progress = iter) -> Verification:
    """Check the store and compare it with the catalog: everything, unless `checks` says otherwise.

    Parts that cannot be used are removed from the store, unless `db` is read-only: they will be computed again. A part
    that is written while this runs may be reported as unrecorded.
    """
    checks = checks or Checks()
    problems, store_problem = _structure_problems(db) if checks.structure else ([], None)
    if store_problem is not None:  # nothing else can be read either
        return Verification(0, 0, tuple(problems), None, store_problem)
    num_parts = nbytes = 0
    known = _keys(problems)
    for inspection in progress(_inspect_share(db, checks)):
        num_parts += 1
        nbytes += inspection.nbytes
        if inspection.problem is not None and inspection.key not in known:
            problems.append(inspection.problem)
    differing, catalog_problem = _catalog_problems(db, known=_keys(problems)) if checks.structure else ([], None)
    changed = _num_changed_rows(db) if checks.structure and catalog_problem is None else {}
    return Verification(num_parts, nbytes, (*problems, *differing), catalog_problem, changed_rows=changed)


def sample(total: int, *, share: float, seed: int) -> frozenset[int]:
    """Return a random share of the numbers below `total`: at least one of them, unless `share` or `total` is 0."""
    num_chosen = min(total, math.ceil(share * total))
    return frozenset(random.Random(seed).sample(range(total), num_chosen))  # noqa: S311 - nothing to keep secret


def _keys(problems: Iterable[Problem]) -> set[Key]:
    return {Key(p.address, p.part) for p in problems if p.address is not None and p.part is not None}


def _structure_problems(db: Database) -> tuple[list[Problem], str | None]:
    from backprompt_db.store.check import flaws

    problems = list[Problem]()
    if db.directory is None:
        return problems, None
    try:
        for flaw in flaws(db.directory / STORE):
            problems.append(_problem(flaw))
            if flaw.key is not None:
                db.discard(flaw.key)
    except StoreError as error:
        return problems, error.message
    return problems, None


def _problem(flaw: Flaw) -> Problem:
    if flaw.key is None:
        return Problem(None, None, Kind.FOREIGN, flaw.detail)
    return Problem(*flaw.key, Kind.INCOMPLETE if flaw.has_head else Kind.ORPHANED, flaw.detail)


def _inspect_share(db: Database, checks: Checks) -> Iterator[Inspection]:
    if not checks.share:
        return
    keys = (key for key, _ in db.store.keys())
    if checks.share < 1:
        chosen = sample(sum(1 for _ in db.store.keys()), share=checks.share, seed=checks.seed)
        keys = (key for number, key in enumerate(keys) if number in chosen)
    for key in keys:
        inspection = inspect(db.store, key)
        yield inspection
        db.report_if_damaged(key)
        if inspection.problem is not None and inspection.problem.kind in _UNUSABLE:
            db.discard(key)


def _catalog_problems(db: Database, *, known: set[Key]) -> tuple[list[Problem], str | None]:
    if db.directory is None:
        return [], None
    problems = list[Problem]()
    try:
        with open_catalog(db.directory) as catalog:
            problems += (_disagreement(found) for found in differences(db.store, catalog) if _is_real(db, found, known))
    except CatalogError as error:
        return problems, error.message
    flaws = catalog_flaws(db.directory / CATALOG)
    return problems, f"the catalog {db.directory / CATALOG} is damaged: {'; '.join(flaws)}" if flaws else None


def _num_changed_rows(db: Database) -> dict[str, int]:
    if db.directory is None:
        return {}
    with open_catalog(db.directory) as catalog:
        return {table: len(rowids) for table, rowids in changed_rows(catalog, db.model_metadata.seal).items()}


def _is_real(db: Database, found: Difference, known: set[Key]) -> bool:
    return found.key not in known and (found.is_stored or not db.store.has(found.key))


def _disagreement(found: Difference) -> Problem:
    if found.is_stored:
        return Problem(*found.key, Kind.UNRECORDED, "the catalog does not have it")
    return Problem(*found.key, Kind.MISSING, "the catalog has it, the store does not")
