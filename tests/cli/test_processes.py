"""How the command line fails, what it prints where and what it imports: mostly as processes of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backprompt_db.cli import main
from backprompt_db.operations import stats as stats_module
from tests.support.cli import run, run_prompts
from tests.support.database_files import copies_after
from tests.support.scripts import run_in_a_process

original, directory = copies_after(run_prompts)

SAID_OF_AN_INTERRUPT = "interrupted\nhint: The same command may be run again.\n"


def run_process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options.pop("python", []), "-m", "backprompt_db", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


class TestFailure:
    @pytest.mark.parametrize("command", ["stats", "ls", "show 00", "verify", "reindex", "doctor"])
    def test_a_directory_that_is_not_there_is_one_line_and_a_hint(self, tmp_path: Path, command: str) -> None:
        result = run(*command.split(), "--db", tmp_path / "nothing")
        assert (result.exit_code, result.stdout) == (2, "")
        assert re.fullmatch(r"error: there is no database in .*\nhint: .*\n", result.stderr)
        assert not (tmp_path / "nothing").exists()

    @pytest.mark.parametrize("command", ["stats", "ls", "show 00", "verify", "reindex", "doctor"])
    def test_a_directory_of_something_else_is_left_alone(self, tmp_path: Path, command: str) -> None:
        (tmp_path / "thesis.tex").touch()
        result = run(*command.split(), "--db", tmp_path)
        assert result.exit_code == 2
        assert "not a backprompt-db database" in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_damaged_store_is_an_error_of_one_line(self, directory: Path) -> None:
        (directory / "store" / "data.mdb").write_bytes(b"")
        for command in ("verify", "reindex"):
            result = run(command, "--db", directory)
            assert result.exit_code == 2
            assert re.fullmatch(r"error: .*\nhint: .*\n", result.stderr)

    def test_an_error_is_one_line_whatever_the_directory_is_called(self, tmp_path: Path) -> None:
        result = run("stats", "--db", tmp_path / "two\nlines\x1b[31m")
        assert result.stderr.count("\n") == 2
        assert "\x1b" not in result.stderr

    def test_a_wrong_option_is_exit_code_two(self) -> None:
        assert run("ls", "--limit", "0").exit_code == 2
        assert run("unknown").exit_code == 2

    def test_ctrl_c_is_exit_code_130(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(stats_module, "gather", interrupt)
        result = run("stats", "--db", directory)
        assert (result.exit_code, result.stderr) == (130, SAID_OF_AN_INTERRUPT)
        monkeypatch.setitem(sys.modules, "backprompt_db.cli.app", SimpleNamespace(app=interrupt))
        with pytest.raises(SystemExit) as caught:
            main()
        assert (caught.value.code, capsys.readouterr().err) == (130, SAID_OF_AN_INTERRUPT)

    @pytest.mark.parametrize("command", [["ls", "--json"], ["ls"], ["stats"], ["path"]])
    def test_a_reader_that_stops_reading_is_no_error(self, directory: Path, command: list[str]) -> None:
        ours, theirs = os.pipe()
        os.close(ours)
        arguments = [sys.executable, "-m", "backprompt_db", *command, "--db", str(directory)]
        done = subprocess.run(arguments, stdout=theirs, stderr=subprocess.PIPE, check=False)
        os.close(theirs)
        assert done.stderr == b""
        assert done.returncode == 141

    def test_a_terminal_that_lacks_a_character_still_gets_the_answer(self, directory: Path) -> None:
        done = run_process("ls", "--db", directory, env=os.environ | {"PYTHONIOENCODING": "latin-1", "COLUMNS": "100"})
        assert done.returncode == 0
        assert "\\u2026" in done.stdout

    def test_output_that_is_no_terminal_has_no_colour(self, directory: Path) -> None:
        for command in (["ls"], ["doctor"], ["--help"]):
            options = [] if command == ["--help"] else ["--db", str(directory)]
            assert "\x1b" not in run_process(*command, *options).stdout


COMMANDS = ["--help", "--version", "path", "stats", "stats --openmetrics"]
COMMANDS_ON_THE_CATALOG = ["ls", "ls --models", "show 0", "verify", "verify --structure", "reindex", "doctor"]

IMPORTED = """
import json, sys
from typer.testing import CliRunner
from backprompt_db.cli.app import app
imported = {}
for command in sys.argv[1:]:
    CliRunner().invoke(app, command.split())
    imported[command] = [name for name in ("torch", "transformers", "tokenizers", "sqlalchemy") if name in sys.modules]
print(json.dumps(imported))
"""


def test_no_command_but_the_demo_imports_torch_and_only_those_on_the_catalog_import_sqlalchemy(
    directory: Path,
) -> None:
    """One process runs all of them, one after the other."""
    commands = [
        command if command.startswith("--") else f"{command} --db {directory}"
        for command in COMMANDS + COMMANDS_ON_THE_CATALOG
    ]
    imported = list(run_in_a_process(IMPORTED, *commands).values())
    assert imported == [[]] * len(COMMANDS) + [["sqlalchemy"]] * len(COMMANDS_ON_THE_CATALOG)
