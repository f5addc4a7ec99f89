"""What the library does on systems that this one is not: the branches of `system/platform.py`."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import backprompt_db as bp
from backprompt_db.database.location import require_local
from backprompt_db.database.single_flight import SingleFlight
from backprompt_db.errors import UnsafeLocation
from backprompt_db.prompt.ids import Address
from backprompt_db.system import locks, platform
from backprompt_db.system.platform import UNKNOWN, filesystem_of

ROOT = Path(__file__).parents[2]

WINDOWS = """
import os, pathlib, signal, sys
import subprocess, tempfile
import alembic.command, blake3, lmdb, numpy, platformdirs, psutil, rich.progress, rich.table, safetensors, tqdm
import sqlalchemy.dialects.sqlite.pysqlite, typer.testing, xxhash
from filelock import FileLock, SoftFileLock
from huggingface_hub import try_to_load_from_cache

for name in ("fcntl", "grp", "pwd", "resource"):
    sys.modules[name] = None  # importing it raises ImportError
for name in (
    "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_PATH", "chown", "fchmod", "fchown", "fork", "getegid", "geteuid",
    "getgroups", "posix_fallocate", "pread", "pwrite", "register_at_fork", "setpriority", "statvfs",
):
    delattr(os, name)
for name in ("SIGKILL", "SIGPIPE", "SIGSTOP"):
    delattr(signal, name)
sys.platform = "win32"

import backprompt_db as bp
from backprompt_db.errors import UnsafeLocation
from tests.package import smoke
"""
"""What a process on Windows lacks is taken away, after the libraries that have their own ways there were imported."""


def on_windows(script: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error", "-c", WINDOWS + script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestWindows:
    def test_a_database_in_memory_works(self) -> None:
        on_windows("smoke.check_ids()\nsmoke.check_memory()")

    def test_a_directory_is_refused_and_nothing_is_made(self, tmp_path: Path) -> None:
        script = """
for mode in "ra":
    try:
        bp.open(sys.argv[1], mode=mode)
    except UnsafeLocation as error:
        print(error)
"""
        said = on_windows(script, tmp_path / "db").splitlines()
        assert len(said) == 2
        for line in said:
            assert str(tmp_path / "db") in line
            assert "win32" in line
            assert "Windows Subsystem for Linux" in line
        assert list(tmp_path.iterdir()) == []

    def test_commands_say_so_too(self, tmp_path: Path) -> None:
        script = """
from backprompt_db.cli.app import app
for words in (["init"], ["stats", "--db"], ["ls", "--db"], ["verify", "--db"], ["doctor", "--db"]):
    done = typer.testing.CliRunner().invoke(app, [*words, sys.argv[1]])
    print(done.exit_code, "Windows Subsystem for Linux" in done.output)
"""
        assert on_windows(script, tmp_path / "db").splitlines() == ["2 True"] * 5
        assert list(tmp_path.iterdir()) == []

    def test_every_module_that_needs_no_model_can_be_imported(self) -> None:
        script = """
root = pathlib.Path(bp.__file__).parent
for room in ("errors", "system", "views", "prompt", "catalog", "store", "codec", "database", "operations", "cli"):
    for path in [root / f"{room}.py", *(root / room).rglob("*.py")]:
        if path.exists():
            __import__(".".join(path.relative_to(root.parent).with_suffix("").parts))
print("torch" in sys.modules)
"""
        assert on_windows(script).split() == ["False"]


class TestMacOS:
    def test_the_filesystem_is_that_of_the_nearest_mount(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        mounts = [
            ("/", "apfs"),
            (str(tmp_path), "smbfs"),
            (str(tmp_path / "disk"), "hfs"),
            (str(tmp_path / "d"), "nfs"),
        ]
        listed = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in mounts]
        monkeypatch.setattr(psutil, "disk_partitions", lambda **_: listed)
        assert filesystem_of(tmp_path / "disk" / "db") == "hfs"
        assert filesystem_of(tmp_path.parent) == "apfs"
        with pytest.raises(UnsafeLocation, match="network filesystem \\(smbfs\\)"):
            require_local(tmp_path / "else")

    def test_a_filesystem_that_nobody_knows_is_taken_for_local(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def fail(**_: object) -> Any:
            raise PermissionError

        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(psutil, "disk_partitions", fail)
        assert filesystem_of(tmp_path) == UNKNOWN
        require_local(tmp_path)

    def test_without_locks_on_bytes_nobody_waits(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(locks, "HAS_BYTE_LOCKS", False)
        claims = SingleFlight(tmp_path / "flights.lock").claims()
        assert claims.take(Address(b"a" * 32))
        claims.close()
        assert "this system has no open file description locks" in caplog.text
        assert list(tmp_path.iterdir()) == []

    def test_it_is_asked_without_them_too_whether_a_byte_is_locked(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        held = locks.ByteLocks(tmp_path / "some.lock")
        assert held.try_lock(7)
        monkeypatch.setattr(platform, "HAS_BYTE_LOCKS", False)
        assert locks.is_locked(tmp_path / "some.lock", 7)
        assert not locks.is_locked(tmp_path / "some.lock", 8)
        held.close()
        assert not locks.is_locked(tmp_path / "some.lock", 7)

    def test_a_database_is_used_as_on_linux(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from tests.package import smoke

        reserved = []
        monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: reserved.append(arguments))
        monkeypatch.setattr(os, "setpriority", lambda *arguments: reserved.append(arguments))
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(platform, "HAS_BYTE_LOCKS", False)
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", 0, raising=False)
        with bp.open(tmp_path / "db") as db:
            smoke.put(db)
            smoke.check_parts(db)
        assert reserved == []
