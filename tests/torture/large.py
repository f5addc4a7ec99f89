"""A store with more records than are checked when it is opened, for damage."""

from __future__ import annotations

from pathlib import Path

import backprompt_db as bp
from backprompt_db.prompt.representation import Part
from tests.support.faults import new_parts, prompt
from tests.torture.journal import Journal

_NUM_RECORDS = 6_000
"""Beyond 5,000, `store.lmdb_pages` checks no pages when a store is opened."""

_AUTHOR = "giant0"
_GROUP = 200


def fill_large(directory: Path) -> None:
    """Make a database of small parts, and a journal of what was acknowledged."""
    (directory / "journals").mkdir(parents=True)
    journal = Journal(directory / "journals" / f"{_AUTHOR}.1")
    with bp.open(directory / "db") as db:
        for first in range(0, _NUM_RECORDS, _GROUP):
            numbers = range(first, first + _GROUP)
            for number in numbers:
                db.put(new_parts(prompt(number, author=_AUTHOR), [Part.LOGITS]))
            db.flush()
            journal.acknowledge(numbers)
