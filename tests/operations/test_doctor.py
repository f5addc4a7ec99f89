"""`doctor`: each thing that can be wrong is found by its own check, with what mends it, and mended where it can be."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import pytest

import backprompt_db as bp
from backprompt_db.database.config import Config, write_config
from backprompt_db.database.opening import manifest_of
from backprompt_db.errors import StoreLocked, UnsafeLocation
from backprompt_db.operations import doctor_checks
from backprompt_db.operations.doctor import Check, diagnose
from backprompt_db.operations.doctor_checks import Finding, Status, Subject, probe
from backprompt_db.system import platform
from tests.support.cli import run
from tests.support.database_files import copies_after
from tests.support.operations import catalog_of, remove_row, run_prompts, stored_keys, verified

assert sys.platform != "win32"

NAMES = [
    "python", "libraries", "filesystem", "free space", "directory", "permissions", "writing", "store file", "leftovers",
    "limit", "secret", "catalog", "catalog lag", "clock",
]  # fmt: skip
_Answer = TypeVar("_Answer")

original, directory = copies_after(run_prompts)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def checks(directory: Path, *, fix: bool = False) -> dict[str, Check]:
    return {check.name: check for check in diagnose(directory, fix=fix)}


def unwell(directory: Path) -> list[str]:
    return [check.name for check in diagnose(directory) if check.status is not Status.OK]


def make_world_writable(directory: Path) -> None:
    directory.chmod(0o707)


def change_mode(directory: Path) -> None:
    (directory / "store" / "lock.mdb").chmod(0o644)
    catalog_of(directory).chmod(0o666)


def leave_files(directory: Path) -> None:
    (directory / "store" / ".compact-abc").mkdir()
    (directory / "store" / ".compact-abc" / "data.mdb").write_bytes(b"half")
    (directory / ".config.json.x1y2").write_text("{")
    old = time.time() - 7200
    for path in (
        *(directory / "store" / ".compact-abc").iterdir(), directory / "store" / ".compact-abc",
        directory / ".config.json.x1y2",
    ):  # fmt: skip
        os.utime(path, (old, old))


def lose_catalog(directory: Path) -> None:
    catalog_of(directory).unlink()


def garble_catalog(directory: Path) -> None:
    catalog_of(directory).write_bytes(b"garbage" * 999)


def fall_behind(directory: Path) -> None:
    for key in stored_keys(directory)[:2]:
        remove_row(directory, key)


def exceed_limit(directory: Path) -> None:
    write_config(directory, Config(max_nbytes=4096))


def garble_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    (directory / "config.json").chmod(0o600)


def use_in_future(directory: Path) -> None:
    with closing(sqlite3.connect(catalog_of(directory))) as connection:
        connection.execute("UPDATE representations SET last_used_at = ? WHERE num_tokens > 1", (time.time() + 86400,))
        connection.commit()


class TestChecks:
    def test_a_sound_database_is_well(self, directory: Path) -> None:
        found = checks(directory)
        assert list(found) == NAMES
        assert unwell(directory) == []
        assert all(check.what.endswith(".") and check.remedy is None for check in found.values())

    @pytest.mark.parametrize(
        ("harm", "names", "status", "what", "remedy"),
        [
            (make_world_writable, ["directory", "permissions", "writing"], Status.PROBLEM, "0707", "chmod o-w"),
            (change_mode, ["permissions"], Status.PROBLEM, "lock.mdb is root:root 0644 instead of", "--fix"),
            (leave_files, ["leftovers"], Status.WARNING, ".compact-abc", "--fix"),
            (lose_catalog, ["catalog", "catalog lag", "clock"], Status.WARNING, "is missing", "reindex"),
            (garble_catalog, ["catalog", "catalog lag", "clock"], Status.WARNING, "catalog", "reindex"),
            (fall_behind, ["catalog lag"], Status.WARNING, "2 parts are stored and not listed, 0 are", "reindex"),
            (exceed_limit, ["limit"], Status.WARNING, "of 4.0 KiB are in use", "evict"),
            (garble_config, ["limit"], Status.PROBLEM, "config.json cannot be read", "config --max-size"),
            (use_in_future, ["clock"], Status.WARNING, "in the future", "clocks"),
        ],
    )
    def test_what_is_wrong_is_found_where_it_is(
        self, directory: Path, harm: Callable[[Path], None], names: list[str], status: Status, what: str, remedy: str
    ) -> None:
        harm(directory)
        assert unwell(directory) == names
        check = checks(directory)[names[0]]
        assert check.status is status
        assert what.replace("root:root", _me()) in check.what
        assert remedy in (check.remedy or "")

    @pytest.mark.parametrize(
        "harm", [make_world_writable, change_mode, leave_files, lose_catalog, garble_catalog, fall_behind]
    )
    def test_what_can_be_mended_is_mended_and_said_so(self, directory: Path, harm: Callable[[Path], None]) -> None:
        harm(directory)
        before = unwell(directory)
        found = checks(directory, fix=True)
        assert {name for name in before if found[name].is_mended} == set(before) - {
            "writing",
            "catalog lag",
            "clock",
        } or (harm is fall_behind and found["catalog lag"].is_mended)
        assert unwell(directory) == []
        assert not any(check.is_mended for check in diagnose(directory, fix=True))
        assert verified(directory).is_clean

    def test_looking_changes_nothing(self, directory: Path) -> None:
        for harm in (change_mode, leave_files, fall_behind):
            harm(directory)
        before = snapshot(directory)
        diagnose(directory)
        assert snapshot(directory) == before

    def test_what_is_new_is_no_leftover(self, directory: Path) -> None:
        (directory / "store" / ".compact-abc").mkdir()
        (directory / ".manifest.json.tmp").touch()
        assert "leftovers" not in unwell(directory)
        old = time.time() - 7200
        (directory / "store" / ".compact-abc" / "data.mdb").touch()
        os.utime(directory / "store" / ".compact-abc", (old, old))
        assert "leftovers" not in unwell(directory), "its file was written to just now"

    @needs_root
    def test_files_that_root_made_are_named_and_given_back(self, directory: Path) -> None:
        for path in (directory, *directory.rglob("*")):
            os.chown(path, 65534, 65534)
        assert "permissions" not in unwell(directory)
        os.chown(catalog_of(directory), 0, 0)
        catalog_of(directory).chmod(0o644)
        what = checks(directory)["permissions"].what
        assert f"{catalog_of(directory)} is root:root 0644 instead of " in what
        assert what.endswith(" 0600.")
        diagnose(directory, fix=True)
        status = catalog_of(directory).stat()
        assert (status.st_uid, status.st_mode & 0o7777) == (65534, 0o600)
        assert {path.stat().st_uid for path in directory.rglob("*")} == {65534}

    @needs_root
    def test_who_may_not_mend_is_told_why(self, directory: Path) -> None:
        diagnose(directory)  # loads what the other user may not be able to load
        with tempfile.TemporaryDirectory() as place:
            Path(place).chmod(0o755)
            shared = Path(shutil.copytree(directory, Path(place) / "db"))
            for path in (shared, *shared.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            found = as_nobody(lambda: {check.name: check for check in diagnose(shared, fix=True)})
        assert "It could not be done now: [Errno 1]" in (found["permissions"].remedy or "")
        assert found["permissions"].status is Status.PROBLEM
        assert (found["writing"].status, found["catalog"].status) == (Status.WARNING, Status.OK)

    def test_a_symbolic_link_is_never_followed(self, directory: Path, tmp_path: Path) -> None:
        (tmp_path / "precious").touch(mode=0o644)
        (directory / "store" / "planted.lock").symlink_to(tmp_path / "precious")
        diagnose(directory, fix=True)
        assert (tmp_path / "precious").stat().st_mode & 0o777 == 0o644

    def test_nothing_is_looked_at_where_there_is_no_database(self, tmp_path: Path) -> None:
        with pytest.raises(UnsafeLocation):
            diagnose(tmp_path / "nothing")
        assert list(tmp_path.iterdir()) == []


def as_nobody(ask: Callable[[], _Answer]) -> _Answer:
    """What somebody without any rights is answered."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(theirs, pickle.dumps(ask()))
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as answer:
        found: _Answer = pickle.loads(answer.read())  # noqa: S301 - from our own child
    os.waitpid(child, 0)
    return found


