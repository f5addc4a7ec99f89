"""`backprompt-db warm`: prompts out of files, what is wrong with them, and what is stored when it is interrupted."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import backprompt_db as bp
from backprompt_db.cli.app import app
from backprompt_db.compute.batch.run_plan import RunPlan, Warmed
from tests.conftest import tiny_gpt2
from tests.support.cli import run

assert sys.platform != "win32"

TEMPLATE = r"Pick the endpoint.\nRequest: {request}\nEndpoint:"
REQUESTS = ["show me everyone", "create an order", 'say "hello"']
WARMED_FIELDS = [*Warmed.__dataclass_fields__, "num_left_out", "left_out"]
SECONDS = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The directory of a model."""
    directory = tmp_path_factory.mktemp("models") / "model"
    tiny_gpt2().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write(
        tmp_path / "requests.jsonl", "".join(json.dumps({"request": each, "id": 7}) + "\n" for each in REQUESTS)
    )


@pytest.fixture
def warm(tmp_path: Path, model: Path) -> Callable[..., Result]:
    """Run the command on a database of the test."""
    return lambda *arguments: run("warm", "--db", tmp_path / "db", model, *arguments)


@pytest.fixture
def warm_json(warm: Callable[..., Result]) -> Callable[..., Any]:
    def warm_json(*arguments: str | Path) -> Any:
        result = warm(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return warm_json


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def stored_texts(directory: Path) -> set[str]:
    with bp.open(directory, mode="r") as db:
        assert db.catalog is not None
        return {row.text for row in db.catalog.rows()}


class TestFiles:
    def test_rows_of_json_fill_a_template_and_are_stored(
        self, warm_json: Callable[..., Any], jsonl: Path, model: Path, tmp_path: Path
    ) -> None:
        found = warm_json(jsonl, "--template", TEMPLATE)
        assert list(found) == WARMED_FIELDS
        assert (found["num_texts"], found["num_stored_texts"], found["num_left_out"]) == (3, 0, 0)
        with bp.open(tmp_path / "db") as db:
            lm = bp.LanguageModel.from_pretrained(str(model), db=db)
            template = bp.Template("Pick the endpoint.\nRequest: {request}\nEndpoint:")
            lm([template.text({"request": each}) for each in REQUESTS])
            assert not lm.is_loaded
        assert warm_json(jsonl, "--template", TEMPLATE)["num_stored_texts"] == 3

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("rows.jsonl", '{"request": "one"}\n\n{"request": "two\\nlines"}\n'),
            ("rows.csv", 'id,request\r\n1,one\r\n\r\n2,"two\nlines"\r\n'),
            ("rows.tsv", '\ufeffrequest\tid\none\t1\n"two\nlines"\t2\n'),
            (
                "rows.NDJSON",
                '\ufeff{"request": "one"}\r\n{"request": "two\\nlines", "tags": [1], "is": true, "no": null}',
            ),
        ],
    )
    def test_each_form_is_read(self, warm: Callable[..., Result], tmp_path: Path, name: str, content: str) -> None:
        result = warm(write(tmp_path / name, content), "--template", "{request}")
        assert result.exit_code == 0, result.output
        assert stored_texts(tmp_path / "db") == {"one", "two\nlines"}

    def test_plain_lines_and_strings_of_json_are_prompts(self, warm: Callable[..., Result], tmp_path: Path) -> None:
        lines = write(tmp_path / "prompts.txt", "first \r\n\n second")
        strings = write(tmp_path / "prompts.jsonl", '"third\\n"\n{"prompt": "fourth", "text": "no"}\n')
        assert warm(lines, strings).exit_code == 0
        assert stored_texts(tmp_path / "db") == {"first ", " second", "third\n", "fourth"}

    def test_stdin_is_read_in_the_form_that_is_given(self, model: Path, tmp_path: Path) -> None:
        arguments = ["warm", "--db", str(tmp_path / "db"), str(model), "-", "--format", "csv"]
        result = CliRunner().invoke(app, arguments, input='text\n"a, b"\n')
        assert result.exit_code == 0, result.output
        assert stored_texts(tmp_path / "db") == {"a, b"}

    def test_numbers_are_text(self, warm: Callable[..., Result], jsonl: Path, tmp_path: Path) -> None:
        assert warm(jsonl, "--template", "Number {id}", "--limit", "1").exit_code == 0
        assert stored_texts(tmp_path / "db") == {"Number", " 7"}

    def test_what_cannot_be_read_is_an_error(self, warm: Callable[..., Result], tmp_path: Path) -> None:
        result = warm(tmp_path / "none.jsonl")
        assert result.exit_code == 2
        assert "none.jsonl cannot be read" in result.stderr


