"""Docstring examples run, and the README names every command. Its own examples run in `test_docs.py`."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import backprompt_db

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def modules() -> list[str]:
    found = pkgutil.walk_packages(backprompt_db.__path__, "backprompt_db.")
    return [
        module.name for module in found if ".migrations" not in module.name and not module.name.endswith("__main__")
    ]


def test_the_examples_of_docstrings_run() -> None:
    for name in ["backprompt_db", *modules()]:
        failures, _ = doctest.testmod(importlib.import_module(name))
        assert failures == 0, name


def test_the_readme_names_every_command() -> None:
    from typer.main import get_command

    from backprompt_db.cli.app import app

    commands = getattr(get_command(app), "commands")  # noqa: B009 - click's types do not know groups here
    visible = {name for name, command in commands.items() if not command.hidden}
    assert visible == set(re.findall(r"^\$ backprompt-db (\w+)", README, flags=re.MULTILINE))
