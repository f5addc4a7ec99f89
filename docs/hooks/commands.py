"""The command line reference, made of the commands themselves when the site is built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import cleandoc
from typing import Any

_PAGE = "reference/command-line.md"
_PLACE = "<!-- commands -->"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the commands in their place on their page."""
    return markdown.replace(_PLACE, "\n".join(_commands())) if page.file.src_uri == _PAGE else markdown


def _commands() -> Iterator[str]:
    from typer.main import get_command

    from backprompt_db.cli.app import app

    group: Any = get_command(app)
    for name, command in group.commands.items():
        if not command.hidden:
            yield from _section(name, command)


def _section(name: str, command: Any) -> Iterator[str]:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(["backprompt-db", name, *command.collect_usage_pieces(context)])
    yield f"## {name}\n\n```text\n{usage}\n```\n\n{_prose(command.help)}\n\n| argument or option | |\n|---|---|"
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield f"| `{_cell(record[0])}` | {_cell(_prose(record[1]))} |"
    yield ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _prose(text: str) -> str:
    """Return help as Markdown: its brackets and stars are escaped, so that they stand for themselves."""
    return re.sub(r"[<*\[](?![^`]*`)", lambda found: f"\\{found[0]}", cleandoc(text).replace("\b", ""))
