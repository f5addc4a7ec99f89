"""Real users of one database: what each may do whatever the umask, and what nobody can have done in their name."""

from __future__ import annotations

import io
import logging
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import pytest
from alembic import command
from alembic.config import Config as Alembic

import backprompt_db as bp
from backprompt_db.catalog.records import Selection
from backprompt_db.catalog.schema_check import HEAD
from backprompt_db.database.creating import create_database
from backprompt_db.database.database import Database
from backprompt_db.database.location import faults
from backprompt_db.errors import BackpromptError
from backprompt_db.operations.bundles.transfer import export_bundle
from backprompt_db.operations.doctor import diagnose
from backprompt_db.operations.evict import compact, evict
from backprompt_db.operations.reindex import reindex
from backprompt_db.store.files import Sharing
from tests.conftest import cases
from tests.support.cli import run
from tests.support.faults import (
    ROOT,
    assert_reads_back,
    garbage,
    keys_of,
    new_parts,
    prompt,
    public_directory,
    put_prompts,
    wanted_of,
    wrong,
)

assert sys.platform != "win32"

OWNER, MEMBER, STRANGER, GROUP = 60_001, 60_002, 60_003, 60_010
UMASKS = [0o000, 0o002, 0o022, 0o027, 0o077]
_Answer = TypeVar("_Answer")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

ALL = {
    "open": "for writing", "read": "right", "write": "kept", "evict": "gone", "compact": "done", "migrate": "done",
    "reindex": "done", "export": "done",
}  # fmt: skip
READING = {
    "open": "for reading", "read": "right", "write": "dropped", "evict": "StoreReadOnly", "compact": "StoreReadOnly",
    "migrate": "StoreReadOnly", "reindex": "StoreReadOnly", "export": "done",
}  # fmt: skip
NOTHING = dict.fromkeys(ALL, "StoreReadOnly")


def as_user(user: int, ask: Callable[[], _Answer], *, umask: int = 0o022) -> _Answer:
    """What a user is answered, in a process of their own. Everything that is imported late must have been before."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([] if user == STRANGER else [GROUP])
            os.setgid(user)
            os.setuid(user)
            os.umask(umask)
            os.write(theirs, pickle.dumps(ask()))
            os.close(theirs)
            os._exit(0)
        except BaseException:
            logging.exception("failed as %d", user)
            os._exit(1)
    os.close(theirs)
    with os.fdopen(ours, "rb") as answer:
        found = answer.read()
    assert os.waitpid(child, 0)[1] == 0
    answered: _Answer = pickle.loads(found)  # noqa: S301 - from our own child
    return answered


@pytest.fixture(scope="module", autouse=True)
def _everything_is_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("imports") / "db"
    create_database(directory)
    assert use(directory, number=1) == ALL
    diagnose(directory)


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of the owner's, in which others may look around."""
    with public_directory() as directory:
        os.chown(directory, OWNER, OWNER)
        yield directory


def use(directory: Path, *, number: int) -> dict[str, str]:
    """Do everything that can be done with a database, and say how each ended."""
    try:
        with bp.open(directory, memory_nbytes=0) as db:
            # Before all else: the first use of a catalog with an old schema is what migrates it.
            migrated = attempt(lambda: migrate(db))
            return {"open": "for reading" if db.readonly else "for writing"} | {
                "read": attempt(lambda: read(db)),
                "write": attempt(lambda: write(db, number)),
                "evict": attempt(lambda: remove_garbage(db)),
                "compact": attempt(lambda: compact(db)),
                "migrate": migrated,
                "reindex": attempt(lambda: reindex(db)),
                "export": attempt(lambda: export_bundle(db, io.BytesIO())),
            }
    except BackpromptError as error:
        return dict.fromkeys(ALL, type(error).__name__)


def use_as(user: int, directory: Path, *, number: int, umask: int = 0o022) -> dict[str, str]:
    return as_user(user, lambda: use(directory, number=number), umask=umask)


def attempt(do: Callable[[], object]) -> str:
    try:
        done = do()
    except BackpromptError as error:
        return type(error).__name__
    return done if isinstance(done, str) else "done"


