"""Damage to the files of a copy of a database that nobody has open."""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_PAGE_NBYTES = 4096
_MOST_FLIPS = 40

_PAGE_HEADER = struct.Struct("=10s H I")
"""Number and padding, flags, and how many pages a large value has."""
_OVERFLOW = 4


def damaged_copy(directory: Path, copy: Path, *, dice: random.Random, names: Sequence[str] = ()) -> str:
    """Copy database and journals to `copy` and damage the copy, in one of the named ways; return how."""
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("logs"))
    name = dice.choice(names or list(DAMAGES))
    DAMAGES[name](copy / "db", dice)
    return name


def _overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def flip(path: Path, dice: random.Random, *, most: int = _MOST_FLIPS) -> None:
    """Flip some bits of a file, anywhere."""
    for _ in range(dice.randint(1, most)):
        position = dice.randrange(path.stat().st_size)
        with path.open("rb") as file:
            file.seek(position)
            (old,) = file.read(1)
        _overwrite(path, position, bytes([old ^ 1 << dice.randrange(8)]))


def _flip_structure(path: Path, dice: random.Random) -> None:
    """Flip bits in pages that hold the tree, and not the values."""
    content = bytearray(path.read_bytes())
    pages = list(_tree_pages(content))
    for _ in range(dice.randint(1, _MOST_FLIPS)):
        content[dice.choice(pages) * _PAGE_NBYTES + dice.randrange(_PAGE_NBYTES)] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def _tree_pages(content: bytes | bytearray) -> Iterator[int]:
    """The numbers of the meta, branch and leaf pages, in use or not: all but those of large values."""
    number = 0
    while (number + 1) * _PAGE_NBYTES <= len(content):
        _, flags, num_pages = _PAGE_HEADER.unpack_from(content, number * _PAGE_NBYTES)
        is_value = flags & _OVERFLOW
        if not is_value:
            yield number
        number += num_pages if is_value and num_pages else 1


def _scribble(path: Path, dice: random.Random) -> None:
    """Pages of garbage, of zeros, or of another place in the file."""
    num_pages = path.stat().st_size // _PAGE_NBYTES
    for _ in range(dice.randint(1, 4)):
        other = path.read_bytes()[dice.randrange(num_pages) * _PAGE_NBYTES :][:_PAGE_NBYTES]
        content = dice.choice([dice.randbytes(_PAGE_NBYTES), bytes(_PAGE_NBYTES), other])
        _overwrite(path, dice.randrange(2, max(3, num_pages)) * _PAGE_NBYTES, content)


def _zero(path: Path, dice: random.Random) -> None:
    """64 KiB of zeros in a row, as a failing disk leaves them."""
    nbytes = 16 * _PAGE_NBYTES
    position = dice.randrange(2 * _PAGE_NBYTES, max(2 * _PAGE_NBYTES + 1, path.stat().st_size - nbytes))
    _overwrite(path, position, bytes(nbytes))


def _truncate(path: Path, dice: random.Random) -> None:
    os.truncate(path, dice.randrange(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped bits in the store": lambda place, dice: flip(place / "store" / "data.mdb", dice),
    "flipped bits in the tree": lambda place, dice: _flip_structure(place / "store" / "data.mdb", dice),
    "pages overwritten in the store": lambda place, dice: _scribble(place / "store" / "data.mdb", dice),
    "zeros in the store": lambda place, dice: _zero(place / "store" / "data.mdb", dice),
    "a truncated store": lambda place, dice: _truncate(place / "store" / "data.mdb", dice),
    "flipped bits in the catalog": lambda place, dice: flip(place / "catalog.sqlite", dice),
    "a truncated catalog": lambda place, dice: _truncate(place / "catalog.sqlite", dice),
    "no lock file": lambda place, _: (place / "store" / "lock.mdb").unlink(),
}

IN_THE_STORE = [
    "flipped bits in the tree", "pages overwritten in the store", "zeros in the store", "a truncated store",
]  # fmt: skip
