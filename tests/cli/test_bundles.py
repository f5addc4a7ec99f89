"""Bundles on the command line: files, pipes, options and messages."""

from __future__ import annotations

import json
import os
import re
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backprompt_db.cli.options import duration_seconds
from tests.support.bundles import SUBJECTS, description, run_prompts, tar_of
from tests.support.cli import run, run_json
from tests.support.database_files import copies_after
from tests.support.operations import verified

assert sys.platform != "win32"

original, directory = copies_after(run_prompts)


@pytest.fixture
def other(open_db: Any) -> Path:
    db = open_db()
    db.close()
    return Path(db.directory)


@pytest.fixture
def bundle(directory: Path, tmp_path: Path) -> Path:
    assert run("export", tmp_path / "all.bundle", "--db", directory).exit_code == 0
    return tmp_path / "all.bundle"


def test_exports_and_imports(directory: Path, other: Path, tmp_path: Path) -> None:
    done = run("export", tmp_path / "x.bundle", "--db", directory)
    assert done.exit_code == 0, done.output
    assert "6 representations exported, 18 parts, " in done.stdout
    first = run("import", tmp_path / "x.bundle", "--db", other)
    assert re.match(r"18 parts stored, [0-9.]+ KiB; 0 were there already\.", first.stdout)
    assert "0 parts stored, 0 B; 18 were there already." in run("import", tmp_path / "x.bundle", "--db", other).stdout
    assert verified(other).is_clean


def test_json_has_these_fields(directory: Path, other: Path, tmp_path: Path) -> None:
    done = run_json("export", tmp_path / "x", "--db", directory)
    assert list(done) == [
        "num_representations", "num_parts", "nbytes", "num_orphaned", "num_unusable", "catalog_problem"
    ]  # fmt: skip
    done = run_json("import", tmp_path / "x", "--db", other)
    assert list(done) == [
        "num_stored", "nbytes_stored", "num_known", "num_orphaned", "catalog_problem", "num_unusable",
        "source_problem",
    ]  # fmt: skip


def test_selects_by_options(directory: Path, tmp_path: Path) -> None:
    def num_selected(*options: str) -> int:
        return int(run_json("export", tmp_path / "x", "--force", "--db", directory, *options)["num_representations"])

    assert num_selected() == num_selected("--used-within", "1h") == num_selected("--namespace", "") == 6
    assert num_selected("--text-prefix", SUBJECTS[0]) == 3
    for nothing in (["--older-than", "30d"], ["--label", "x"], ["--namespace", "x"], ["--text-prefix", "x"]):
        result = run("export", tmp_path / "y", "--db", directory, *nothing)
        assert (result.exit_code, "error: nothing is selected" in result.stderr) == (2, True)
    assert not (tmp_path / "y").exists()
    assert run("export", tmp_path / "y", "--db", directory, "--older-than", "soon").exit_code == 2


def test_writes_a_file_for_its_owner_alone_whatever_the_umask(directory: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run("export", tmp_path / "x", "--db", directory)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["x"]


def test_overwrites_nothing_unless_told_to(directory: Path, tmp_path: Path) -> None:
    out, link, kept = tmp_path / "x", tmp_path / "link", tmp_path / "kept"
    out.write_text("precious")
    kept.write_text("precious")
    link.symlink_to(kept)
    result = run("export", out, "--db", directory)
    assert (result.exit_code, out.read_text()) == (2, "precious")
    assert "is there already\nhint: Give another name, or --force to overwrite it." in result.stderr
    assert run("export", out, "--db", directory, "--force").exit_code == 0
    assert out.stat().st_size > 1000
    for path in (link, tmp_path, Path("/dev/null")):
        assert "is not a file" in run("export", path, "--db", directory, "--force").stderr
    assert kept.read_text() == "precious"


def test_leaves_no_file_when_it_fails(directory: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "missing" / "x", tmp_path / ("x" * 250)):
        result = run("export", out, "--db", directory)
        assert result.exit_code == 2
        assert "cannot be used" in result.stderr
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


def test_a_file_that_cannot_grow_is_an_error_and_leaves_nothing(directory: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    command = [sys.executable, "-m", "backprompt_db", "export", str(tmp_path / "x"), "--db", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, preexec_fn=limit)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'x'} cannot be used: File too large\nhint: ")
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


def test_a_bundle_that_ends_early_is_an_error(bundle: Path, other: Path) -> None:
    bundle.write_bytes(bundle.read_bytes()[:-3000])
    result = run("import", bundle, "--db", other)
    assert result.exit_code == 2
    assert re.search(r"error: the bundle ends early.* Before that, 1\d parts were stored\nhint: ", result.stderr)


def test_control_characters_of_a_bundle_are_escaped(tmp_path: Path, other: Path) -> None:
    (tmp_path / "x").write_bytes(tar_of([("\x1b[31mred", b"")]))
    (tmp_path / "y").write_bytes(tar_of([description(), ("\x1b[31mred", b"")]))
    for name in ("x", "y"):
        result = run("import", tmp_path / name, "--db", other)
        assert result.exit_code == 2
        assert "\x1b" not in result.output


def test_says_what_it_cannot_read(tmp_path: Path, other: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        result = run("import", path, "--db", other)
        assert (result.exit_code, "cannot be used" in result.stderr) == (2, True)
    result = run("merge", tmp_path / "nowhere", "--db", other)
    assert f"there is no database in {tmp_path / 'nowhere'}" in result.stderr
    assert "--db" not in result.stderr
    assert "there is no database" in run("import", tmp_path / "none", "--db", tmp_path / "nowhere").stderr


def test_dashes_are_standard_streams(directory: Path, other: Path) -> None:
    program = [sys.executable, "-m", "backprompt_db"]
    sending = [*program, "export", "-", "--json", "--db", str(directory)]
    receiving = [*program, "import", "-", "--json", "--db", str(other)]
    with (
        subprocess.Popen(sending, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as export,
        subprocess.Popen(receiving, stdin=export.stdout, stdout=subprocess.PIPE) as import_,
    ):
        assert export.stderr is not None
        assert json.loads(export.stderr.read())["num_parts"] == 18
        assert json.loads(import_.communicate(timeout=300)[0])["num_stored"] == 18
    assert (export.returncode, import_.returncode) == (0, 0)
    assert verified(other).is_clean


@pytest.mark.parametrize("wrong", ["", "5", "-3d", "3 weeks", "1e3s", "infd", "nan s", "٣d", "1" * 30 + "s"])
def test_what_is_no_length_of_time_is_refused(wrong: str) -> None:
    with pytest.raises(Exception, match="not a length of time"):
        duration_seconds(wrong)
