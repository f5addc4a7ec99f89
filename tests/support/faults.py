"""Child processes that can be made to fail, and prompts whose every value is known from its address alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

import backprompt_db as bp
from backprompt_db.database.database import Database
from backprompt_db.database.writer import NewPart
from backprompt_db.operations.inspection import Kind, inspect
from backprompt_db.operations.reindex import reindex
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.ids import Address, TokenizerId, WeightsId, address, namespace_id
from backprompt_db.prompt.representation import OWN_PARTS, Array, Arrays, Origin, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.prompt.text import Text
from backprompt_db.store.contract import Key
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.system.failpoints import VARIABLE
from tests.support.blobs import chain

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300
WEIGHTS, TOKENIZER = WeightsId(b"w" * 32), TokenizerId(b"t" * 32)

NUMS_TOKENS = (1, 3, 20, 100, 4500)
"""How many tokens segments have. The keys and values of the longest do not fit into one chunk of the store."""

PREAMBLE = """
import logging, os, signal, sys, threading, time
from pathlib import Path
import backprompt_db as bp
from tests.support.databases import FaultyStore, BROKEN, new_part, values, wanted, expected, address
from tests.support.faults import *
place = sys.argv[1]
"""


def start(
    script: str,
    place: Path,
    *,
    failpoint: str = "",
    preexec: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """A process that runs `script` after the preamble, with the directory in `place`."""
    command = [sys.executable, "-W", "error", "-c", PREAMBLE + script, str(place)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: failpoint, **(environment or {})}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace", env=variables,
        preexec_fn=preexec,  # noqa: PLW1509 - no thread of the tests holds a lock when they start a process
    )  # fmt: skip


@contextlib.contextmanager
def child(
    script: str,
    place: Path,
    *,
    failpoint: str = "",
    preexec: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the block."""
    process = start(script, place, failpoint=failpoint, preexec=preexec, environment=environment)
    try:
        yield process
    finally:
        process.kill()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        process.wait(TIMEOUT_SECONDS)


