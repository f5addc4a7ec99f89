"""What keeps a user from using a database is found when it is opened, named, and said how to mend."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.database.location import access_problem, faults
from backprompt_db.errors import UnsafeLocation
from backprompt_db.operations import doctor_checks
from backprompt_db.operations.doctor import diagnose
from backprompt_db.store.files import Sharing
from tests.conftest import cases
from tests.support.databases import new_part
from tests.support.faults import public_directory

assert sys.platform != "win32"

OWNER, MEMBER, STRANGER, GROUP = 60_001, 60_002, 60_003, 60_010
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

FILES = ["", "manifest.json", "config.json", "catalog.sqlite", "store", "store/data.mdb", "store/lock.mdb"]
READABLE = ["", "manifest.json", "config.json", "store", "store/data.mdb"]
"""What a reader needs."""


def make(directory: Path) -> Path:
    with bp.open(directory) as db:
        db.put([new_part("a")])
        db.flush()
        assert db.catalog is not None
    return directory


@pytest.fixture
def place() -> Iterator[Path]:
    with public_directory() as directory:
        yield make(directory / "the db")


def share(place: Path, sharing: Sharing) -> None:
    """Give the database to the owner and the group of these tests, as it should be."""
    for path in [place, *place.rglob("*")]:
        os.chown(path, OWNER, GROUP)
    doctor_checks.share(place, sharing, group=str(GROUP))
    assert list(faults(place, sharing)) == []


def seen_by(user: int, place: Path, sharing: Sharing, *, readonly: bool = False) -> str:
    """The kind and the words of the problem that a user has, in a process of their own; empty for none."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([GROUP] if user == MEMBER else [])
            os.setgid(user)
            os.setuid(user)
            problem = access_problem(place, sharing, readonly=readonly)
            os.write(theirs, f"{type(problem).__name__}: {problem}".encode() if problem is not None else b"")
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        found = answer.read()
    assert os.waitpid(child, 0)[1] == 0
    return found


