"""Damage to the catalog that models depend on: `python -m tests.torture.catalogs DIRECTORY SEED NUMBER`.

What is remembered there decides what is computed: where strings are cut, what is greedy, which model it is. Answers of
every damaged copy are those of a new database, or errors of the library's own. Prints counts and problems as JSON.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from backprompt_db.errors import BackpromptError
from tests.faults.test_edited_catalogs import Answers, answers
from tests.support.damage import in_a_fork
from tests.support.harness import save_model
from tests.support.operations import catalog_of
from tests.torture.damage import flip

_VALUES = (None, 0, 1, -1, 2**62, 0.5, "", "packs", "chains", "[]", "[5, 9]", "x", b"", b"\0" * 32)
_PAGE_NBYTES = 4096


def _overwrite(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(dice.randint(1, 50)):
        content[dice.randrange(len(content))] = dice.randrange(256)
    path.write_bytes(content)


def _swap_pages(path: Path, dice: random.Random) -> None:
    """Pages of garbage, of zeros, or of another place in the file."""
    content = path.read_bytes()
    pages = [content[begin : begin + _PAGE_NBYTES] for begin in range(0, len(content), _PAGE_NBYTES)]
    for _ in range(dice.randint(1, 3)):
        other = dice.choice([dice.randbytes(_PAGE_NBYTES), bytes(_PAGE_NBYTES), dice.choice(pages)])
        pages[dice.randrange(1, len(pages))] = other
    path.write_bytes(b"".join(pages))


def _edit(path: Path, dice: random.Random) -> None:
    """Any value in any cell that takes it."""
    with contextlib.closing(sqlite3.connect(path)) as catalog, catalog:
        names = [name for (name,) in catalog.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1")]
        for _ in range(dice.randint(1, 8)):
            table = dice.choice(names)
            column = dice.choice([row[1] for row in catalog.execute(f"PRAGMA table_info({table})")])
            found = [value for (value,) in catalog.execute(f"SELECT {column} FROM {table} ORDER BY 1")]  # noqa: S608
            values = dice.choice([*found, *_VALUES]), dice.choice([*found, None])
            with contextlib.suppress(sqlite3.Error):  # the schema refuses it
                catalog.execute(f"UPDATE {table} SET {column} = ? WHERE {column} IS ?", values)  # noqa: S608


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped bits": partial(flip, most=200),
    "overwritten bytes": _overwrite,
    "swapped pages": _swap_pages,
    "edited cells": _edit,
}


def torture(directory: Path, *, seed: str, number: int) -> tuple[Counter[str], list[str]]:
    """Damage so many copies of a catalog and ask each everything, in a process of its own."""
    model, dice = save_model(directory / "model"), random.Random(seed)
    expected = answers(directory / "db", model)
    counts, problems = Counter[str](), list[str]()
    for copy in range(number):
        name = dice.choice(list(DAMAGES))
        place = shutil.copytree(directory / "db", directory / f"copy {copy}")
        DAMAGES[name](catalog_of(place), dice)
        outcome = in_a_fork(partial(_ask, place, model, expected))
        kind = _KINDS.get(outcome, "deaths" if outcome.startswith("SIG") else "surprises")
        counts.update({"damages": 1, kind: 1})
        if kind not in ("checked", "refused"):
            problems.append(f"{place}: {kind} after {name} in the catalog: {outcome}")
        else:
            shutil.rmtree(place)
    return counts, problems


_KINDS = {"right": "checked", "refused": "refused", "wrong": "wrong", "SIGALRM": "hangs"}


def _ask(place: Path, model: str, expected: Answers) -> str:
    try:
        answers(place, model).assert_same(expected)
    except BackpromptError:
        return "refused"
    except AssertionError:
        return "wrong"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
        return repr(error)
    return "right"


def main() -> None:
    """Print what was found."""
    torch.set_num_threads(1)  # threads do not survive forks
    directory, seed, number = sys.argv[1:]
    counts, problems = torture(Path(directory), seed=seed, number=int(number))
    print(json.dumps({"counts": counts, "problems": problems}))  # noqa: T201


if __name__ == "__main__":
    main()