def run(
    script: str,
    place: Path,
    *,
    failpoint: str = "",
    preexec: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[list[str], str]:
    """Run a script in a process of its own; return the words that it prints and what it logs."""
    with child(script, place, failpoint=failpoint, preexec=preexec, environment=environment) as process:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, err
    return out.split(), err


def run_to_its_end(script: str, place: Path, *, failpoint: str) -> tuple[int, list[str], str]:
    """Run a script that may be killed; return the exit code, the words that it printed and what it logged."""
    with child(script, place, failpoint=failpoint) as process:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    return process.returncode, out.split(), err


def next_line(process: subprocess.Popen[str]) -> str:
    """The next line that a process prints."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        assert process.stderr is not None
        raise AssertionError(process.stderr.read())
    return line


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    """Wait until a process has stopped itself at a failpoint."""
    if sys.platform != "win32":
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), (status, process.stderr and process.stderr.read())


TOGETHER = "print('ready', flush=True); sys.stdin.readline()\n"
"""Wait until all are ready."""


def run_together(*scripts: str, place: Path) -> list[list[str]]:
    """Run processes, which begin with `TOGETHER`, at once; return the words that each prints."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(child(script, place)) for script in scripts]
        for process in processes:
            assert next_line(process) == "ready"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        ends = [process.communicate(timeout=TIMEOUT_SECONDS) for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), ends
    told = [line for _, err in ends for line in err.splitlines()]
    assert [line for line in told if not line.startswith("waiting for ")] == [], ends  # as on a busy machine
    return [out.split() for out, _ in ends]


def check(place: Path) -> set[bytes]:
    """Everything that is stored can be read; return the addresses."""
    with contextlib.closing(LmdbStore(place / "store")) as store:
        keys = [key for key, _ in store.keys()]
        assert all(store.get(key) is not None for key in keys)
        assert store.num_quarantined == 0
    return {key.address for key in keys}


def segments(*strings: str, namespace: str = "") -> tuple[Segment, ...]:
    """The segments of a prompt that is given in pieces."""
    text = Text("")
    for string in strings:
        text += string
    return tuple(text.segments(namespace))


def prompt(number: int, *, author: str = "", namespace: str = "") -> tuple[Segment, ...]:
    """One of the prompts of an author. Many begin alike, and some with those of other authors."""
    strings = (f"Context {number % 3}.", f" Section {number % 7}.", f" Request {number} of {author or 'nobody'}.")
    return segments(*strings, namespace=namespace)


def garbage() -> tuple[Segment, ...]:
    """Segments that nothing follows and nobody asks for."""
    return segments("Nobody", " asks.")


def address_of(segment: Segment) -> Address:
    return address(segment.id, WEIGHTS, TOKENIZER)


def keys_of(some: Iterable[Segment], parts: Iterable[Part] = OWN_PARTS) -> list[Key]:
    kinds = list(parts)
    return [Key(address_of(segment), part) for segment in some for part in kinds]


def wanted_of(some: Iterable[Segment], parts: Iterable[Part] = OWN_PARTS) -> dict[Address, Iterable[Part]]:
    return {address_of(segment): list(parts) for segment in some}


def num_tokens_at(where: Address) -> int:
    return NUMS_TOKENS[where[0] % len(NUMS_TOKENS)]


def contents(key: Key) -> Arrays:
    """The only right arrays under a key."""
    num_tokens = num_tokens_at(key.address)
    dice = np.random.default_rng([*key.address[:16], *key.part.value])

    def floats(*shape: int) -> Array:
        return Array("F32", shape, memoryview(dice.bytes(4 * int(np.prod(shape)))))

    match key.part:
        case Part.SCORES:
            ids = Array.from_numpy(dice.integers(0, 1000, num_tokens, dtype=np.int32))
            return {"input_ids": ids, "token_logprobs": floats(num_tokens)}
        case Part.LOGITS:
            return {"logits": floats(64)}
        case Part.KV:
            return {"keys": floats(1, 2, num_tokens, 16), "values": floats(1, 2, num_tokens, 16)}
        case Part.CONTINUATIONS:
            return chain(dice.integers(0, 1000, num_tokens).tolist())


def origin_of(segment: Segment) -> Origin:
    num_tokens = num_tokens_at(address_of(segment))
    ids = segment.parent_ids, segment.start, WEIGHTS, TOKENIZER
    return Origin(segment.string, *ids, num_tokens, 0.001 * num_tokens, segment.namespace)


def new_parts(some: Iterable[Segment], parts: Iterable[Part] = OWN_PARTS) -> list[NewPart]:
    """What computing segments gives."""
    kinds = list(parts)
    return [NewPart(key, contents(key), origin_of(segment)) for segment in some for key in keys_of([segment], kinds)]


def is_right(key: Key, arrays: Arrays) -> bool:
    """Whether arrays are, byte for byte, what was computed."""
    right = contents(key)
    if arrays.keys() != right.keys():
        return False
    return all(
        (array.dtype, array.shape) == (right[name].dtype, right[name].shape)
        and bytes(array.data) == bytes(right[name].data)
        for name, array in arrays.items()
    )


def wrong(found: Mapping[Key, Arrays]) -> list[Key]:
    """The keys of values that are not what was computed."""
    return [key for key, arrays in found.items() if not is_right(key, arrays)]


def put_prompts(db: Database, numbers: Iterable[int], *, author: str = "") -> None:
    """Store prompts, acknowledged."""
    for number in numbers:
        db.put(new_parts(prompt(number, author=author)))
    db.flush()


def assert_reads_back(db: Database, numbers: Sequence[int], *, author: str = "") -> None:
    """Everything of these prompts is there and right, and was found in the store."""
    before = db.counters
    for number in numbers:
        some = prompt(number, author=author)
        found = db.fetch(wanted_of(some))
        assert set(found) == set(keys_of(some)), number
        assert wrong(found) == []
    after = db.counters
    assert (after.num_misses, after.num_quarantined) == (before.num_misses, before.num_quarantined)
    assert after.num_read_failures == after.num_write_failures == 0
    assert after.num_hits - before.num_hits == 3 * len(numbers)
    found_parts = after.num_disk_hits + after.num_memory_hits - before.num_disk_hits - before.num_memory_hits
    assert found_parts == 9 * len(numbers)


def dangling(db: Database) -> list[Key]:
    """Stored keys and values of which those before them are not stored: of no use to anyone."""
    stored = {key for key, _ in db.store.keys()}
    return [key for key in stored if key.part is Part.KV and not _parents_of(db, key) <= stored]


def _parents_of(db: Database, key: Key) -> set[Key]:
    found = inspect(db.store, key).origin
    if found is None:
        return set()
    before = set(found.parents) - {namespace_id(found.namespace)}
    return {Key(address(each, found.weights_id, found.tokenizer_id), Part.KV) for each in before}


LAG = {Kind.UNRECORDED, Kind.MISSING}
"""What an interrupted process may leave of the catalog, and nothing else of anything."""


def assert_survived(place: Path, numbers: Sequence[int], *, author: str = "") -> None:
    """What was acknowledged is there, nothing is wrong that a reindex does not mend, and writing goes on."""
    with bp.open(place) as db:
        assert not db.readonly
        assert_reads_back(db, numbers, author=author)
        assert {problem.kind for problem in verify(db).problems} <= LAG
        reindex(db)
        assert verify(db).is_clean
        put_prompts(db, [0, 1], author="who comes after")
        assert db.counters.num_stored > 0
        assert db.counters.num_write_failures == 0
    with bp.open(place) as db:
        assert_reads_back(db, [0, 1], author="who comes after")
        assert db.catalog is not None
        assert verify(db).is_clean


@contextlib.contextmanager
def public_directory() -> Iterator[Path]:
    """A directory that any user can reach."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    place.chmod(0o755)
    try:
        yield place
    finally:
        for directory in [place, *(path for path in place.rglob("*") if path.is_dir())]:
            directory.chmod(0o755)
        shutil.rmtree(place)


IN_OTHER_SHOES = """
import numpy.random  # which loads modules that nobody may have no right to
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
logging.basicConfig(format="LOG %(message)s")
"""
"""Root becomes nobody; another user has no right to write either. After imports, which nobody may have no right to."""
