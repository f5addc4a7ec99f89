"""`stats`: numbers about what a database holds and what it did."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from backprompt_db.cli.location import DbOption, directory_of
from backprompt_db.cli.options import NamespaceOption
from backprompt_db.cli.output import JsonOption, emit, emit_json, json_value
from backprompt_db.views.console import bare_table, grid, literal
from backprompt_db.views.formatting import age, duration, plural, size

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    from backprompt_db.operations.stats import Activity, Incident, ModelUsage, NamespaceUsage, Stats

_NUM_ID_DIGITS = 12
_NUM_GROUPS = 10

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
        emit(_view(look()))


def _watch(look: Callable[[], Stats], interval: float, *, as_json: bool) -> None:
    try:
        if as_json:
            for found in _repeatedly(look, interval):
                typer.echo(json.dumps(json_value(found), allow_nan=False))
        elif sys.stdout.isatty():
            _show_live(look, interval)
        else:
            for found in _repeatedly(look, interval):
                emit(_view(found), "")
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
    with Live(_view(look()), console=console, auto_refresh=False) as live:
        for found in _repeatedly(look, interval):
            live.update(_view(found), refresh=True)


def _view(found: Stats) -> Group:
    from rich.console import Group

    whole = _room(found) | _activity(found.activity) if found.namespace is None else {}
    blocks: list[RenderableType] = [grid(_facts(found) | whole)]
    if found.by_model and len(found.by_model) > 1:
        names = [f"{each.name or '?'} ({each.weights_id.hex()[:_NUM_ID_DIGITS]})" for each in found.by_model]
        blocks.append(_table("model", dict(zip(names, found.by_model, strict=True))))
    if found.by_namespace and len(found.by_namespace) > 1:
        blocks.append(_table("namespace", {each.namespace or "(default)": each for each in found.by_namespace}))
    if found.incidents and found.namespace is None:
        blocks += ["what went wrong last", *map(_line, found.incidents)]
    if found.catalog_problem is not None:
        problem = f"Counted in the store, because {found.catalog_problem}. `backprompt-db reindex` rebuilds it."
        blocks.append(literal(problem))
    blocks += [literal(problem) for problem in (found.store_problem, found.config_problem) if problem is not None]
    return Group(*blocks)


def _facts(found: Stats) -> dict[str, str]:
    parts = ", ".join(f"{part.name.lower()} {size(nbytes)}" for part, nbytes in found.nbytes.items())
    return {
        "database": str(found.directory),
        **({} if found.namespace is None else {"namespace": found.namespace or "(default)"}),
        "representations": f"{found.num_representations:,}",
        "segments": _count(found.num_segments),
        "models": _count(found.num_models),
        "tokens": _count(found.num_tokens),
        "stored": f"{size(sum(found.nbytes.values()))} ({parts})",
        "hits": _count(found.num_hits),
        "saved": "unknown" if found.saved_seconds is None else f"{duration(found.saved_seconds)} of computation",
        "format": f"{found.format}, {found.fidelity}",
        "created": found.created_at,
    }


def _room(found: Stats) -> dict[str, str]:
    live = "unknown" if found.live_nbytes is None else size(found.live_nbytes)
    limit = "no limit" if found.max_nbytes is None else f"limit {size(found.max_nbytes)}"
    full = "" if found.fullness is None else f", {found.fullness:.1%} full"
    return {"in use": f"{live}, {limit}{full}", "on disk": size(found.file_nbytes)}


def _activity(found: Activity | None) -> dict[str, str]:
    if found is None:
        return {}
    return {
        "parts found": f"{found.num_memory_hits:,} in memory, {found.num_disk_hits:,} on disk, "
        f"{found.num_base_hits:,} in a database below",
        "parts missed": f"{found.num_part_misses:,}",
        "computed": f"{plural(found.num_computed_tokens, 'token')} in {duration(found.computed_seconds)}",
        "waited for": f"{found.num_waits:,} computations of other processes",
        "evicted": f"{plural(found.num_evicted, 'part')}, {size(found.num_evicted_nbytes)}",
        "quarantined": plural(found.num_quarantined, "part"),
        "failed": f"{found.num_read_failures:,} reads, {found.num_write_failures:,} writes",
    }


def _table(name: str, groups: Mapping[str, ModelUsage | NamespaceUsage]) -> Table:
    table = bare_table()
    table.add_column(name, overflow="fold")
    for column in ("representations", "size"):
        table.add_column(column, no_wrap=True, justify="right")
    for group, found in itertools.islice(groups.items(), _NUM_GROUPS):
        table.add_row(literal(group), f"{found.num_representations:,}", size(sum(found.nbytes.values())))
    if len(groups) > _NUM_GROUPS:
        table.add_row(f"and {len(groups) - _NUM_GROUPS:,} more, see --json")
    return table


def _line(incident: Incident) -> Text:
    where = "" if incident.address is None else f" {incident.address.hex()[:_NUM_ID_DIGITS]}"
    return literal(f"  {age(incident.at, now=time.time())} ago: {incident.kind}{where}: {incident.detail}")


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"