def _me() -> str:
    import grp
    import pwd

    return f"{pwd.getpwuid(os.getuid()).pw_name}:{grp.getgrgid(os.getgid()).gr_name}"


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    names = (path for path in sorted(directory.rglob("*")) if path.name != "lock.mdb")  # readers have slots there
    return {str(path): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"") for path in names}


class TestProbe:
    def test_a_writer_that_was_stopped_does_not_stop_the_doctor(self, directory: Path) -> None:
        script = (
            "import lmdb, sys\n"
            "env = lmdb.open(sys.argv[1], map_size=1 << 30, lib_version=0)\n"
            "with env.begin(write=True):\n    print('in', flush=True)\n    sys.stdin.readline()"
        )
        command = [sys.executable, "-c", script, str(directory / "store")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "in\n"
            child.send_signal(signal.SIGSTOP)
            with pytest.raises(StoreLocked, match="somebody has been writing"):
                probe(directory / "store", timeout_seconds=0.7)
            child.kill()
        assert probe(directory / "store") == 0

    def test_slots_of_readers_that_were_killed_are_cleared_and_counted(self, directory: Path) -> None:
        script = (
            "import lmdb, os, signal, sys\n"
            "env = lmdb.open(sys.argv[1], map_size=1 << 30, lib_version=0)\n"
            "reading = env.begin()\nos.kill(os.getpid(), signal.SIGKILL)"
        )
        with bp.open(directory):  # else the next process to come would begin the list of readers anew
            subprocess.run([sys.executable, "-c", script, str(directory / "store")], check=False)
            assert probe(directory / "store") == 1
            assert probe(directory / "store") == 0

    def test_a_store_that_cannot_be_opened_is_a_problem(self, directory: Path) -> None:
        (directory / "store" / "data.mdb").write_bytes(b"garbage" * 999)
        assert checks(directory)["writing"].status is Status.PROBLEM


class TestSurroundings:
    @pytest.fixture
    def subject(self, directory: Path) -> Subject:
        return Subject(directory, manifest_of(directory))

    @pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
    def test_a_network_filesystem_is_a_problem(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
    ) -> None:
        mounts = tmp_path / "mountinfo"
        place = str(subject.directory.parent).replace(" ", "\\040")
        mounts.write_text(
            "22 1 8:1 / / rw - ext4 /dev/sda rw\n"
            f"23 22 0:44 / {place} rw,relatime shared:1 - {kind} server:/export rw\n"
            "24 22 0:45 / /elsewhere rw - tmpfs tmpfs rw\n"
        )
        monkeypatch.setattr(platform, "MOUNTS", mounts)
        found = doctor_checks.filesystem(subject)
        assert found.status is Status.PROBLEM
        assert kind in found.what
        mounts.write_text(mounts.read_text() + f"25 23 8:2 / {place} rw - xfs /dev/sdb rw\n")
        assert "xfs" in doctor_checks.filesystem(subject).what, "what is mounted later hides what was there"

    def test_missing_libraries_cost_computing_only(self, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
        found: Finding = doctor_checks.libraries(subject)
        assert (found.status, "torch" in found.what) == (Status.OK, True)
        monkeypatch.setattr(doctor_checks, "_NEEDED_TO_COMPUTE", ("a-library-that-nobody-has",))
        found = doctor_checks.libraries(subject)
        assert found.status is Status.WARNING
        assert "pip install a-library-that-nobody-has" in (found.remedy or "")

    def test_a_disk_that_is_nearly_full_is_a_warning(self, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
        assert doctor_checks.free_space(subject).status is Status.OK
        usage = shutil.disk_usage(subject.directory)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
        assert doctor_checks.free_space(subject).status is Status.WARNING
        write_config(subject.directory, Config(max_nbytes=1 << 19))
        assert doctor_checks.free_space(subject).status is Status.OK, "no more than the limit is needed"


class TestCommand:
    def test_a_table_for_people_and_json_for_programs(self, directory: Path) -> None:
        result = run("doctor", "--db", directory)
        assert result.exit_code == 0
        assert [name for name in NAMES if f"\n{name} " in result.stdout] == NAMES
        found = json.loads(run("doctor", "--db", directory, "--json").stdout)
        assert [list(check) for check in found] == [["name", "status", "what", "remedy", "is_mended"]] * len(NAMES)

    def test_a_warning_is_no_failure_and_a_problem_is_one(self, directory: Path) -> None:
        fall_behind(directory)
        assert run("doctor", "--db", directory).exit_code == 0
        change_mode(directory)
        result = run("doctor", "--db", directory, columns=200)
        assert result.exit_code == 1
        assert "lock.mdb" in result.stdout
        assert run("doctor", "--fix", "--db", directory).exit_code == 0
        assert "mended" not in run("doctor", "--db", directory).stdout


def test_a_damaged_page_of_the_store_is_found(directory: Path) -> None:
    data = directory / "store" / "data.mdb"
    content = bytearray(data.read_bytes())
    for position in range(2 * 4096, len(content), 4096):
        content[position] ^= 1  # the number with which a page begins
    data.write_bytes(content)
    found = checks(directory)["store file"]
    assert (found.status, "data.mdb" in found.what) == (Status.PROBLEM, True)
    assert "backup" in (found.remedy or "")
