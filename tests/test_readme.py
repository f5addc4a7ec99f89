"""The README's examples run, in order, as they stand; docstring examples too; every command is described."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import backprompt_db

from .conftest import tiny_gpt2
from .document_parts import CODE, DATA, blocks, is_run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_examples_of_the_readme_run(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [block.content for block in blocks(README) if is_run(block)]
    assert len(examples) > 8
    # A directory called gpt2 stands in for the model of that name: the name is all that the examples know of it.
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)  # noqa: S102 - it is our own README
    assert (tmp_path / "cache" / "manifest.json").exists()


def test_what_is_not_run_says_why() -> None:
    assert {block.language for block in blocks(README) if is_run(block)} == {"python"}
    assert {block.language for block in blocks(README)} <= CODE | DATA


def modules() -> list[str]:
    found = pkgutil.walk_packages(backprompt_db.__path__, "backprompt_db.")
    return [
        module.name for module in found if ".migrations" not in module.name and not module.name.endswith("__main__")
    ]


@pytest.mark.parametrize("name", ["backprompt_db", *modules()])
def test_the_examples_of_docstrings_run(name: str) -> None:
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


def test_the_readme_names_every_command() -> None:
    from typer.main import get_command

    from backprompt_db.cli.app import app

    commands = getattr(get_command(app), "commands")  # noqa: B009 - click's types do not know groups here
    visible = {name for name, command in commands.items() if not command.hidden}
    assert visible == set(re.findall(r"^\$ backprompt-db (\w+)", README, flags=re.MULTILINE))
