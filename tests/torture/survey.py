"""Reads everything in a database that nobody else has open: `python -m tests.torture.survey DIRECTORY [--mend]`.

In a process of its own, which a damaged file must not kill either. What it finds is printed as JSON.
"""

from __future__ import annotations

import faulthandler
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import backprompt_db as bp
from backprompt_db.database.database import Database
from backprompt_db.errors import BackpromptError, StoreError
from backprompt_db.operations.reindex import reindex
from backprompt_db.operations.verify import Found, verify
from tests.support.faults import dangling, keys_of, prompt, wanted_of
from tests.torture.journal import Acknowledged, acknowledged
from tests.torture.values import new_parts, wrong

_NUM_READ, _NUM_MENDED = 1_500, 50
"""How many prompts are looked at in a damaged database; verifying it reads all."""


def survey(directory: Path) -> dict[str, int]:
    """Read what was acknowledged, then verify everything; for a database that was not damaged."""
    with bp.open(directory / "db", memory_nbytes=0) as db:
        counts = _read(db, acknowledged(directory / "journals"))
        before = verify(db)
        counts["dangling"] = len(dangling(db))
        reindex(db)
        after = verify(db)
        return counts | {
            "num_quarantined": db.counters.num_quarantined,
            "found": before.found & ~Found.CATALOG,
            "left": after.found,
        }


def survey_damaged(directory: Path) -> dict[str, int]:
    """Read what was acknowledged, compute again some of what is missing, and read that: what can still be done."""
    try:
        with bp.open(directory / "db", memory_nbytes=0) as db:
            known = acknowledged(directory / "journals")
            random.shuffle(known)
            counts = _read(db, known[:_NUM_READ])
            counts |= {f"{name} again": number for name, number in _mend(db, known[:_NUM_MENDED]).items()}
            verify(db)
            return counts | {"quarantined": db.counters.num_quarantined}
    except BackpromptError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return {"refused": 1}


def _read(db: Database, known: Sequence[Acknowledged]) -> Counter[str]:
    counts: Counter[str] = Counter(checked=0, missing=0, wrong=0)
    for author, number in known:
        some = prompt(number, author=author)
        found = db.fetch(wanted_of(some))
        counts["checked"] += len(found)
        counts["missing"] += len(keys_of(some)) - len(found)
        counts["wrong"] += len(wrong(found, db.fidelity))
    return counts


def _mend(db: Database, known: Sequence[Acknowledged]) -> Counter[str]:
    for author, number in known:
        some = prompt(number, author=author)
        found = db.fetch(wanted_of(some))
        db.put(new_parts(segment for segment in some if any(key not in found for key in keys_of([segment]))))
    try:
        db.flush()
    except StoreError:
        return Counter(unwritten=1)
    return _read(db, known)


def main() -> None:
    """Print what was found."""
    faulthandler.enable()
    directory, *options = sys.argv[1:]
    look = survey_damaged if "--mend" in options else survey
    print(json.dumps(look(Path(directory))))  # noqa: T201


if __name__ == "__main__":
    main()
