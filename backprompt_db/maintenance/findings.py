"""What an examination is given and what it returns."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from backprompt_db.manifest import Manifest


class Status(enum.Enum):
    """How something is."""

    OK = "ok"
    WARNING = "warning"
    """It works, but not for long, or not as well as it could."""
    PROBLEM = "problem"
    """Something does not work, or not for everybody."""


class Subject(NamedTuple):
    """The database that is examined."""

    directory: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Finding:
    """How one thing is, and what can be done about it."""

    status: Status
    what: str
    remedy: str | None = None
    mend: Callable[[], object] | None = None
    """Does it, where it can be done without a loss and without asking."""


def fine(what: str) -> Finding:
    """Return that there is nothing to be done."""
    return Finding(Status.OK, what)
