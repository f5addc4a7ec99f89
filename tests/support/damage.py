"""A small database whose files can be damaged bit by bit, and processes that use what is left of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

import backprompt_db as bp
from backprompt_db.database.database import Database
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from backprompt_db.store.records import record_key
from tests.support.faults import (
    TIMEOUT_SECONDS,
    keys_of,
    new_parts,
    num_tokens_at,
    prompt,
    put_prompts,
    wanted_of,
    wrong,
)

NUMBERS = range(10)
SEGMENTS = tuple({segment.id: segment for number in NUMBERS for segment in prompt(number)}.values())
NUM_PARTS = len(keys_of(SEGMENTS))


@dataclass(frozen=True, slots=True)
class Use:
    """What came of opening a database, reading everything, putting what was missing, and reading again."""

    died_of: str = ""
    """The signal that ended the process."""
    refused: str = ""
    """The error that opening raised."""
    num_wrong: int = 0
    num_found: int = 0
    num_quarantined: int = 0
    num_read_failures: int = 0
    num_write_failures: int = 0
    num_found_after: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether everything was there, and nothing failed."""
        return self == Use(num_found=NUM_PARTS, num_found_after=NUM_PARTS)


MENDED = Use(num_found_after=NUM_PARTS)
"""Nothing was there, and everything could be put."""


def fill(place: Path) -> None:
    """Make the database, in two transactions."""
    with bp.open(place) as db:
        for numbers in (NUMBERS[::2], NUMBERS[1::2]):
            put_prompts(db, numbers)


def look(db: Database) -> tuple[int, int]:
    """Read everything; return how many parts were found, and how many are wrong. Each is counted as what it was."""
    before = db.counters
    found = db.fetch(wanted_of(SEGMENTS))
    after = db.counters
    assert after.num_disk_hits - before.num_disk_hits == len(found)
    assert after.num_part_misses - before.num_part_misses == NUM_PARTS - len(found)
    return len(found), len(wrong(found))


def _use(place: Path) -> Use:
    try:
        db = bp.open(place, memory_nbytes=0)
    except bp.BackpromptError as error:
        return Use(refused=type(error).__name__)
    with db:
        num_found, num_wrong = look(db)
        first = db.counters
        db.put(new_parts(SEGMENTS))
        with contextlib.suppress(bp.BackpromptError):
            db.flush()
        num_found_after, num_wrong_after = look(db)
        return Use(
            num_wrong=num_wrong + num_wrong_after,
            num_found=num_found,
            num_quarantined=first.num_quarantined,
            num_read_failures=first.num_read_failures,
            num_write_failures=db.counters.num_write_failures,
            num_found_after=num_found_after,
        )


def use(place: Path) -> Use:
    """Use a database in a process of its own, which may die of it."""
    answer = in_a_fork(lambda: asdict(_use(place)))
    return Use(died_of=answer) if isinstance(answer, str) else Use(**answer)


