"""`stats`: numbers about what a database holds and what it did."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from backprompt_db.cli.location import DbOption, directory_of
from backprompt_db.cli.options import NamespaceOption
from backprompt_db.cli.output import JsonOption, emit, emit_json, json_value

if TYPE_CHECKING:
    from backprompt_db.database.statistics import Stats

_OpenMetrics = Annotated[bool, typer.Option("--openmetrics", help="Print OpenMetrics text, for Prometheus.")]
_Watch = Annotated[
    bool, typer.Option("--watch", help="Show it again and again until Ctrl-C; with --json, one line each time.")
]
_Interval = Annotated[float, typer.Option("--interval", metavar="SECONDS", min=0.1, help="How often --watch looks.")]


def stats(
    *,
    db: DbOption = None,
    namespace: NamespaceOption = None,
    watch: _Watch = False,
    interval: _Interval = 2.0,
    openmetrics: _OpenMetrics = False,
    as_json: JsonOption = False,
) -> None:
    """Show what the database holds and what it saved: representations, models, tokens, bytes, hits, failures.

    With --namespace, what one namespace holds. The numbers come from the catalog. Where it cannot be used, what the
    store holds is counted instead.
    """
    from backprompt_db.operations.stats import gather

    if openmetrics and (as_json or watch):
        raise typer.BadParameter("--openmetrics prints once, and no JSON: give it alone.")
    directory = directory_of(db)

    def look() -> Stats:
        return gather(directory, namespace=namespace)

    if watch:
        _watch(look, interval, as_json=as_json)
    elif openmetrics:
        from backprompt_db.operations.metrics import exposition

        typer.echo(exposition(look()), nl=False)
    elif as_json:
        emit_json(look())
    else:
        emit(look())


def _watch(look: Callable[[], Stats], interval: float, *, as_json: bool) -> None:
    try:
        if as_json:
            for found in _repeatedly(look, interval):
                typer.echo(json.dumps(json_value(found), allow_nan=False))
        elif sys.stdout.isatty():
            _show_live(look, interval)
        else:
            for found in _repeatedly(look, interval):
                emit(found, "")
    except KeyboardInterrupt:  # the way to end it
        raise typer.Exit from None


def _repeatedly(look: Callable[[], Stats], interval: float) -> Iterator[Stats]:
    while True:
        yield look()
        sys.stdout.flush()
        time.sleep(interval)


def _show_live(look: Callable[[], Stats], interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False, emoji=False)
    with Live(look(), console=console, auto_refresh=False) as live:
        for found in _repeatedly(look, interval):
            live.update(found, refresh=True)
