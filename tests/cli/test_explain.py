"""`backprompt-db explain`: pieces in the order given, a model out of the catalog, neither model nor torch loaded."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import backprompt_db as bp
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.cli.app import app
from backprompt_db.prompt.explanation import Reason
from tests.conftest import tiny_gpt2
from tests.support.cli import run, run_json
from tests.support.explanations import (
    CONTEXT,
    ENDING,
    EXPLANATION_FIELDS,
    HOSTILE,
    MISS_FIELDS,
    REQUEST,
    SEGMENT_FIELDS,
)

PIECES = (CONTEXT, REQUEST, ENDING)
MakeLM = Callable[..., bp.LanguageModel]


@pytest.fixture
def model(tmp_path: Path, tokenizer: Any) -> Path:
    """The directory of a model."""
    tiny_gpt2().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def directory(tmp_path: Path, model: Path) -> Path:
    """A database in which a prompt of that model is stored."""
    with bp.open(tmp_path / "cache") as db:
        lm = bp.LanguageModel.from_pretrained(str(model), db=db)
        (lm.text(CONTEXT) + REQUEST + ENDING)()
    return tmp_path / "cache"


def texts(found: dict[str, Any]) -> list[str]:
    return [segment["text"] for segment in found["segments"]]


def reasons(found: dict[str, Any]) -> list[str | None]:
    return [segment["miss"] and segment["miss"]["reason"] for segment in found["segments"]]


class TestAnswer:
    def test_json_is_what_python_says(self, directory: Path, model: Path) -> None:
        pieces = (CONTEXT, "Request: who left?", ENDING)
        found = run_json("explain", "--db", directory, "--model", model, *pieces)
        assert list(found) == EXPLANATION_FIELDS
        assert {tuple(segment) for segment in found["segments"]} == {tuple(SEGMENT_FIELDS)}
        assert list(found["segments"][2]["miss"]) == MISS_FIELDS
        assert reasons(found) == [None, "never-seen", "other-parents"]
        with bp.open(directory) as db:
            lm = bp.LanguageModel.from_pretrained(str(model), db=db)
            text = lm.text(pieces[0]) + pieces[1] + pieces[2]
            from backprompt_db.cli.output import json_value

            assert json_value(lm.explain(text)) == found

    def test_people_get_a_table_and_the_difference(self, directory: Path) -> None:
        result = run("explain", "--db", directory, CONTEXT, "Request: who left?", ENDING)
        assert result.exit_code == 0
        assert "never seen" in result.stdout
        assert "here:  …" in result.stdout
        assert "who |left?" in result.stdout

    def test_texts_are_shown_as_they_are_and_mean_nothing(self, directory: Path) -> None:
        result = run("explain", "--db", directory, HOSTILE, columns=200)
        assert result.exit_code == 0
        assert "<script>alert(1)</script>\\x1b[31m[bold]\\u202e&amp;" in result.stdout

    def test_a_namespace_is_another_place(self, directory: Path) -> None:
        found = run_json("explain", "--db", directory, "--namespace", "ours", *PIECES)
        assert (reasons(found), found["namespace"]) == (["never-seen"] * 3, "ours")

    def test_nothing_is_written(self, directory: Path, model: Path) -> None:
        def contents() -> dict[Path, bytes]:
            files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "lock.mdb")
            return {path: path.read_bytes() for path in files}

        before = contents()
        run_json("explain", "--db", directory, "--model", model, *PIECES, "more")
        assert contents() == before


def test_the_documentation_names_every_field_and_reason() -> None:
    documentation = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    section = documentation.partition("## `explain`")[2].partition("\n## ")[0]
    names = [*EXPLANATION_FIELDS, *SEGMENT_FIELDS, *MISS_FIELDS, *(reason.value for reason in Reason)]
    assert [name for name in names if f"`{name}`" not in section] == []


class TestPieces:
    def test_texts_files_and_stdin_come_in_the_order_given(self, directory: Path, tmp_path: Path) -> None:
        (tmp_path / "context.txt").write_text(CONTEXT)
        (tmp_path / "ending.txt").write_text(ENDING)
        arguments = ["--file", str(tmp_path / "context.txt"), "-", f"--file={tmp_path / 'ending.txt'}", "--", "--json"]
        runner = CliRunner()
        result = runner.invoke(app, ["explain", "--db", str(directory), "--json", *arguments], input=REQUEST)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert texts(found) == [*PIECES, "--json"]
        assert reasons(found) == [None, None, None, "never-seen"]

    def test_a_file_is_taken_byte_for_byte(self, directory: Path, tmp_path: Path) -> None:
        (tmp_path / "piece.txt").write_bytes(b"one\r\ntwo \n")
        assert texts(run_json("explain", "--db", directory, "--file", tmp_path / "piece.txt")) == ["one\r\ntwo \n"]

    @pytest.mark.parametrize("content", [b"\xff\xfe", b"\xed\xa0\x80"])
    def test_a_file_that_is_not_utf8_is_refused(self, directory: Path, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "piece.txt").write_bytes(content)
        result = run("explain", "--db", directory, "--file", tmp_path / "piece.txt")
        assert result.exit_code == 2
        assert "is not UTF-8" in result.output

    def test_what_cannot_be_read_and_what_is_empty_is_refused(self, directory: Path, tmp_path: Path) -> None:
        assert "cannot be read" in run("explain", "--db", directory, "--file", tmp_path / "none").output
        assert "cannot be read" in run("explain", "--db", directory, "--file", tmp_path).output
        assert "the prompt is empty" in run("explain", "--db", directory).output
        assert "the prompt is empty" in run("explain", "--db", directory, "").output
        assert "requires an argument" in run("explain", "--db", directory, "--file").output


def forget_tokenizers(directory: Path) -> None:
    """Make a catalog one that has kept no tokenizer, as catalogs were at first."""
    with contextlib.closing(sqlite3.connect(directory / "catalog.sqlite")) as catalog, catalog:
        catalog.execute("UPDATE tokenizers SET definition = NULL")


class TestModel:
    def test_the_only_model_need_not_be_named_and_its_tokenizer_is_in_the_catalog(
        self, directory: Path, model: Path, tokenizer: Any
    ) -> None:
        model.rename(model.with_name("elsewhere"))
        found = run_json("explain", "--db", directory, "A qu", "ick fox")
        assert [segment["num_tokens"] for segment in found["segments"]] == [len(tokenizer("A quick fox")["input_ids"])]
        assert [(seam["left"], seam["right"]) for seam in found["seams"]] == [("A qu", "ick fox")]
        assert "Give --model" not in run("explain", "--db", directory, "A qu", "ick fox").stdout

    def test_without_a_tokenizer_tokens_of_what_is_missing_are_unknown(self, directory: Path) -> None:
        forget_tokenizers(directory)
        found = run_json("explain", "--db", directory, *PIECES, "more")
        assert reasons(found) == [None, None, None, "never-seen"]
        assert [segment["num_tokens"] is None for segment in found["segments"]] == [False, False, False, True]
        assert (found["num_missing_tokens"], found["needed_seconds"], found["seams"]) == (None, None, None)
        assert found["num_cached_tokens"] > 0
        people = run("explain", "--db", directory, *PIECES).stdout
        assert "Give --model a directory with a tokenizer.json" in people

    def test_a_directory_gives_the_tokens_of_what_is_missing(
        self, directory: Path, model: Path, tokenizer: Any
    ) -> None:
        forget_tokenizers(directory)
        found = run_json("explain", "--db", directory, "--model", model, "A qu", "ick fox")
        assert [segment["num_tokens"] for segment in found["segments"]] == [len(tokenizer("A quick fox")["input_ids"])]
        assert found["needed_seconds"] > 0
        assert [(seam["left"], seam["right"]) for seam in found["seams"]] == [("A qu", "ick fox")]

    @pytest.mark.parametrize("is_kept", [True, False])
    def test_start_tokens_count(self, tmp_path: Path, tokenizer_with_bos: Any, *, is_kept: bool) -> None:
        tiny_gpt2().save_pretrained(tmp_path / "model")
        tokenizer_with_bos.save_pretrained(tmp_path / "model")
        with bp.open(tmp_path / "cache") as db:
            bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db)(CONTEXT)
        if not is_kept:
            forget_tokenizers(tmp_path / "cache")
        found = run_json("explain", "--db", tmp_path / "cache", "--model", tmp_path / "model", "new", "er")
        expected = [1 + len(tokenizer_with_bos("new", add_special_tokens=False)["input_ids"])]
        expected += [len(tokenizer_with_bos("er", add_special_tokens=False)["input_ids"])]
        assert [segment["num_tokens"] for segment in found["segments"]] == expected

    def test_a_tokenizer_that_is_not_the_one_that_was_used_says_nothing(self, directory: Path, model: Path) -> None:
        forget_tokenizers(directory)
        path = model / "tokenizer.json"
        serialised = json.loads(path.read_text())
        serialised["model"]["merges"] = []
        path.write_text(json.dumps(serialised))
        found = run_json("explain", "--db", directory, "--model", model, *PIECES, "more")
        assert (reasons(found)[:3], found["num_missing_tokens"]) == ([None] * 3, None)
        path.write_text("{")
        assert run_json("explain", "--db", directory, "--model", model, *PIECES)["seams"] is None

    def test_of_several_models_one_is_to_be_named(self, directory: Path, model: Path, tokenizer: Any) -> None:
        with bp.open(directory) as db:
            narrow = bp.LanguageModel.from_pretrained(str(model), db=db, dtype=torch.bfloat16)
            narrow(CONTEXT)
            ids = narrow.weights_id.hex(), run_json("ls", "--db", directory, "--limit", "9")[-1]["weights_id"]
        assert ids[0] != ids[1]
        refused = run("explain", "--db", directory, *PIECES)
        assert refused.exit_code == 2
        assert "there are several models" in refused.output
        assert all(digits[:12] in refused.output for digits in ids)
        assert "bfloat16" in refused.output
        found = run_json("explain", "--db", directory, "--model", ids[0][:8], *PIECES)
        assert reasons(found) == [None, "other-model", "other-model"]
        assert found["segments"][1]["miss"]["seen_under"][0]["dtype"] == "float32"
        # Files whose ids are recorded are known by them, with the arguments that they have without any others.
        assert run_json("explain", "--db", directory, "--model", model, *PIECES)["weights_id"] == ids[1]

    def test_a_model_of_which_nothing_is_stored_is_refused(self, directory: Path, tmp_path: Path) -> None:
        result = run("explain", "--db", directory, "--model", "nobody/knows", *PIECES)
        assert (result.exit_code, "nothing is stored of the model 'nobody/knows'" in result.output) == (2, True)
        bp.open(tmp_path / "new").close()
        Catalog.open(tmp_path / "new" / "catalog.sqlite").close()
        assert "nothing is stored of any model" in run("explain", "--db", tmp_path / "new", *PIECES).output


class TestPlace:
    def test_without_a_database_or_a_catalog_it_says_what_to_do(self, directory: Path, tmp_path: Path) -> None:
        missing = run("explain", "--db", tmp_path / "none", *PIECES)
        assert (missing.exit_code, "there is no database" in missing.output) == (2, True)
        assert not (tmp_path / "none").exists()
        (directory / "catalog.sqlite").unlink()
        result = run("explain", "--db", directory, *PIECES)
        assert (result.exit_code, "reindex" in result.output) == (2, True)
        assert not (directory / "catalog.sqlite").exists()

    def test_no_torch_is_loaded(self, directory: Path, model: Path) -> None:
        arguments = ["explain", "--db", str(directory), "--model", str(model), "--json", *PIECES, "more"]
        script = (
            "import sys; from backprompt_db.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
        )
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert json.loads(done.stdout)["num_missing_tokens"] > 0
        loaded = set(done.stderr.split())
        assert "tokenizers" in loaded
        assert loaded & {"torch", "transformers"} == set()