@needs_root
class TestUsers:
    @pytest.mark.parametrize("sharing", Sharing)
    @pytest.mark.parametrize("user", [OWNER, MEMBER, STRANGER])
    @pytest.mark.parametrize("readonly", [False, True])
    def test_nobody_has_a_problem_with_a_database_as_it_should_be(
        self, place: Path, sharing: Sharing, user: int, *, readonly: bool
    ) -> None:
        share(place, sharing)
        assert seen_by(user, place, sharing, readonly=readonly) == ""

    @pytest.mark.parametrize("name", FILES)
    def test_a_file_that_root_made_is_named_with_what_mends_it(self, place: Path, name: str) -> None:
        share(place, Sharing.GROUP)
        made = place / name
        os.chown(made, 0, 0)
        made.chmod(0o700 if made.is_dir() else 0o600)
        told = seen_by(MEMBER, place, Sharing.GROUP)
        if not name:  # whose group is all that says whose group the database is
            assert told == ""
            return
        assert told.startswith(f"StoreReadOnly: {made} belongs to root:root with mode 0")
        assert f"00, and you are {MEMBER}: the members of the group {GROUP} share the database" in told
        assert f"Run `chgrp {GROUP} '{made}' && chmod {2770 if made.is_dir() else 660} '{made}'` as root; " in told
        assert f"`backprompt-db doctor --fix --db '{place}'` mends all such files." in told
        command = told.split("`")[1]
        subprocess.run(command, shell=True, check=True)  # noqa: S602 - what the message says
        assert seen_by(MEMBER, place, Sharing.GROUP) == ""
        assert list(faults(place, Sharing.GROUP)) == []

    @pytest.mark.parametrize("name", FILES[1:])
    def test_the_owner_of_a_private_database_is_told_which_file_is_not_theirs(self, place: Path, name: str) -> None:
        share(place, Sharing.PRIVATE)
        made = place / name
        os.chown(made, STRANGER, STRANGER)
        told = seen_by(OWNER, place, Sharing.PRIVATE)
        assert f"{made} belongs to {STRANGER}:{STRANGER} with mode" in told
        command = told.split("`")[1]
        assert command.startswith(f"chown {OWNER}:{STRANGER} ")
        assert told.split("`")[2].startswith(" as root; ")
        subprocess.run(command, shell=True, check=True)  # noqa: S602 - what the message says
        assert seen_by(OWNER, place, Sharing.PRIVATE) == ""

    @pytest.mark.parametrize("sharing", cases([Sharing.GROUP, Sharing.READERS], by_default=[Sharing.READERS]))
    @pytest.mark.parametrize("name", FILES)
    def test_a_mode_that_an_umask_spoiled_is_named_to_those_whom_it_keeps_out(
        self, place: Path, sharing: Sharing, name: str
    ) -> None:
        share(place, sharing)
        spoiled = place / name
        spoiled.chmod(spoiled.stat().st_mode & ~0o077)
        assert seen_by(OWNER, place, sharing) == "", "the owner may use it"
        assert seen_by(STRANGER, place, sharing) == "", "nothing was promised"
        told = seen_by(MEMBER, place, sharing)
        assert f"{spoiled} belongs to {OWNER}:{GROUP} with mode " in told
        assert f"as {OWNER} or root" in told
        subprocess.run(told.split("`")[1], shell=True, check=True)  # noqa: S602 - what the message says
        assert seen_by(MEMBER, place, sharing) == ""

    @pytest.mark.parametrize("name", FILES)
    def test_for_reading_only_what_reading_needs_counts(self, place: Path, name: str) -> None:
        share(place, Sharing.READERS)
        spoiled = place / name
        spoiled.chmod(0)
        is_told = seen_by(MEMBER, place, Sharing.READERS, readonly=True) != ""
        assert is_told == (name in READABLE)

    def test_a_reader_needs_a_place_in_the_lock_file_and_no_other_right_to_write(self, place: Path) -> None:
        share(place, Sharing.READERS)
        (place / "store" / "lock.mdb").chmod(0o640)
        assert "lock.mdb" in seen_by(MEMBER, place, Sharing.READERS)
        assert seen_by(MEMBER, place, Sharing.READERS, readonly=True) == ""

    def test_what_is_more_open_than_it_should_be_keeps_nobody_out(self, place: Path) -> None:
        share(place, Sharing.PRIVATE)
        (place / "catalog.sqlite").chmod(0o666)
        assert seen_by(OWNER, place, Sharing.PRIVATE) == ""
        assert [fault.path.name for fault in faults(place, Sharing.PRIVATE)] == ["catalog.sqlite"]

    def test_a_file_that_is_being_made_has_its_mode_in_a_moment(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        share(place, Sharing.PRIVATE)
        late = place / "catalog.sqlite"
        late.chmod(0)
        assert seen_by(OWNER, place, Sharing.PRIVATE) != ""
        monkeypatch.setattr(time, "sleep", lambda _: late.chmod(0o600))
        assert seen_by(OWNER, place, Sharing.PRIVATE) == ""


class TestDangers:
    @pytest.mark.parametrize("folder", ["", "store"])
    def test_a_directory_in_which_everybody_may_replace_files_is_refused(self, place: Path, folder: str) -> None:
        (place / folder).chmod(0o777)
        problem = access_problem(place, Sharing.PRIVATE, readonly=True)
        assert isinstance(problem, UnsafeLocation)
        assert f"everybody may replace what is in {place / folder} (mode 0777)" in problem.message
        assert problem.hint.startswith(f"Run `chmod o-w '{place / folder}'` as ")
        (place / folder).chmod(0o1777)
        assert access_problem(place, Sharing.PRIVATE, readonly=True) is None

    @pytest.mark.parametrize(
        "name", [*FILES[1:], "pending", "manifest.lock", "flights.lock", "catalog.sqlite-journal", "store/any.lock"]
    )
    @pytest.mark.parametrize("is_dangling", [False, True])
    @pytest.mark.parametrize("readonly", cases([False, True], by_default=[False]))
    def test_a_symbolic_link_in_the_place_of_a_file_is_refused(
        self, place: Path, name: str, *, is_dangling: bool, readonly: bool
    ) -> None:
        victim, planted = place.parent / "victim", place / name
        if not is_dangling:
            if planted.exists():
                planted.rename(victim)
            else:
                victim.touch()
        elif planted.exists():
            planted.rename(place.parent / "elsewhere")
        planted.symlink_to(victim)
        problem = access_problem(place, Sharing.PRIVATE, readonly=readonly)
        assert isinstance(problem, UnsafeLocation)
        assert problem.message.startswith(f"{planted} is a symbolic link")

    def test_a_link_to_the_directory_is_as_good_as_the_directory(self, place: Path) -> None:
        link = place.parent / "link"
        link.symlink_to(place)
        assert access_problem(link, Sharing.PRIVATE, readonly=False) is None
        with bp.open(link) as db:
            assert not db.readonly

    def test_other_names_are_nobodys_business(self, place: Path) -> None:
        (place / "notes.txt").symlink_to(place / "manifest.json")
        assert access_problem(place, Sharing.PRIVATE, readonly=False) is None


@pytest.mark.parametrize("spoil", [lambda _: None, lambda path: path.touch(), lambda path: path.mkdir()])
def test_where_there_is_no_database_there_is_no_problem(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(tmp_path / "db")
    assert access_problem(tmp_path / "db", Sharing.PRIVATE, readonly=False) is None


@needs_root
def test_the_doctor_mends_what_opening_complains_of(place: Path) -> None:
    share(place, Sharing.PRIVATE)
    os.chown(place / "catalog.sqlite", 0, 0)
    assert "catalog.sqlite belongs to root:root" in seen_by(OWNER, place, Sharing.PRIVATE)
    diagnose(place, fix=True)
    assert seen_by(OWNER, place, Sharing.PRIVATE) == ""


def test_looking_costs_less_than_opening(place: Path) -> None:
    look = min(timeit.repeat(lambda: access_problem(place, Sharing.PRIVATE, readonly=False), number=5, repeat=5))
    assert look < min(timeit.repeat(lambda: bp.open(place).close(), number=5, repeat=3)) / 2
