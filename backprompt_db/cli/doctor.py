"""`doctor`: what keeps a database from working well, and how to repair it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from backprompt_db.cli.location import DbOption, directory_of, quietly
from backprompt_db.cli.output import JsonOption, emit, emit_json
from backprompt_db.views.console import bare_table, literal

if TYPE_CHECKING:
    from rich.table import Table

    from backprompt_db.operations.doctor import Check

PROBLEMS = 1
"""The exit code when something does not work."""

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    *,
    db: DbOption = None,
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired without losing anything.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check everything that the database depends on, and say how to repair what is wrong.

    Python and libraries, filesystem and free space, owners and modes of files, writing, leftovers of killed processes,
    limit, secret, catalog and clock. Values are checked by `verify`. Exits with 1 if there is a problem.
    """
    from backprompt_db.operations.doctor import diagnose
    from backprompt_db.operations.doctor_checks import Status

    with quietly():
        checks = diagnose(directory_of(db), fix=fix)
    if as_json:
        emit_json(checks)
    else:
        emit(_table(checks))
    raise typer.Exit(PROBLEMS if any(check.status is Status.PROBLEM for check in checks) else 0)


def _table(checks: list[Check]) -> Table:
    from rich.text import Text

    table = bare_table()
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what was found", overflow="fold")
    for check in checks:
        word = "mended" if check.is_mended else check.status.value
        found = check.what if check.remedy is None else f"{check.what} {check.remedy}"
        table.add_row(check.name, Text(word, style=_STYLES[check.status.value]), literal(found))
    return table
