"""A picture in characters, for a terminal: a table of segments with their bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backprompt_db.views import palette, wording
from backprompt_db.views.console import bare_table
from backprompt_db.views.layout import lay_out

if TYPE_CHECKING:
    from rich.bar import Bar
    from rich.console import Group

    from backprompt_db.views.scene import Scene, State

_NUM_LABEL_CHARACTERS = 60
_FINENESS = 200
"""A bar has at least one in so many parts of the whole, so that none is too thin to be seen."""


def terminal_view(scene: Scene, *, max_rows: int) -> Group:
    """Return what rich prints."""
    from rich.console import Group
    from rich.text import Text

    layout = lay_out(scene, max_rows=max_rows)
    table = bare_table(expand=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("segment", ratio=3, no_wrap=True, overflow="ellipsis")
    table.add_column("", ratio=2, min_width=8)
    table.add_column(scene.unit.value, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("after", no_wrap=True, overflow="ellipsis")
    for at, row in enumerate(layout.rows):
        table.add_row(
            str(row.number),
            Text(wording.label(row, num_characters=_NUM_LABEL_CHARACTERS)),
            share_bar(layout.extent, row.begin, row.end, state=row.state),
            wording.amount(sum(segment.size for segment in row.segments), scene.unit).split(" ")[0],
            Text(wording.state(row), style=palette.TERMINAL[row.state] if row.state else ""),
            ", ".join(str(layout.rows[parent].number) for parent, child in layout.edges if child == at),
        )
    lines = [text for _, text in wording.totals(scene)] + wording.remarks(scene, layout)
    texts = (Text(line) for line in lines)
    return Group(table, "", *texts) if layout.rows else Group(*texts)


def share_bar(extent: float, begin: float, end: float, *, state: State | None) -> Bar:
    """Return a bar from `begin` to `end` of the whole, which is `extent` long. It is never too thin to be seen."""
    from rich.bar import Bar

    extent = extent or 1
    end = max(end, begin + extent / _FINENESS)
    begin = min(begin, end - extent / _FINENESS)
    return Bar(extent, begin, end, color=palette.TERMINAL[state] if state else "default")