def migrate(db: Database) -> str:
    assert db.directory is not None
    is_there = db.catalog is not None
    if db.readonly:
        return "StoreReadOnly"
    with closing(sqlite3.connect(db.directory / "catalog.sqlite")) as file:
        (found,) = file.execute("SELECT version_num FROM alembic_version").fetchone()
    return "done" if is_there and found == HEAD else f"still {found}"


def read(db: Database) -> str:
    if not db.readonly and not db.store.has(keys_of(prompt(0))[0]):
        put_prompts(db, [0])  # the very first one
    found = db.fetch(wanted_of(prompt(0)))
    assert db.counters.num_read_failures == 0
    return "right" if set(found) == set(keys_of(prompt(0))) and not wrong(found) else "missing"


def write(db: Database, number: int) -> str:
    before = db.counters.num_stored
    put_prompts(db, [number])
    assert db.counters.num_write_failures == 0
    return "kept" if db.counters.num_stored > before else "dropped"


def remove_garbage(db: Database) -> str:
    db.put(new_parts(garbage()))
    evict(db, to_nbytes=None, selection=Selection(text_contains="Nobody"))
    return "kept" if db.store.has(keys_of(garbage())[0]) else "gone"


def fall_behind(directory: Path) -> None:
    """Give the catalog the schema of the first release; its files stay whose they are."""
    config = Alembic(ROOT / "migrations" / "alembic.ini")
    config.set_main_option("sqlalchemy.url", f"sqlite:///{directory / 'catalog.sqlite'}")
    command.downgrade(config, "0001")


EXPECTED = {
    Sharing.PRIVATE: {OWNER: ALL, MEMBER: NOTHING, STRANGER: NOTHING},
    Sharing.GROUP: {OWNER: ALL, MEMBER: ALL, STRANGER: NOTHING},
    Sharing.READERS: {OWNER: ALL, MEMBER: READING, STRANGER: NOTHING},
}


@needs_root
@pytest.mark.parametrize("umask", cases(UMASKS, by_default=[0o077]), ids="{:03o}".format)
@pytest.mark.parametrize("sharing", Sharing)
def test_each_may_do_what_they_were_promised_and_nothing_else_whatever_the_umask(
    home: Path, sharing: Sharing, umask: int
) -> None:
    place = home / "db"
    group = None if sharing is Sharing.PRIVATE else str(GROUP)

    def create() -> None:
        create_database(place, sharing=sharing, group=group)

    as_user(OWNER, create, umask=umask)
    assert list(faults(place, sharing)) == []
    for number, user in enumerate([OWNER, MEMBER, STRANGER, OWNER], start=1):
        if number > 1:
            fall_behind(place)
        assert (user, use_as(user, place, number=number, umask=umask)) == (user, EXPECTED[sharing][user])
        assert list(map(str, faults(place, sharing))) == []
    with bp.open(place) as db:
        assert_reads_back(db, [0, 1, 4])


@needs_root
@pytest.mark.parametrize("umask", cases([0o000, 0o077], by_default=[0o077]), ids="{:03o}".format)
def test_the_command_makes_a_database_for_a_group(home: Path, umask: int) -> None:
    def init() -> int:
        return run("init", home / "db", "--shared", f"group:{GROUP}").exit_code

    run("init", home / "one for the imports")
    assert as_user(OWNER, init, umask=umask) == 0
    assert list(map(str, faults(home / "db", Sharing.GROUP))) == []
    assert ((home / "db").stat().st_uid, (home / "db").stat().st_gid) == (OWNER, GROUP)
    assert use_as(MEMBER, home / "db", number=1, umask=umask) == ALL
    assert use_as(OWNER, home / "db", number=2, umask=umask) == ALL


COMMANDS = [
    "stats", "ls", "ls --models", "show ab", "explain text", "tree", "tree text", "graph --out page", "verify",
    "reindex", "doctor", "export bundle", "import bundle", "merge other", "pin --contains a", "label name --contains a",
    "evict", "compact", "purge --yes --contains a", "config", "config --max-size 1GB", "warm ./model rows.txt",
]  # fmt: skip