class TestTemplates:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--template", TEMPLATE], ["Pick the endpoint.\nRequest:", " show me everyone\nEndpoint:"]),
            (
                ["--template", "Request:", "--template", r" {request}\nEndpoint:"],
                ["Request:", " show me everyone\nEndpoint:"],
            ),
            (["--template", "A|B {request}|C", "--separator", "|"], ["A", "B show me everyone", "C"]),
            (["--template", "A {request}", "--separator", "|"], ["A show me everyone"]),
        ],
    )
    def test_segments_are_cut_as_told(
        self, warm: Callable[..., Result], jsonl: Path, tmp_path: Path, options: list[str], expected: list[str]
    ) -> None:
        assert warm(jsonl, *options, "--limit", "1").exit_code == 0
        assert stored_texts(tmp_path / "db") == set(expected)

    def test_an_unknown_column_is_named_with_those_that_are_there(
        self, warm: Callable[..., Result], jsonl: Path
    ) -> None:
        result = warm(jsonl, "--template", "{question}")
        assert result.exit_code == 2
        assert "requests.jsonl, line 1: there is no column 'question'. There are: request, id." in result.stderr

    def test_which_column_is_the_prompt_must_be_said_where_several_may_be(
        self, warm: Callable[..., Result], jsonl: Path
    ) -> None:
        result = warm(jsonl)
        assert result.exit_code == 2
        assert "nothing says which column is the prompt: request, id" in result.stderr

    def test_what_is_no_template_is_refused(self, warm: Callable[..., Result], jsonl: Path) -> None:
        assert warm(jsonl, "--template", "{request").exit_code == 2


class TestCompletions:
    def test_they_come_from_options_and_a_file(
        self, warm_json: Callable[..., Any], jsonl: Path, model: Path, tmp_path: Path
    ) -> None:
        labels = write(tmp_path / "labels.txt", " POST /orders\n GET /users\n")
        found = warm_json(
            jsonl, "--template", TEMPLATE, "--completion", r" none\n", "--completions", labels, "--batch-size", "2"
        )
        assert found["num_texts"] == 3
        with bp.open(tmp_path / "db") as db:
            lm = bp.LanguageModel.from_pretrained(str(model), db=db)
            template = bp.Template("Pick the endpoint.\nRequest: {request}\nEndpoint:")
            texts = [template.text({"request": each}) for each in REQUESTS]
            lm.score(texts, [" none\n", " POST /orders", " GET /users"])
            assert not lm.is_loaded

    def test_only_what_is_asked_of_prompts_is_kept(
        self, warm: Callable[..., Result], jsonl: Path, tmp_path: Path
    ) -> None:
        assert warm(jsonl, "--template", TEMPLATE, "--keep", "scores").exit_code == 0
        with bp.open(tmp_path / "db", mode="r") as db:
            assert {key.part.name for key, _ in db.store.keys()} == {"SCORES"}
        assert warm(jsonl, "--template", TEMPLATE, "--keep", "everything").exit_code == 2


class TestDryRun:
    def test_it_prints_the_plan_and_loads_no_weights(
        self, warm: Callable[..., Result], warm_json: Callable[..., Any], jsonl: Path
    ) -> None:
        assert warm(jsonl, "--template", TEMPLATE, "--limit", "1").exit_code == 0
        foretold = warm_json(jsonl, "--template", TEMPLATE, "--dry-run")
        assert list(foretold) == [*RunPlan.__dataclass_fields__, "num_left_out", "left_out"]
        assert (foretold["num_texts"], foretold["num_stored_texts"]) == (3, 1)
        assert foretold["seconds"] > 0
        people = warm(jsonl, "--template", TEMPLATE, "--dry-run")
        assert "3, 1 stored already" in people.stdout
        done = warm_json(jsonl, "--template", TEMPLATE)
        assert (done["num_computed_tokens"], done["num_passes"]) == (
            foretold["num_missing_tokens"], foretold["num_passes"]
        )  # fmt: skip


