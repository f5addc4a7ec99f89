"""The doctor: what keeps a database from working well, why, and how to mend it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from backprompt_db.database.opening import manifest_of
from backprompt_db.errors import BackpromptError
from backprompt_db.operations import doctor_checks
from backprompt_db.operations.doctor_checks import Finding, Status, Subject


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    what: str
    """What was found, in a sentence."""
    remedy: str | None
    """How to mend it; None where there is nothing to mend."""
    is_mended: bool = False
    """Whether it was mended just now; the other fields say how it is after that."""


_EXAMINATIONS: dict[str, Callable[[Subject], Finding]] = {
    "python": doctor_checks.python,
    "libraries": doctor_checks.libraries,
    "filesystem": doctor_checks.filesystem,
    "free space": doctor_checks.free_space,
    "directory": doctor_checks.directory,
    "permissions": doctor_checks.permissions,
    "writing": doctor_checks.writing,
    "store file": doctor_checks.store_file,
    "leftovers": doctor_checks.leftovers,
    "limit": doctor_checks.limit,
    "secret": doctor_checks.secret,
    "catalog": doctor_checks.catalog,
    "catalog lag": doctor_checks.catalog_lag,
    "clock": doctor_checks.clock,
}


def diagnose(directory: Path, *, fix: bool = False) -> list[Check]:
    """Check everything, and with `fix` mend what can be mended without losing anything.

    Raises `UnsafeLocation` where there is no database, and what `manifest_of` raises for one that is not ours.
    """
    subject = Subject(directory, manifest_of(directory))
    return [_check(name, examine, subject, fix=fix) for name, examine in _EXAMINATIONS.items()]


def _check(name: str, examine: Callable[[Subject], Finding], subject: Subject, *, fix: bool) -> Check:
    finding = _examine(examine, subject)
    if not fix or finding.mend is None:
        return Check(name, finding.status, finding.what, finding.remedy)
    failure = _mend(finding.mend)
    finding = _examine(examine, subject)
    if failure is not None and finding.status is not Status.OK:
        return Check(name, finding.status, finding.what, f"{finding.remedy} It could not be done now: {failure}.")
    return Check(name, finding.status, finding.what, finding.remedy, is_mended=finding.status is Status.OK)


def _examine(examine: Callable[[Subject], Finding], subject: Subject) -> Finding:
    try:
        return examine(subject)
    except BackpromptError as error:
        return Finding(Status.PROBLEM, f"{error.message}.", error.hint)
    except OSError as error:
        return Finding(Status.PROBLEM, f"It cannot be looked at: {error}.", "Look again as a user who may read it.")


def _mend(mend: Callable[[], object]) -> str | None:
    """Mend something; return why that failed, or None."""
    try:
        mend()
    except BackpromptError as error:
        return error.message
    except OSError as error:
        return str(error)
    return None
