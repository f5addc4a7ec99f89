"""`backprompt-db tree`: a prompt's graph, or the prompt trees of a whole database, drawn without model and torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import backprompt_db as bp
from backprompt_db.catalog.records import Selection
from backprompt_db.cli.tree import forest_table
from backprompt_db.operations.forest import Forest, Measure, forest, prune
from tests.support.catalogs import MODEL, OTHER_WEIGHTS, new_catalog, origin_of, stored
from tests.support.cli import run, run_json
from tests.support.database_files import copies_after
from tests.support.explanations import CONTEXT, HOSTILE, REQUEST, prompt
from tests.support.pictures import read_svg

NODE_FIELDS = [
    "address", "segment_id", "weights_id", "model_name", "namespace", "text", "parents", "num_absent_parents", "depth",
    "total", "own", "num_tokens", "nbytes", "num_hits", "saved_seconds", "used_at", "is_pinned", "label", "hidden",
]  # fmt: skip
SEGMENT_FIELDS = ["text", "parents", "state", "size", "num_tokens", "nbytes", "seconds", "reason"]


def run_prompts(lm: bp.LanguageModel) -> None:
    """A context, two requests after it, one of them with an ending, documents that join, and something harmful."""
    lm([prompt(lm), prompt(lm, CONTEXT, "Request: who left?")])
    (lm.text(CONTEXT) + bp.parallel("One.\n", "Two.\n") + "Which?")()
    lm(HOSTILE)


_BAR = re.compile(r"\s+[█▐▕▏▎▍▌▋▊▉].*")

original, directory = copies_after(run_prompts)


class TestPrompt:
    def test_its_segments_are_drawn_in_their_states(self, directory: Path) -> None:
        lines = run("tree", "--db", directory, CONTEXT, REQUEST, "\nAnswer:").stdout.splitlines()
        assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
        assert [("stored" in line, "missing" in line) for line in lines[1:4]] == [
            (True, False),
            (True, False),
            (False, True),
        ]

    def test_json_has_every_segment(self, directory: Path) -> None:
        found = run_json("tree", "--db", directory, CONTEXT, REQUEST, "\nAnswer:")
        assert list(found) == ["segments", "unit", "remarks"]
        assert [list(segment) for segment in found["segments"]] == [SEGMENT_FIELDS] * 3
        assert [segment["state"] for segment in found["segments"]] == ["stored", "stored", "missing"]
        assert [segment["parents"] for segment in found["segments"]] == [[], [0], [1]]
        assert (found["unit"], found["remarks"]) == ("tokens", [])
        assert [segment["size"] for segment in found["segments"]] == [each["num_tokens"] for each in found["segments"]]

    def test_files_are_pieces_too(self, directory: Path, tmp_path: Path) -> None:
        (tmp_path / "piece.txt").write_text(CONTEXT)
        found = run_json("tree", "--db", directory, "--file", tmp_path / "piece.txt", REQUEST)
        assert [segment["state"] for segment in found["segments"]] == ["stored", "stored"]

    def test_a_picture_is_written_beside_what_is_printed(self, directory: Path, tmp_path: Path) -> None:
        result = run("tree", "--db", directory, "--svg", tmp_path / "prompt.svg", CONTEXT, "new")
        assert "missing" in result.stdout
        assert read_svg((tmp_path / "prompt.svg").read_text(encoding="utf-8")).states == ["stored", "missing"]

    def test_a_limit_folds_what_does_not_fit(self, directory: Path) -> None:
        pieces = [f"piece {number}" for number in range(30)]
        result = run("tree", "--db", directory, "--limit", "5", *pieces)
        assert "… 26 segments" in result.stdout
        assert "26 of 30 segments are folded" in result.stdout

    def test_options_about_the_database_are_refused_with_a_text(self, directory: Path) -> None:
        for option in (("--by", "bytes"), ("--depth", "1"), ("--label", "a")):
            result = run("tree", "--db", directory, *option, "text")
            assert (result.exit_code, "about the whole database" in result.output) == (2, True)

    def test_a_picture_that_cannot_be_written_is_an_error(self, directory: Path, tmp_path: Path) -> None:
        result = run("tree", "--db", directory, "--svg", tmp_path / "no" / "file.svg", "text")
        assert (result.exit_code, "cannot be written" in result.output) == (2, True)


def titles(found: Forest) -> list[str]:
    """The first column of what is printed, without guides."""
    weights = found.weights(Measure.TOKENS)
    table = forest_table(found, prune(found, weights, limit=100, max_depth=None), Measure.TOKENS)
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return [_BAR.sub("", line) for line in captured.get().splitlines()[1:-2]]


class TestDatabase:
    def test_what_follows_a_prompt_stands_below_it(self, directory: Path) -> None:
        lines = [_BAR.sub("", line) for line in run("tree", "--db", directory, columns=160).stdout.splitlines()]
        assert lines[1] == "Pick the endpoint for the request.\\n"
        assert "├─ Request: who signed up?" in lines
        assert lines[lines.index("├─ Request: who signed up?") + 1] == "│  \\nEndpoint:"
        assert any(line.startswith(("│  (2 parents) Which?", "   (2 parents) Which?")) for line in lines)
        assert any(line.startswith("<script>alert(1)</script>\\x1b[31m[bold]\\u202e") for line in lines)
        assert lines[-1].startswith("8 representations, ")

    def test_json_has_what_is_shown_with_the_sums_below_it(self, directory: Path) -> None:
        found = run_json("tree", "--db", directory)
        assert list(found) == ["by", "num_representations", "total", "nodes", "hidden"]
        assert [list(node) for node in found["nodes"]] == [NODE_FIELDS] * 8
        assert (found["by"], found["num_representations"]) == ("tokens", 8)
        assert sum(node["own"] for node in found["nodes"]) == found["total"]
        assert all(node["own"] == node["num_tokens"] for node in found["nodes"])
        by_address = {node["address"]: node for node in found["nodes"]}
        (join,) = (node for node in found["nodes"] if node["text"] == "Which?")
        assert {by_address[parent]["text"] for parent in join["parents"]} == {"One.\n", "Two.\n"}

    @pytest.mark.parametrize("by", ["tokens", "bytes", "seconds", "recency"])
    def test_a_limit_shows_the_largest_and_says_how_much_is_hidden(self, directory: Path, by: str) -> None:
        found = run_json("tree", "--db", directory, "--by", by, "--limit", "3")
        nodes = found["nodes"]
        assert len(nodes) == 3
        assert 3 + found["hidden"]["num_nodes"] + sum(node["hidden"]["num_nodes"] for node in nodes) == 8
        shown = sum(node["own"] + node["hidden"]["total"] for node in nodes)
        assert shown + found["hidden"]["total"] == pytest.approx(found["total"])
        assert run("tree", "--db", directory, "--by", by, "--limit", "3").stdout.count(" more") >= 1

    def test_measures_are_those_of_the_catalog(self, directory: Path) -> None:
        with bp.open(directory) as db:
            assert db.catalog is not None
            rows = db.catalog.rows()
        assert run_json("tree", "--db", directory, "--by", "bytes")["total"] == sum(
            sum(row.nbytes.values()) for row in rows
        )
        assert run_json("tree", "--db", directory, "--by", "seconds")["total"] == pytest.approx(
            sum(row.num_hits * row.compute_seconds for row in rows)
        )

    def test_a_depth_hides_what_is_deeper(self, directory: Path) -> None:
        found = run_json("tree", "--db", directory, "--depth", "0")
        assert {node["text"] for node in found["nodes"]} == {CONTEXT, HOSTILE}
        assert found["nodes"][0]["hidden"]["num_nodes"] == 6

    def test_a_selection_is_a_smaller_forest(self, directory: Path) -> None:
        run("label", "--db", directory, "documents", "--contains", "Two.")
        found = run_json("tree", "--db", directory, "--label", "documents")
        assert [node["text"] for node in found["nodes"]] == ["Two.\n"]
        assert found["nodes"][0]["num_absent_parents"] == 1
        assert (
            "[documents] (1 parent, 1 absent) Two.\\n" in run("tree", "--db", directory, "--label", "documents").stdout
        )
        assert run_json("tree", "--db", directory, "--namespace", "other")["nodes"] == []
        assert run("tree", "--db", directory, "--model", "nobody").exit_code == 2

    def test_trees_of_several_models_and_namespaces_are_told_apart(self, tmp_path: Path) -> None:
        with new_catalog(tmp_path / "catalog.sqlite") as catalog:
            catalog.save(MODEL)
            for namespace, weights_id in (("", MODEL.weights_id), ("tenant", MODEL.weights_id), ("", OTHER_WEIGHTS)):
                context = origin_of("context", namespace=namespace, weights_id=weights_id)
                after = origin_of("after it", context, namespace=namespace, weights_id=weights_id)
                catalog.record([stored(context), stored(after)], at=1.0)
            everything, of_one = forest(catalog), forest(catalog, selection=Selection(namespace="tenant"))
        assert sorted(titles(everything)) == [
            "after it", "after it", "after it",
            "no namespace, ? 57575757: context",
            "no namespace, gpt2 77777777: context",
            "tenant, gpt2 77777777: context",
        ]  # fmt: skip
        assert titles(of_one) == ["context", "after it"]

    def test_a_picture_has_the_nodes_and_joins(self, directory: Path, tmp_path: Path) -> None:
        run("tree", "--db", directory, "--svg", tmp_path / "tree.svg")
        shown = read_svg((tmp_path / "tree.svg").read_text(encoding="utf-8"))
        assert len(shown.rows) == 8
        assert set(shown.states) == {"stored"}
        (join,) = (at for at, row in enumerate(shown.rows) if row.label == "Which?")
        assert {shown.rows[parent].label for parent, child in shown.edges if child == join} == {"One.\\n", "Two.\\n"}

    def test_a_picture_of_a_part_says_how_much_is_missing_from_it(self, directory: Path, tmp_path: Path) -> None:
        run("tree", "--db", directory, "--limit", "3", "--svg", tmp_path / "tree.svg", "--by", "recency")
        shown = read_svg((tmp_path / "tree.svg").read_text(encoding="utf-8"))
        assert len(shown.rows) == 3
        assert "5 of 8 representations are not shown" in shown.texts

    def test_an_empty_database_says_so(self, tmp_path: Path) -> None:
        run("init", tmp_path / "db")
        assert run("tree", "--db", tmp_path / "db").stdout == "The catalog lists no representations.\n"
        assert run_json("tree", "--db", tmp_path / "db")["nodes"] == []

    def test_neither_torch_nor_transformers_is_loaded(self, directory: Path) -> None:
        script = "import sys; from backprompt_db.cli.app import app; sys.argv[1:] = {}; app(standalone_mode=False)"
        script += "; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
        for arguments in (["tree", "--db", str(directory)], ["tree", "--db", str(directory), CONTEXT]):
            command = [sys.executable, "-c", script.format(arguments)]
            result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            assert result.stdout.endswith("[]\n")
