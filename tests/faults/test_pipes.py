"""Pipes in the place of files, and files without an end: nobody waits for ever, and nobody reads all of it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.database.config import Config, read_config, write_config
from backprompt_db.database.journal import keys_of_entry
from backprompt_db.database.manifest import FILE_VARIABLE
from backprompt_db.errors import BackpromptError, FormatError, StoreError, UnsafeLocation
from backprompt_db.operations.doctor import diagnose
from backprompt_db.operations.doctor_checks import Status
from backprompt_db.operations.reindex import reindex
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.system.files import MAX_SMALL_NBYTES, read_small
from backprompt_db.system.locks import file_lock, is_locked
from tests.support.cli import run
from tests.support.faults import assert_reads_back, prompt, put_prompts, wanted_of

assert sys.platform != "win32"

NAMES = [
    "manifest.json", "manifest.lock", "config.json", "CACHEDIR.TAG", "store", "store/data.mdb", "store/lock.mdb",
    "pending", "catalog.sqlite", "catalog.sqlite-journal", "catalog.sqlite.lock", "writing.lock", "collect.lock",
]  # fmt: skip

SECONDS = 60


@pytest.fixture(autouse=True)
def _nobody_waits() -> Iterator[None]:
    def give_up(*_: object) -> None:
        pytest.fail("somebody waits for a pipe")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A database with one prompt, and a catalog."""
    with bp.open(tmp_path / "db") as db:
        put_prompts(db, [0])
        assert db.catalog is not None
    return tmp_path / "db"


def plant(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("mode", ["r", "a"])
@pytest.mark.parametrize("name", NAMES)
def test_a_database_with_a_pipe_in_the_place_of_a_file_is_refused(place: Path, name: str, mode: str) -> None:
    plant(place / name)
    with pytest.raises(UnsafeLocation, match=name):
        bp.open(place, mode=mode)
    with pytest.raises(UnsafeLocation, match=name):
        bp.open(":memory:", base=place)


@pytest.mark.parametrize("name", ["manifest.lock", "config.json", "CACHEDIR.TAG", "store", "pending"])
def test_in_a_directory_with_a_pipe_no_database_is_made_or_the_pipe_is_replaced(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    try:
        bp.open(tmp_path).close()
    except StoreError:
        assert (tmp_path / name).is_fifo()
    else:
        assert not (tmp_path / name).is_fifo()


@pytest.mark.parametrize("name", NAMES)
def test_no_command_waits_for_a_pipe(place: Path, name: str) -> None:
    plant(place / name)
    for command in (["ls"], ["stats"], ["config"], ["doctor"], ["export", "-"]):
        result = run(*command, "--db", place)
        assert result.exception is None or isinstance(result.exception, SystemExit), "an answer, or an error of our own"


@pytest.mark.parametrize("name", ["catalog.sqlite", "catalog.sqlite-journal", "catalog.sqlite-wal"])
def test_a_pipe_that_comes_while_the_database_is_open_costs_the_catalog_alone(place: Path, name: str) -> None:
    with bp.open(place, memory_nbytes=0) as db:
        put_prompts(db, [1])
        plant(place / name)
        put_prompts(db, [2])
        assert_reads_back(db, [0, 1, 2])
        findings = {check.name: check for check in diagnose(place)}
        assert findings["catalog"].status is Status.WARNING
        assert findings["clock"].status is Status.WARNING
        reindex(db)
        assert not (place / name).exists() or not (place / name).is_fifo()
        assert_reads_back(db, [0, 1, 2])


@pytest.mark.parametrize("name", ["config.json", "writing.lock", "collect.lock", "pending"])
def test_a_pipe_that_comes_while_the_database_is_open_stops_nobody(place: Path, name: str) -> None:
    with bp.open(place, memory_nbytes=0) as db:
        put_prompts(db, [1])
        plant(place / name)
        put_prompts(db, [2])
        assert_reads_back(db, [0, 1, 2])


def test_a_pipe_that_takes_the_place_of_an_open_store_is_neither_read_nor_written(place: Path) -> None:
    with bp.open(place, memory_nbytes=0) as db:
        assert_reads_back(db, [0])
        plant(place / "store" / "data.mdb")
        assert db.fetch(wanted_of(prompt(0))) == {}
        with pytest.raises(StoreError, match="it is not a regular file"):
            put_prompts(db, [1])


def test_a_pipe_is_no_lock_file_that_somebody_waits_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock", 0o400)
    assert not is_locked(tmp_path / "lock", 0)
    with file_lock(tmp_path / "lock", timeout_seconds=1):
        pass


def test_a_store_and_an_entry_of_the_journal_that_are_pipes_are_not_read(place: Path) -> None:
    plant(place / "store" / "data.mdb")
    with pytest.raises(StoreError):
        LmdbStore(place / "store", readonly=True)
    plant(place / "pending" / "entry")
    assert keys_of_entry(place / "pending" / "entry") == []


@pytest.mark.parametrize("is_pipe", [True, False])
def test_a_secret_is_read_from_a_regular_file_of_a_sane_size_or_through_a_link_to_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_pipe: bool
) -> None:
    secret, bad = tmp_path / "secret", tmp_path / "bad"
    secret.write_text("a secret of sixteen bytes or more")
    (tmp_path / "link").symlink_to(secret)
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "link"))
    bp.open(tmp_path / "db").close()
    if is_pipe:
        os.mkfifo(bad)
    else:
        make_endless(bad)
    monkeypatch.setenv(FILE_VARIABLE, str(bad))
    with pytest.raises(FormatError, match=r"the file of the secret, .*bad, cannot be read"):
        bp.open(tmp_path / "db")


def make_endless(path: Path) -> None:
    """A file of which the disk holds nothing, and which no memory could."""
    with path.open("wb") as file:
        os.truncate(file.fileno(), 1 << 42)


def test_settings_without_an_end_are_not_read(place: Path) -> None:
    make_endless(place / "config.json")
    with pytest.raises(FormatError, match=r"config\.json cannot be read .*more than 1048576 bytes"):
        read_config(place)
    with bp.open(place) as db:  # with the default limit
        put_prompts(db, [1])
    write_config(place, Config())
    make_endless(place / "manifest.json")
    with pytest.raises(BackpromptError, match="more than 1048576 bytes"):
        bp.open(place)


def test_a_file_of_just_the_size_that_is_sane_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MAX_SMALL_NBYTES))
    assert read_small(tmp_path / "file") == bytes(MAX_SMALL_NBYTES)
    (tmp_path / "file").write_bytes(bytes(MAX_SMALL_NBYTES + 1))
    with pytest.raises(OSError, match="more than"):
        read_small(tmp_path / "file")
