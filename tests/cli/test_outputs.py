"""What commands write: as a whole or not at all, for the owner alone, never through a link nor over a device."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.database.config import read_config
from backprompt_db.system import files
from tests.support.cli import run
from tests.support.faults import put_prompts

assert sys.platform != "win32"

OUTPUTS = [["tree", "--svg"], ["graph", "--out"], ["export", "--force"]]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    with bp.open(tmp_path / "db") as db:
        put_prompts(db, [0])
        assert db.catalog is not None
    return tmp_path / "db"


def write(command: list[str], out: Path, place: Path) -> str:
    """What a command says of what went wrong."""
    pieces = ["Context 0."] if command[0] == "tree" else []
    return run(command[0], *pieces, *command[1:], out, "--db", place).stderr


def fill_disk(patch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(files, "sync", refuse)


@pytest.mark.parametrize("command", OUTPUTS, ids=lambda command: command[0])
class TestOutputs:
    def test_only_the_owner_may_read_it_whatever_was_there(
        self, tmp_path: Path, place: Path, command: list[str]
    ) -> None:
        out = tmp_path / "out"
        out.write_text("old")
        out.chmod(0o666)
        assert write(command, out, place) == ""
        assert stat.S_IMODE(out.stat().st_mode) == 0o600
        assert out.read_bytes() != b"old"

    def test_a_full_disk_leaves_what_was_there(
        self, tmp_path: Path, place: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        out.write_text("old")
        with monkeypatch.context() as patch:
            fill_disk(patch)
            assert write(command, out, place).startswith(f"error: {out} cannot be ")
        assert out.read_text() == "old"
        assert {path.name for path in tmp_path.iterdir()} == {"db", "out"}

    def test_what_a_link_leads_to_is_not_written(self, tmp_path: Path, place: Path, command: list[str]) -> None:
        (tmp_path / "victim").write_text("precious")
        (tmp_path / "out").symlink_to(tmp_path / "victim")
        write(command, tmp_path / "out", place)
        assert (tmp_path / "victim").read_text() == "precious"

    def test_a_pipe_is_neither_waited_for_nor_replaced(self, tmp_path: Path, place: Path, command: list[str]) -> None:
        os.mkfifo(tmp_path / "out")
        assert "there and is not a file" in write(command, tmp_path / "out", place)
        assert (tmp_path / "out").is_fifo()


def test_a_configuration_that_does_not_fit_on_the_disk_is_an_error_with_a_hint(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_config(place)
    with monkeypatch.context() as patch:
        fill_disk(patch)
        answer = run("config", "--ttl", "30d", "--db", place)
    assert answer.stderr.startswith(f"error: {place / 'config.json'}: [Errno 28] No space left on device\nhint: Free ")
    assert read_config(place) == before