class TestBrokenRows:
    BROKEN = (
        b'{"request": "one"}\n'
        b"not json\n"
        b"[1]\n"
        b'{"other": "x"}\n'
        b"\xff\xfe\n"
        b'{"request": ""}\n'
        b'{"request": "\\ud800"}\n'
        b'{"request": "' + b"0123456789" * 30 + b'"}\n'
        b'{"request": "two"}\n'
    )

    def test_the_first_ends_it_with_its_file_and_line(self, warm: Callable[..., Result], tmp_path: Path) -> None:
        result = warm(write(tmp_path / "rows.jsonl", self.BROKEN), "--template", "{request}")
        assert result.exit_code == 2
        assert "rows.jsonl, line 2: it is not JSON, from character 1 on" in result.stderr
        assert "--skip-errors" in result.stderr

    def test_skipped_ones_are_counted_and_listed(
        self, warm: Callable[..., Result], warm_json: Callable[..., Any], tmp_path: Path
    ) -> None:
        path = write(tmp_path / "rows.jsonl", self.BROKEN)
        found = warm_json(path, "--template", "{request}", "--skip-errors")
        assert [each["line"] for each in found["left_out"]] == [2, 3, 4, 5, 6, 7, 8]
        assert {each["file"] for each in found["left_out"]} == {str(path)}
        assert (found["num_left_out"], found["num_too_long"], found["num_texts"]) == (7, 1, 3)
        assert stored_texts(tmp_path / "db") == {"one", "two"}
        people = warm(path, "--template", "{request}", "--skip-errors").stdout
        assert "line 5: it is not UTF-8" in " ".join(people.split())

    def test_a_prompt_that_is_too_long_is_left_out_and_shows_in_the_exit_code(
        self, warm: Callable[..., Result], tmp_path: Path
    ) -> None:
        first = write(tmp_path / "first.txt", "one\n\ntwo\n")
        second = write(tmp_path / "second.txt", "three\n" + "0123456789" * 30 + "\nfour\n")
        result = warm(first, second)
        assert result.exit_code == 1
        assert "second.txt, line 2: the prompt needs 300 positions" in " ".join(result.stdout.split())
        assert stored_texts(tmp_path / "db") == {"one", "two", "three", "four"}

    def test_rows_of_csv_that_do_not_fit_the_header_are_broken(
        self, warm_json: Callable[..., Any], tmp_path: Path
    ) -> None:
        path = write(tmp_path / "rows.csv", b'prompt,id\none,1\ntwo\n\xff,3\nfour,4,4\n"fi"ve,5\nsix,6\n')
        found = warm_json(path, "--skip-errors")
        assert [each["line"] for each in found["left_out"]] == [3, 4, 5, 6]
        assert stored_texts(tmp_path / "db") == {"one", "six"}


class TestModel:
    def test_what_is_no_model_is_an_error(self, jsonl: Path, tmp_path: Path) -> None:
        result = run("warm", "--db", tmp_path / "db", tmp_path / "none", jsonl)
        assert result.exit_code == 2
        assert "is not a directory with the files of a model" in result.stderr

    def test_a_dtype_is_another_model(self, warm_json: Callable[..., Any], jsonl: Path) -> None:
        warm_json(jsonl, "--template", TEMPLATE)
        found = warm_json(jsonl, "--template", TEMPLATE, "--dtype", "bfloat16")
        assert found["num_stored_texts"] == 0

    def test_a_namespace_is_another_place(self, warm_json: Callable[..., Any], jsonl: Path) -> None:
        warm_json(jsonl, "--template", TEMPLATE)
        assert warm_json(jsonl, "--template", TEMPLATE, "--namespace", "ours")["num_stored_texts"] == 0


class TestInterrupts:
    @pytest.mark.exhaustive
    def test_the_same_command_goes_on_after_an_interrupt(
        self, warm_json: Callable[..., Any], model: Path, tmp_path: Path
    ) -> None:
        """The child is interrupted while it waits for more lines, after its first batches."""
        command = [sys.executable, "-m", "backprompt_db", "warm", "--db", str(tmp_path / "db"), str(model), "-"]
        child = subprocess.Popen(
            [*command, "--batch-size", "2"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        assert child.stdin is not None
        lines = [f"Request: number {each}\n" for each in range(6)]
        child.stdin.write("".join(lines).encode())
        child.stdin.flush()
        wait_until(lambda: (tmp_path / "db" / "store").exists() and num_stored(tmp_path / "db") >= 4)
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=SECONDS)
        assert child.returncode == 130
        assert "goes on where it was" in told.decode()
        assert "Traceback" not in told.decode()
        path = write(tmp_path / "all.txt", "".join(lines))
        assert warm_json(path)["num_stored_texts"] >= 4

    def test_an_interrupt_before_the_first_batch_says_that_it_was_one(
        self, model: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(bp.LanguageModel, "from_pretrained", interrupt)
        result = run("warm", "--db", tmp_path / "db", model, jsonl)
        assert (result.exit_code, result.stderr) == (130, "interrupted\nhint: The same command may be run again.\n")

    def test_a_terminal_sees_how_far_it_is(self, model: Path, tmp_path: Path) -> None:
        path = write(tmp_path / "all.txt", "".join(f"Request: number {each}\n" for each in range(6)))
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "backprompt_db", "warm", "--db", str(tmp_path / "db"), str(model), str(path)]
        child = subprocess.Popen(
            [*command, "--batch-size", "2"], stderr=slave, stdout=subprocess.PIPE, env={**os.environ, "TERM": "xterm"}
        )
        os.close(slave)
        shown = drain(master)
        said, _ = child.communicate(timeout=SECONDS)
        assert child.returncode == 0
        assert "Warming" in shown
        assert "tokens/s" in shown
        assert "/6" in shown
        assert said.decode().startswith("6 prompts")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def num_stored(directory: Path) -> int:
    try:
        return len(stored_texts(directory))
    except (bp.BackpromptError, AssertionError):  # it is just being made
        return 0


def drain(descriptor: int) -> str:
    """Return what is written to a terminal until it is closed."""
    pieces = []
    while True:
        try:
            piece = os.read(descriptor, 4096)
        except OSError:
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(descriptor)
    return b"".join(pieces).decode()
