"""How a plan is shown: as a table in a terminal, as plain text, and in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING

from backprompt_db.display import duration, plural, shortened, size, visible

if TYPE_CHECKING:
    from rich.console import Group

    from backprompt_db.run_plan import MemoryForecast, RoomForecast, RunPlan

_NUM_ID_DIGITS = 8
_NUM_TEXT_CHARACTERS = 60
_NUM_TOO_LONG = 5


def terminal_view(plan: RunPlan) -> Group:
    """Return what rich prints."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(plan):
        table.add_row(name, Text(value))
    return Group(table, *(Text(line, style="yellow") for line in _warnings(plan)))


def plain_view(plan: RunPlan) -> str:
    """Return the table as text without colours, as wide as the terminal."""
    from rich.console import Console

    console = Console(color_system=None, force_terminal=False, highlight=False)
    with console.capture() as captured:
        console.print(terminal_view(plan))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def html_view(plan: RunPlan) -> str:
    """Return an HTML table. Whatever texts and names hold is shown and means nothing."""
    rows = "".join(
        f'<tr><th style="text-align: left">{name}</th><td style="text-align: left">{html.escape(value)}</td></tr>'
        for name, value in _rows(plan)
    )
    warnings = html.escape("\n".join(_warnings(plan)))
    return f"<table><tbody>{rows}</tbody></table>" + (f"<pre>{warnings}</pre>" if warnings else "")


def _rows(plan: RunPlan) -> Iterator[tuple[str, str]]:
    namespace = f", namespace {plan.namespace}" if plan.namespace else ""
    digits = plan.weights_id.hex()[:_NUM_ID_DIGITS]
    yield "model", visible(f"{plan.model_name} ({plan.dtype}, {digits}){namespace}")
    completions = "" if plan.num_completions is None else f" x {plan.num_completions:,} completions"
    yield "texts", f"{plan.num_texts:,}{completions}, {plan.num_stored_texts:,} stored already"
    yield "segments", f"{plan.num_segments:,} distinct, {plan.num_missing_segments:,} to compute"
    yield "tokens", f"{plan.num_missing_tokens:,} to compute, {plan.num_cached_tokens:,} cached"
    yield "passes", f"{plan.num_passes:,}"
    yield "time", "unknown: nothing is recorded of this model" if plan.seconds is None else _about(plan.seconds)
    parts = ", ".join(f"{part.name.lower()} {size(nbytes)}" for part, nbytes in plan.nbytes.items())
    yield "to be written", f"{size(sum(plan.nbytes.values()))} ({parts}), and about {size(plan.overhead_nbytes)} beside"
    yield "database", "nothing is kept on disk" if plan.room is None else _room(plan.room)
    yield "memory", _memory(plan.memory)


def _about(seconds: float) -> str:
    return f"about {duration(seconds)} in the model"


def _room(room: RoomForecast) -> str:
    limit = "no limit" if room.max_live_nbytes is None else f"{size(room.max_live_nbytes)} at most"
    return f"{size(room.live_nbytes)} in use, about {size(room.written_nbytes)} more needed, {limit}"


def _memory(memory: MemoryForecast) -> str:
    return (
        f"about {size(memory.total_nbytes)} beside Python and its libraries: weights {size(memory.weights_nbytes)},"
        f" keys and values {size(memory.prefixes_nbytes)}, a pass {size(memory.activations_nbytes)},"
        f" writing {size(memory.queue_nbytes)}"
    )


def _warnings(plan: RunPlan) -> Iterator[str]:
    """Yield what will not go as one may think, a line each."""
    room = plan.room
    if room is not None and not room.holds:
        yield "The limit does not hold all that would be written: what was computed first would go before the end."
        yield "Raise it with `backprompt-db config --max-size SIZE`, or run less at a time."
    elif room is not None and room.num_evicted_parts:
        yield (
            f"To make room, {plural(room.num_evicted_parts, 'part')} would be evicted: {size(room.evicted_nbytes)},"
            f" which took {duration(room.evicted_seconds)} to compute."
        )
    if plan.num_too_long:
        yield f"{plan.num_too_long:,} texts are too long for the model, and are left out:"
    for each in plan.too_long[:_NUM_TOO_LONG]:
        beginning = visible(shortened(each.beginning, num_characters=_NUM_TEXT_CHARACTERS))
        yield f"  number {each.number:,} needs {each.num_positions:,} of {each.max_positions:,} positions: {beginning}"
    if plan.num_too_long > _NUM_TOO_LONG:
        yield f"  ... and {plan.num_too_long - _NUM_TOO_LONG:,} more"
