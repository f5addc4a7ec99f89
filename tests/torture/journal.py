"""What a worker has done, written down line by line in a way that a kill cannot undo, and read by others."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Acknowledged(NamedTuple):
    """A prompt whose writing was acknowledged."""

    author: str
    number: int


class Journal:
    """A file of lines: `ack NUMBER...`, `problem WORDS...`, and `count JSON` with the sums since the beginning."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def acknowledge(self, numbers: Iterable[int]) -> None:
        """Write down that prompts are stored for good; a forked child may do so too."""
        self._write("ack", *numbers)

    def problem(self, *words: object) -> None:
        """Write down something that must not happen."""
        self._write("problem", *words)

    def beat(self) -> None:
        """Write down all counts, which shows too that there is progress."""
        self._write("count", json.dumps(self.counts))

    def _write(self, *words: object) -> None:
        # One call: a kill leaves the line or not, and lines of a forked child do not mix with the parent's.
        os.write(self._descriptor, (" ".join(map(str, words)).replace("\n", " / ") + "\n").encode())


def lines(path: Path, kind: str) -> Iterator[str]:
    """The rests of all whole lines of a kind in a journal."""
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        if line.endswith("\n") and line.startswith(f"{kind} "):
            yield line.removeprefix(f"{kind} ").rstrip()


def author_of(path: Path) -> str:
    """Journals are called AUTHOR.INCARNATION."""
    return path.name.partition(".")[0]


def acknowledged(directory: Path) -> list[Acknowledged]:
    """All prompts that were acknowledged to anyone."""
    return [
        Acknowledged(author_of(path), int(number))
        for path in sorted(directory.iterdir())
        for line in lines(path, "ack")
        for number in line.split()
    ]


def problems(directory: Path) -> list[str]:
    """Everything that must not happen and did."""
    return [f"{path.name}: {line}" for path in sorted(directory.iterdir()) for line in lines(path, "problem")]


def counts(directory: Path) -> Counter[str]:
    """The sums over all workers."""
    total = Counter(acknowledged=len(acknowledged(directory)))
    for path in directory.iterdir():
        *_, last = ["{}", *lines(path, "count")]
        total.update(json.loads(last))
    return total
