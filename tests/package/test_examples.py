"""Each example runs offline with one command, says what it reused, and computes nothing the second time."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import cases, tiny_gpt2

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "reuse")
STEP = re.compile(
    r"^(?P<what>.*): [\d.]+ s(?P<loading>.*); (?P<tokens>[\d,]+) tokens computed in (?P<passes>[\d,]+) passes"
)
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Run:
    """What an example printed."""

    steps: list[re.Match[str]]
    others: list[str]

    def numbers(self, name: str) -> list[int]:
        return [int(step[name].replace(",", "")) for step in self.steps]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model that knows no language, with room for long prompts, and a chat template."""
    directory = tmp_path_factory.mktemp("model")
    tiny_gpt2(n_positions=4096).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(CHAT)
    return directory


def run(name: str, db: Path, model: Path) -> Run:
    command = [sys.executable, "-W", "error", f"{name}.py", "--db", str(db), "--model", str(model)]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return Run(
        [found for line in lines if (found := STEP.match(line))], [line for line in lines if not STEP.match(line)]
    )


@pytest.fixture(scope="module")
def run_twice(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Callable[[str], list[Run]]:
    """Run an example on a new database, and once more; each only once for all tests."""

    @functools.cache
    def of(name: str) -> list[Run]:
        db = tmp_path_factory.mktemp(name) / "db"
        return [run(name, db, model) for _ in range(2)]

    return of


@pytest.mark.parametrize("name", cases(NAMES, by_default=["documents"]))
def test_an_example_computes_nothing_the_second_time(name: str, run_twice: Callable[[str], list[Run]]) -> None:
    first, second = run_twice(name)
    assert first.numbers("tokens")[0] > 0
    assert set(second.numbers("tokens")) == set(second.numbers("passes")) == {0}
    assert not any(step["loading"] for step in second.steps)
    assert second.others == first.others
    assert [step["what"] for step in second.steps] == [step["what"] for step in first.steps]


def test_parallel_documents_are_computed_once_for_all_orders(run_twice: Callable[[str], list[Run]]) -> None:
    first, _ = run_twice("documents")
    steps = {step["what"]: step for step in first.steps}
    tokens = {what: int(step["tokens"].replace(",", "")) for what, step in steps.items()}
    assert tokens["parallel, another order"] == 0
    assert 0 < tokens["parallel"] < tokens["chain, the right one first"] * 0.8


def test_every_example_is_described_in_the_list() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(NAMES) == set(re.findall(r"^python examples/(\w+)\.py", listed, flags=re.MULTILINE))