def in_a_fork(work: Callable[[], Any]) -> Any:
    """Do something in a process of its own and return what it gives, or the name of the signal that ended it.

    One that takes too long dies of SIGALRM.
    """
    if sys.platform == "win32":
        raise NotImplementedError("nothing forks here")
    else:  # noqa: RET506 - so that mypy knows what is there on which platform
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            signal.alarm(TIMEOUT_SECONDS)
            try:
                os.write(write, json.dumps(work()).encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        return json.loads(answer)


def flip(data: Path, positions: Iterable[int], bit: int) -> None:
    """Flip one bit of the bytes at some positions of a file that nobody has open."""
    with data.open("r+b") as file:
        for position in positions:
            file.seek(position)
            (old,) = file.read(1)
            file.seek(position)
            file.write(bytes([old ^ 1 << bit]))


def occurrences(content: bytes, wanted: bytes) -> Iterator[int]:
    """Where some bytes are: LMDB leaves copies of records in pages that are free."""
    position = content.find(wanted)
    while position >= 0:
        yield position
        position = content.find(wanted, position + 1)


def record(place: Path, key: Key, chunk: int = 0) -> bytes:
    """A record of the store, as it lies there."""
    with lmdb.Environment(str(place / "store"), readonly=True, lock=False, lib_version=0) as env, env.begin() as read:
        found: bytes | None = read.get(record_key(key, chunk))
    assert found is not None
    return found


def some_key(part: Part, num_tokens: int) -> Key:
    """The key of a part of a last segment, on which nothing else depends."""
    last = [prompt(number)[-1] for number in NUMBERS]
    return next(key for key in keys_of(last, [part]) if num_tokens_at(key.address) == num_tokens)


PAGE_NBYTES = 4096
HEADER_NBYTES = 16
_HEADER = struct.Struct("=Q HHHH")
"""Number, padding, flags, and where the free space of a page of a tree begins and ends."""
_NODE = struct.Struct("=HHHH")
"""Length of the value (two halves), flags, length of the key. Of a branch, the first three are a page number."""
_BRANCH, _LEAF = 1, 2
_META_ROOT, _META_TRANSACTION, _META_NBYTES = 128, 144, 152
OLDER_META = "the older meta page"
_BIG = 1


class Node(NamedTuple):
    """An entry of a page: where it is in the file, and the page that it refers to, if it does."""

    position: int
    page: int | None
    num_key_bytes: int


class Page(NamedTuple):
    """A page of the tree that holds the records."""

    position: int
    is_leaf: bool
    nodes: list[Node]


def newest_meta(content: bytes) -> int:
    """Where the meta page is that counts."""
    return max((0, PAGE_NBYTES), key=lambda meta: _u64(content, meta + _META_TRANSACTION))


def tree(content: bytes) -> Iterator[Page]:
    """The pages of the newest tree, from its root on."""
    waiting = [_u64(content, newest_meta(content) + _META_ROOT)]
    while waiting:
        page = _page(content, waiting.pop() * PAGE_NBYTES)
        yield page
        if not page.is_leaf:
            waiting += [node.page for node in page.nodes if node.page is not None]


def _page(content: bytes, position: int) -> Page:
    _, _, flags, lower, _ = _HEADER.unpack_from(content, position)
    num_nodes = (lower - HEADER_NBYTES) // 2
    pointers = struct.unpack_from(f"={num_nodes}H", content, position + HEADER_NBYTES)
    is_leaf = bool(flags & _LEAF)
    return Page(position, is_leaf, [_node(content, position + pointer, is_leaf=is_leaf) for pointer in pointers])


def _node(content: bytes, position: int, *, is_leaf: bool) -> Node:
    low, high, flags, num_key_bytes = _NODE.unpack_from(content, position)
    page = low | high << 16 | flags << 32
    if is_leaf:
        page = _u64(content, position + _NODE.size + num_key_bytes) if flags & _BIG else None
    return Node(position, page, num_key_bytes)


def _u64(content: bytes, position: int) -> int:
    (number,) = struct.unpack_from("=Q", content, position)
    return int(number)


def structure(content: bytes) -> dict[str, list[int]]:
    """The positions of the bytes that LMDB trusts, by what they are."""
    newest = newest_meta(content)
    pages = list(tree(content))
    leaves, branches = [page for page in pages if page.is_leaf], [page for page in pages if not page.is_leaf]
    large = [(node.page or 0) * PAGE_NBYTES for page in leaves for node in page.nodes if node.page is not None]
    places = {
        "leaf headers": [range(page.position, page.position + HEADER_NBYTES) for page in leaves],
        "leaf pointers": [_pointers(page) for page in leaves],
        "leaf nodes": [range(node.position, node.position + 8) for page in leaves for node in page.nodes],
        "page numbers of values": [
            range(node.position + 8 + node.num_key_bytes, node.position + 16 + node.num_key_bytes)
            for page in leaves
            for node in page.nodes
            if node.page is not None
        ],
        "branch headers": [range(page.position, page.position + HEADER_NBYTES) for page in branches],
        "branch pointers": [_pointers(page) for page in branches],
        "branch nodes": [range(node.position, node.position + 8) for page in branches for node in page.nodes],
        "overflow headers": [range(position, position + HEADER_NBYTES) for position in large],
        "the newest meta page": [range(newest, newest + _META_NBYTES)],
        OLDER_META: [range(PAGE_NBYTES - newest, PAGE_NBYTES - newest + _META_NBYTES)],
    }
    return {name: list(itertools.chain(*ranges)) for name, ranges in places.items()}


def _pointers(page: Page) -> range:
    begin = page.position + HEADER_NBYTES
    return range(begin, begin + 2 * len(page.nodes))


STRUCTURES = [
    "leaf headers", "leaf pointers", "leaf nodes", "page numbers of values", "branch headers", "branch pointers",
    "branch nodes", "overflow headers", "the newest meta page", OLDER_META,
]  # fmt: skip


def uses_after_flips(master: Path, scratch: Path, what: str, *, num_flips: int) -> list[Use]:
    """Use copies of a database, in each of which one bit of its structure is flipped."""
    positions = structure((master / "store" / "data.mdb").read_bytes())[what]
    dice = random.Random(what)
    uses = []
    for _ in range(num_flips):
        place = shutil.copytree(master, scratch / "copy")
        flip(place / "store" / "data.mdb", [dice.choice(positions)], dice.randrange(8))
        uses.append(use(place))
        shutil.rmtree(place)
    return uses