@needs_root
class TestCommands:
    """What the command line says to somebody who may not."""

    def test_every_command_has_the_hint_that_python_has(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(home)
        for each in COMMANDS:
            run(*each.split(), "--db", home / "for the imports")
        as_user(OWNER, lambda: use(home / "db", number=1))
        message, hint = as_user(STRANGER, lambda: refusal(home / "db"))
        assert hint == "Ask its owner for permission to read it."
        told = as_user(STRANGER, lambda: [said(each, home / "db") for each in COMMANDS])
        assert told == [f"error: {message}\nhint: {hint}\n"] * len(COMMANDS)
        assert as_user(STRANGER, lambda: run("init", home / "db").stderr) == told[0]

    @pytest.mark.parametrize(
        ("name", "commands"),
        [("catalog.sqlite", ["ls", "show ab", "tree", "pin --contains a", "evict"]),
         ("store/data.mdb", ["show ab", "graph --out page", "config --max-size 1GB", "pin --contains a", "evict"])],
    )  # fmt: skip
    def test_a_file_that_is_not_as_it_should_be_has_its_remedy_on_every_command(
        self, home: Path, name: str, commands: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(home)
        place = home / "db"
        create_database(place, sharing=Sharing.GROUP, group=str(GROUP))
        use(place, number=1)
        for each in commands:
            run(*each.split(), "--db", home / "for the imports")
        (place / name).chmod(0o600)
        remedy = f"hint: Run `chmod 660 {place / name}` as root; `backprompt-db doctor --fix --db {place}` mends all"
        for told in as_user(MEMBER, lambda: [said(each, place) for each in commands]):
            assert remedy in told

    def test_a_file_that_cannot_be_read_is_no_wrong_argument(self, home: Path) -> None:
        bundle = home / "bundle"
        bundle.touch(mode=0o600)
        run("import", bundle, "--db", home / "db")
        as_user(OWNER, lambda: use(home / "own", number=1))
        assert f"error: {bundle} cannot be used" in as_user(
            OWNER, lambda: run("import", bundle, "--db", home / "own").stderr
        )


def said(line: str, place: Path) -> str:
    return run(*line.split(), "--db", place).stderr


def refusal(place: Path) -> tuple[str, str]:
    """Message and hint of the error with which the library refuses a database."""
    with pytest.raises(BackpromptError) as caught:
        bp.open(place)
    return caught.value.message, caught.value.hint


@needs_root
class TestReadOnly:
    def test_a_directory_that_its_owner_may_not_write_to_is_read(self, home: Path) -> None:
        place = home / "db"
        use_as(OWNER, place, number=1)
        for path in [place, *place.rglob("*")]:
            path.chmod(0o500 if path.is_dir() else 0o400)
        before = snapshot(place)
        assert use_as(OWNER, place, number=2) == READING
        assert snapshot(place) == before

    @pytest.mark.parametrize("user", [OWNER, 0])
    def test_a_filesystem_that_is_mounted_read_only_is_read(self, home: Path, user: int) -> None:
        place, mounted = home / "db", home / "mounted"
        use_as(OWNER, place, number=1)
        mounted.mkdir()
        bind = ["mount", "--bind", str(place), str(mounted)], ["mount", "-o", "remount,bind,ro", str(mounted)]
        if any(subprocess.run(each, check=False, capture_output=True).returncode for each in bind):
            pytest.skip("nothing can be mounted")
        try:
            assert use_as(user, mounted, number=2) == READING
        finally:
            subprocess.run(["umount", str(mounted)], check=True)  # noqa: S607

    def test_in_a_directory_of_somebody_else_nothing_is_made(self, home: Path) -> None:
        before = snapshot(home)
        for place in (home, home / "db"):
            assert use_as(MEMBER, place, number=1) == dict.fromkeys(ALL, "UnsafeLocation")
        assert snapshot(home) == before


def snapshot(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything that is in a directory, and of what kind and whose."""

    def content(path: Path) -> bytes:
        if path.is_symlink():
            return os.fsencode(path.readlink())
        return path.read_bytes() if path.is_file() else b""

    found = ((path, path.lstat()) for path in [directory, *sorted(directory.rglob("*"))])
    return {str(path): (status.st_mode, status.st_uid, content(path)) for path, status in found}


@needs_root
class TestFilesOfRoot:
    """Somebody has used the database with sudo."""

    def test_a_file_that_root_made_costs_writing_and_is_named_with_what_mends_it(self, home: Path) -> None:
        place = home / "db"
        use_as(OWNER, place, number=1)
        (place / "catalog.sqlite").unlink()
        with bp.open(place) as db:
            reindex(db)
        assert (place / "catalog.sqlite").owner() == "root"
        outcomes, told = as_user(OWNER, lambda: use_and_listen(place))
        assert outcomes == READING
        assert f"{place} is not writable: reading what is there, keeping nothing new: " in told
        assert f"{place / 'catalog.sqlite'} belongs to root:" in told
        assert f"with mode 0600, and you are {OWNER}" in told
        assert f"`chown {OWNER}:" in told
        assert f"`backprompt-db doctor --fix --db {place}`" in told
        diagnose(place, fix=True)
        outcomes, told = as_user(OWNER, lambda: use_and_listen(place))
        assert (outcomes, told) == (ALL, "")

    @pytest.mark.parametrize("name", ["manifest.json", "config.json", "store", "store/data.mdb"])
    def test_without_what_reading_needs_the_database_cannot_be_opened(self, home: Path, name: str) -> None:
        place = home / "db"
        use_as(OWNER, place, number=1)
        os.chown(place / name, 0, 0)
        assert use_as(OWNER, place, number=2) == NOTHING
        diagnose(place, fix=True)
        assert use_as(OWNER, place, number=2) == ALL

    def test_a_whole_database_that_root_made_is_given_to_a_group(self, home: Path) -> None:
        place = home / "db"
        create_database(place, sharing=Sharing.GROUP, group=str(GROUP))
        assert use(place, number=1) == ALL
        for number, user in enumerate([MEMBER, OWNER], start=2):
            assert use_as(user, place, number=number) == ALL
        assert use_as(STRANGER, place, number=9) == NOTHING


def use_and_listen(place: Path) -> tuple[dict[str, str], str]:
    """What comes of everything, and what is logged when the database is opened."""
    stream = io.StringIO()
    logger = logging.getLogger("backprompt_db.database.opening")
    logger.addHandler(logging.StreamHandler(stream))
    return use(place, number=7), stream.getvalue()


def with_modes(place: Path, *, folder: int, file: int) -> None:
    for path in [place, *place.rglob("*")]:
        path.chmod(folder if path.is_dir() else file)


@needs_root
class TestOpenModes:
    """The files let more people in than the way of sharing says."""

    @pytest.mark.parametrize("sharing", Sharing)
    def test_nobody_writes_prompts_into_the_database_of_somebody_who_does_not_share_it_with_them(
        self, home: Path, sharing: Sharing
    ) -> None:
        place = home / "db"
        as_user(OWNER, lambda: str(create_database(place, sharing=sharing)))
        use_as(OWNER, place, number=1)
        with_modes(place, folder=0o1777, file=0o666)
        before = snapshot(place)
        refused = f"belongs to {OWNER} and is not shared with {STRANGER}, and yet its files let you write"
        assert refused in as_user(STRANGER, lambda: refusal(place))[0]
        assert as_user(STRANGER, lambda: read_only(place)) == "right"
        assert snapshot(place).keys() == before.keys()
        assert use_as(OWNER, place, number=2) == ALL

    def test_members_of_the_group_that_shares_it_write(self, home: Path) -> None:
        place = home / "db"
        as_user(OWNER, lambda: str(create_database(place, sharing=Sharing.GROUP, group=str(GROUP))))
        use_as(OWNER, place, number=1)
        with_modes(place, folder=0o1777, file=0o666)
        assert use_as(STRANGER, place, number=2) == dict.fromkeys(ALL, "UnsafeLocation")
        assert use_as(MEMBER, place, number=2)["write"] == "kept"


def read_only(place: Path) -> str:
    with bp.open(place, mode="r", memory_nbytes=0) as db:
        return read(db)


def test_files_that_let_more_people_in_are_told_once_and_mended_by_the_doctor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "db"
    assert use(place, number=1) == ALL
    assert caplog.messages == []
    (place / "catalog.sqlite").chmod(0o644)
    place.chmod(0o755)
    for mode in "rara":
        bp.open(place, mode=mode).close()
    [message] = caplog.messages
    assert message.startswith(f"more people may use 2 files than private sharing says: {place} is ")
    assert message.endswith(f"`backprompt-db doctor --fix --db {place}` mends them")
    diagnose(place, fix=True)
    assert list(faults(place, Sharing.PRIVATE)) == []


PATHS = [
    "manifest.json", "manifest.lock", "config.json", "CACHEDIR.TAG", "store", "store/data.mdb", "store/lock.mdb",
    "store/turn.lock", "pending", "catalog.sqlite", "catalog.sqlite-journal", "catalog.sqlite.lock", "flights.lock",
    "turnstile.lock", "writing.lock", "collect.lock", "reindex.lock",
]  # fmt: skip
"""All that is made in the directory of a database."""

LATE = PATHS[PATHS.index("catalog.sqlite") :]
"""What is made when it is first needed."""


class TestPlantedLinks:
    """Somebody has put a link to a file of ours, or to where none is, in the place of a file that will be made."""

    @pytest.fixture
    def victims(self, tmp_path: Path) -> Path:
        (tmp_path / "victims" / "folder").mkdir(parents=True)
        (tmp_path / "victims" / "file").write_bytes(b"precious")
        (tmp_path / "victims" / "file").chmod(0o640)
        return tmp_path / "victims"

    def test_the_paths_are_all_that_there_are(self, tmp_path: Path) -> None:
        use(tmp_path / "db", number=1)
        with bp.open(tmp_path / "db") as db:
            reindex(db)
            made = {str(path.relative_to(tmp_path / "db")) for path in (tmp_path / "db").rglob("*")}
        assert made <= set(PATHS)
        assert set(PATHS) - made <= {"flights.lock"}, "which only a model that computes needs"

    @pytest.mark.parametrize("target", cases(["file", "folder", "nothing"], by_default=["file"]))
    @pytest.mark.parametrize("name", PATHS)
    def test_in_a_new_directory_nothing_is_written_through_one(
        self, tmp_path: Path, victims: Path, name: str, target: str
    ) -> None:
        planted = tmp_path / "db" / name
        planted.parent.mkdir(parents=True)
        planted.symlink_to(victims / target)
        before = snapshot(victims)
        outcomes = use(tmp_path / "db", number=1)
        assert snapshot(victims) == before
        assert outcomes == (dict.fromkeys(ALL, "UnsafeLocation") if planted.is_symlink() else ALL)

    @pytest.mark.parametrize("target", cases(["file", "folder", "nothing"], by_default=["file"]))
    @pytest.mark.parametrize("name", PATHS)
    def test_in_a_database_nothing_is_read_or_written_through_one(
        self, tmp_path: Path, victims: Path, name: str, target: str
    ) -> None:
        place = tmp_path / "db"
        assert use(place, number=1) == ALL
        plant(place / name, victims / target)
        before = snapshot(victims)
        outcomes = use(place, number=2)
        assert snapshot(victims) == before
        assert outcomes == dict.fromkeys(ALL, "UnsafeLocation")

    @pytest.mark.parametrize("target", cases(["file", "folder", "nothing"], by_default=["file"]))
    @pytest.mark.parametrize("name", LATE)
    def test_one_that_comes_while_the_database_is_open_is_not_followed_either(
        self, tmp_path: Path, victims: Path, name: str, target: str
    ) -> None:
        place = tmp_path / "db"
        with bp.open(place, memory_nbytes=0) as db:
            put_prompts(db, [0])
            plant(place / name, victims / target)
            before = snapshot(victims)
            for do in (lambda: reindex(db), lambda: remove_garbage(db), lambda: compact(db), db.flush):
                attempt(do)
            assert snapshot(victims) == before
            assert read(db) == "right"


def plant(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
