"""The tutorial runs from top to bottom, and once more in a new kernel, which computes nothing."""

from __future__ import annotations

import getpass
import re
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest

from backprompt_db.cli.demo.smollm2 import smollm2_directory

exhaustive = pytest.mark.exhaustive  # two kernels and a trained model: pages of the documentation run by default

PATH = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"
MAX_NBYTES = 300_000


@pytest.fixture(scope="module")
def committed() -> Any:
    return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The notebook after a run in a fresh kernel, and after another one on the same database."""
    smollm2_directory()  # not in a cell, which has a time limit
    place = tmp_path_factory.mktemp("notebook")
    return [executed(place) for _ in range(2)]


def executed(place: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of Jupyter's own libraries
        from nbclient import NotebookClient

        notebook = nbformat.read(PATH, as_version=4)
        resources = {"metadata": {"path": str(place)}}
        NotebookClient(notebook, timeout=500, kernel_name="python3", resources=resources).execute()
    return notebook


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: Any) -> list[str]:
    """What each cell printed; tables and pictures are not printed."""
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in code(notebook)]


def shown(notebook: Any) -> list[str]:
    """The HTML of each table and picture."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]


def counted(text: str) -> list[int]:
    """The numbers of computed tokens and of model calls in what was printed."""
    found = re.findall(r"(?:\d+(?= computed)|(?<=computed_tokens=)\d+|(?<=model_calls=)\d+)", text)
    return [int(number) for number in found]


@exhaustive
def test_the_first_run_computes_and_the_next_kernel_computes_nothing_and_loads_no_model(runs: list[Any]) -> None:
    first, second = ("".join(printed(run)) for run in runs)
    assert max(counted(first)) > 0
    assert set(counted(second)) == {0}
    assert len(counted(second)) == len(counted(first))
    assert "not loaded" in second


@exhaustive
def test_both_runs_print_the_same_numbers_of_the_model(runs: list[Any]) -> None:
    first, second = (re.findall(r"-\d+\.\d+", "".join(printed(run))) for run in runs)
    assert len(first) > 20
    assert first == second


@exhaustive
def test_pictures_and_tables_are_shown_and_say_stored_the_second_time(runs: list[Any]) -> None:
    first, second = map(shown, runs)
    assert len(first) == len(second) >= 6
    assert any("missing" in page for page in first)
    assert not any("never seen" in page for page in second)


@exhaustive
def test_the_committed_outputs_are_of_one_run_of_these_cells(committed: Any, runs: list[Any]) -> None:
    assert [cell.execution_count for cell in code(committed)] == list(range(1, len(code(committed)) + 1))
    assert len(shown(committed)) == len(shown(runs[0]))
    assert counted("".join(printed(committed))) == counted("".join(printed(runs[0])))


def test_the_committed_notebook_is_small_and_knows_no_machine() -> None:
    text = PATH.read_text(encoding="utf-8")
    assert len(text) < MAX_NBYTES
    assert not re.search(r"/(?:root|home|Users|tmp|work)/", text)
    assert getpass.getuser() == "root" or getpass.getuser() not in text
