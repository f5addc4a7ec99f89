"""The command line, command by command: in this process where that is enough."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command

import backprompt_db as bp
from backprompt_db.cli.app import app
from backprompt_db.cli.output import json_value
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Blob, Key
from backprompt_db.store.lmdb import LmdbStore
from tests.support.cli import CONTROL, LONG, SQL, run, run_json, run_prompts
from tests.support.database_files import copies_after
from tests.support.databases import address, new_part

COMMANDS = [
    "demo", "init", "config", "path", "stats", "ls", "show", "explain", "tree", "graph", "warm", "verify", "reindex",
    "doctor", "export", "import", "merge", "pin", "label", "evict", "compact", "purge",
]  # fmt: skip

ROW_FIELDS = [
    "address", "segment_id", "weights_id", "tokenizer_id", "model_name", "namespace", "text", "start", "num_tokens",
    "nbytes", "compute_seconds", "created_at", "last_used_at", "num_hits", "is_pinned", "label",
]  # fmt: skip
MODEL_FIELDS = [
    "weights_id", "name", "architecture", "dtype", "num_layers", "num_kv_heads", "head_dim", "vocab_size",
    "max_positions", "verdict", "mask_form", "max_error", "reason", "checked_with", "num_representations", "nbytes",
]  # fmt: skip

original, directory = copies_after(run_prompts)


def address_of(directory: Path, text: str) -> str:
    [address] = [row["address"] for row in run_json("ls", "--db", directory) if row["text"] == text]
    return str(address)


class TestHelp:
    def test_every_command_is_listed_but_the_hidden_one(self) -> None:
        registered = {command.name for command in app.registered_commands if not command.hidden}
        assert registered == set(COMMANDS)
        text = run("--help").stdout
        for command in COMMANDS:
            assert re.search(rf"^\W*{command} ", text, re.MULTILINE)
        assert "demo-run" not in text

    @pytest.mark.parametrize("command", [*COMMANDS, "demo-run"])
    def test_every_command_and_option_explains_itself(self, command: str) -> None:
        result = run(command, "--help", columns=200)
        assert result.exit_code == 0
        options = [line for line in result.stdout.splitlines() if re.search(r"\s--[a-z]", line) and "│" in line]
        assert options
        assert all(re.search(r"[a-z]{3,}.*\.\s*(\[.*\]\s*)?│$", line) for line in options), options

    @pytest.mark.parametrize("columns", [80, 110, 200])
    def test_help_fills_the_terminal(self, columns: int) -> None:
        for command in ["", *COMMANDS]:
            text = run(*command.split(), "--help", columns=columns).stdout
            assert max(map(len, text.splitlines())) <= columns
            lines = [line.strip() for line in text.partition("╭")[0].splitlines()]
            for line, following in itertools.pairwise(lines):
                first = following.partition(" ")[0]
                assert not line or not first or len(f" {line} {first} ") > columns, line

    def test_flags_have_no_type_and_choices_are_words_of_the_help(self) -> None:
        for command in ["", *COMMANDS]:
            options = run(*command.split(), "--help", columns=80).stdout.partition("╭─ Options")[2]
            assert "--help" in options
            assert not re.search("<[a-z]", options), command

    def test_an_option_has_one_help_text_in_all_commands(self) -> None:
        group: Any = get_command(app)
        found = defaultdict(set)
        for command in group.commands.values():
            for option in command.params:
                if option.param_type_name == "option" and not command.hidden:
                    found[tuple(option.opts)].add((option.metavar, option.help))
        several = {spellings: len(texts) for spellings, texts in found.items() if len(texts) > 1}
        # A model that the database knows, one to load or the demo's, marks or parts, requests or a share.
        assert several == {("--model",): 3, ("--remove",): 2, ("--sample",): 2}

    def test_without_a_command_the_help_is_shown(self) -> None:
        assert "Usage" in run().output

    def test_the_version_is_the_packages(self) -> None:
        assert run("--version").stdout == f"backprompt-db {bp.__version__}\n"


class TestPath:
    def test_it_is_the_option_the_variable_or_the_default(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BACKPROMPT_DB", str(tmp_path / "from variable"))
        assert run("path").stdout == f"{tmp_path / 'from variable'}\n"
        assert run("path", "--db", tmp_path / "given").stdout == f"{tmp_path / 'given'}\n"
        monkeypatch.delenv("BACKPROMPT_DB")
        assert Path(run("path").stdout.strip()).name == "backprompt-db"

    def test_a_name_that_is_not_utf8_comes_out_as_it_is(self, tmp_path: Path) -> None:
        name = os.fsencode(tmp_path) + b"/\xff\xfe"
        command = [os.fsencode(sys.executable), b"-m", b"backprompt_db", b"path", b"--db", name]
        assert subprocess.run(command, capture_output=True, check=True).stdout == name + b"\n"


class TestStats:
    def test_json_has_the_numbers(self, directory: Path) -> None:
        found = run_json("stats", "--db", directory)
        assert (found["num_representations"], found["num_models"], found["catalog_problem"]) == (5, 2, None)
        assert found["directory"] == str(directory)

    def test_people_get_the_same_numbers(self, directory: Path) -> None:
        text = run("stats", "--db", directory).stdout
        assert re.search(r"representations +5 ", text)
        assert re.search(r"format +1, exact", text)
        assert "KiB (scores" in text

    def test_without_a_catalog_it_counts_and_says_so(self, directory: Path) -> None:
        (directory / "catalog.sqlite").unlink()
        found = run_json("stats", "--db", directory)
        assert (found["num_representations"], found["num_hits"]) == (5, None)
        assert found["catalog_problem"]
        assert "Counted in the store" in run("stats", "--db", directory).stdout
        assert not (directory / "catalog.sqlite").exists()


class TestLs:
    def test_the_newest_come_first_and_the_limit_holds(self, directory: Path) -> None:
        rows = run_json("ls", "--db", directory)
        assert [list(row) for row in rows] == [ROW_FIELDS] * 5
        assert [row["created_at"] for row in rows] == sorted((row["created_at"] for row in rows), reverse=True)
        assert run_json("ls", "--db", directory, "--limit", "2") == rows[:2]
        assert {row["text"] for row in rows} >= {CONTROL, SQL, LONG}

    def test_nothing_that_a_terminal_obeys_is_printed(self, directory: Path) -> None:
        text = run("ls", "--db", directory, columns=200).stdout
        assert all(character.isprintable() for character in text.replace("\n", ""))
        assert r"a\x1b[31mred\x07 [bold]b[/bold] :smile: \u202ereversed\ttab" in text
        assert SQL in text

    @pytest.mark.parametrize("columns", [30, 80, 200])
    def test_lines_are_as_wide_as_the_terminal_at_most(self, directory: Path, columns: int) -> None:
        lines = run("ls", "--db", directory, columns=columns).stdout.splitlines()
        assert len(lines) == 6
        assert max(map(len, lines)) <= columns

    def test_short_addresses_are_those_that_show_takes(self, directory: Path) -> None:
        short = run("ls", "--db", directory).stdout.splitlines()[1].split()[0]
        assert len(run_json("show", short, "--db", directory)) == 1

    def test_models_are_listed_with_what_checking_them_has_shown(self, directory: Path) -> None:
        unchecked, checked = run_json("ls", "--models", "--db", directory)
        assert list(checked) == list(unchecked) == MODEL_FIELDS
        assert (unchecked["verdict"], unchecked["num_representations"]) == ("unchecked", 1)
        assert (checked["architecture"], checked["num_representations"]) == ("GPT2LMHeadModel", 4)
        text = run("ls", "--models", "--db", directory).stdout
        assert f"{checked['max_error']:.1e}" in text
        assert checked["verdict"] in text

    def test_namespaces_labels_and_models_are_listed_alone(
        self, directory: Path, open_db: Callable[..., bp.Database]
    ) -> None:
        with open_db(directory, namespace="tenant's") as db:
            db.put([new_part("another", namespace="tenant's")])
            db.flush()
            assert db.catalog is not None
            db.catalog.label([address("another", namespace="tenant's")], SQL)

        def texts(*options: str) -> list[str]:
            return [row["text"] for row in run_json("ls", "--db", directory, *options)]

        assert texts("--namespace", "tenant's") == texts("--label", SQL) == ["another"]
        assert len(texts("--namespace", "")) == 5
        assert sorted(texts("--model", (b"w" * 4).hex())) == sorted([LONG, "another"])
        assert sorted(texts("--model", "GPT2LMHeadModel")) == sorted(set(texts("--namespace", "")) - {LONG})
        assert texts("--model", "GPT2LMHeadModel", "--namespace", "tenant's") == []
        assert run("ls", "--db", directory, "--label", "nobody's").stdout == "Nothing matches all options.\n"
        assert run("ls", "--db", directory, "--model", "unknown").exit_code == 2

    def test_an_empty_catalog_lists_nothing(self, directory: Path) -> None:
        for name in ("scores", "logits", "kv"):
            with contextlib.closing(LmdbStore(directory / "store")) as store:
                store.delete([key for key, _ in store.keys() if key.part is Part[name.upper()]])
        run("reindex", "--db", directory)
        assert run_json("ls", "--db", directory) == []
        assert "no representations" in run("ls", "--db", directory).stdout

    @pytest.mark.parametrize("arguments", [["ls"], ["ls", "--models"], ["show", "ab"]])
    def test_a_missing_catalog_is_an_error_that_names_the_remedy(self, directory: Path, arguments: list[str]) -> None:
        (directory / "catalog.sqlite").unlink()
        result = run(*arguments, "--db", directory)
        assert result.exit_code == 2
        assert "reindex" in result.stderr
        assert not (directory / "catalog.sqlite").exists()


assert sys.platform != "win32"


class TestVerifyAndReindex:
    def test_a_clean_database_exits_with_zero(self, directory: Path) -> None:
        result = run("verify", "--db", directory)
        assert result.exit_code == 0
        assert "13 parts read" in result.stdout
        assert run_json("verify", "--db", directory)["problems"] == []

    def test_problems_are_listed_and_exit_with_their_codes_until_they_are_mended(self, directory: Path) -> None:
        foreign = "5a" * 32
        with contextlib.closing(LmdbStore(directory / "store")) as store:
            key = next(key for key, _ in store.keys())
            blob = bytes(store.get(key) or b"")
            store.delete([key])
            store.put([Blob(Key(Address(bytes.fromhex(foreign)), key.part), blob)])
        result = run("verify", "--db", directory, "--json")
        found = json.loads(result.stdout)
        assert result.exit_code == 1 + 8
        assert [list(problem) for problem in found["problems"]] == [["address", "part", "kind", "detail"]] * 2
        assert {(problem["kind"], problem["address"]) for problem in found["problems"]} == {
            ("misplaced", foreign), ("missing", key.address.hex()),
        }  # fmt: skip
        result = run("verify", "--db", directory)
        assert result.exit_code == 8
        assert f"missing: kv of {key.address.hex()}" in result.stdout
        assert run_json("reindex", "--db", directory) == {
            "num_added": 0, "num_forgotten": 1, "num_unreadable": 0, "moved_aside": None, "num_changed_rows": 0,
        }  # fmt: skip
        assert run("verify", "--db", directory).exit_code == 0

    def test_a_garbage_catalog_is_found_and_rebuilt(self, directory: Path) -> None:
        before = run_json("stats", "--db", directory)
        (directory / "catalog.sqlite").write_bytes(b"garbage" * 999)
        result = run("verify", "--db", directory)
        assert result.exit_code == 8
        assert "catalog" in result.stdout
        done = run("reindex", "--db", directory)
        assert done.exit_code == 0
        assert "catalog.sqlite.damaged-" in done.stdout
        assert "13 parts added" in done.stdout
        after = run_json("stats", "--db", directory)
        for name in ("num_representations", "num_segments", "num_models", "num_tokens", "nbytes"):
            assert after[name] == before[name]

    def test_parts_that_cannot_be_used_are_mentioned(self, directory: Path) -> None:
        with contextlib.closing(LmdbStore(directory / "store")) as store:
            store.put([Blob(Key(Address(b"\x5a" * 32), Part.KV), b"not a part")])
        assert "1 part cannot be used" in run("reindex", "--db", directory).stdout

    def test_a_terminal_gets_a_progress_bar(self, directory: Path) -> None:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "backprompt_db", "verify", "--db", str(directory)]
        environment = os.environ | {"TERM": "xterm"}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True, env=environment)
        os.close(theirs)
        shown = os.read(ours, 1 << 16)
        os.close(ours)
        assert b"Verifying" in shown
        assert b"13 parts read" in done.stdout


class TestDemo:
    def test_options_are_handed_on(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        calls = list[dict[str, object]]()

        def record(**options: object) -> int:
            calls.append(options)
            return 7

        monkeypatch.setitem(sys.modules, "backprompt_db.cli.demo.run", SimpleNamespace(run_demo=record))
        monkeypatch.setitem(
            sys.modules, "backprompt_db.cli.demo.job", SimpleNamespace(run_once=record, choose_once=record)
        )
        assert run("demo").exit_code == 7
        assert run("demo", "--model", "m", "--dir", tmp_path, "--requests", "3", "--sample", "0").exit_code == 7
        assert run("demo-run", "--model", "m", "--dir", tmp_path).exit_code == 7
        assert calls == [
            {"model": "gpt2", "directory": None, "num_requests": None, "sample": 8},
            {"model": "m", "directory": tmp_path, "num_requests": 3, "sample": 0},
            {"model": "m", "directory": tmp_path, "num_requests": None},
        ]


def test_what_json_lacks_becomes_what_it_has() -> None:
    value = {Part.KV: (b"\xff", Path("/x"), float("nan"), float("inf"), 1.5, None, True)}
    assert json_value(value) == {"kv": ["ff", "/x", None, None, 1.5, None, True]}
