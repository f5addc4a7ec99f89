"""What rich renders, as plain text and as HTML, and the tables and cells that all views have in common."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backprompt_db.views.formatting import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_NUM_HTML_COLUMNS = 160
_HTML = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;'
    "font-family:Menlo,'DejaVu Sans Mono',consolas,'Courier New',monospace\">{code}</pre>"
)


def plain_text(renderable: RenderableType) -> str:
    """Return what rich would print, without colours, as wide as the terminal."""
    console = _recorder(width=None)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def html_text(renderable: RenderableType) -> str:
    """Return what rich would print as one HTML element, for a notebook. Markup in what is printed is shown as text.

    Text has the colour of the page, and yellow is olive, which can be read on white and on black.
    """
    console = _recorder(width=_NUM_HTML_COLUMNS)
    console.print(renderable)
    return console.export_html(code_format=_HTML, inline_styles=True)


def _recorder(*, width: int | None) -> Console:
    from rich.console import Console

    # Not for Jupyter: there, a console shows what is printed at once, besides recording it.
    return Console(
        record=True, file=io.StringIO(), width=width, color_system=None, force_terminal=False, force_jupyter=False,
        highlight=False, markup=False, emoji=False,
    )  # fmt: skip


def bare_table(**settings: Any) -> Table:
    """Return a table without lines, with a bold header."""
    from rich.table import Table

    return Table(box=None, pad_edge=False, header_style="bold", **settings)


def grid(rows: Mapping[str, str], *, name_style: str = "") -> Table:
    """Return names and values side by side."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style=name_style)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, literal(value))
    return table


def literal(string: str, style: str = "") -> Text:
    """Return a text that is shown as it is, with control characters as escapes."""
    from rich.text import Text

    return Text(visible(string), style)


def one_line(text: Text) -> Text:
    """Make a text one line. The text must not wrap, rather than its column, so that the column can still shrink."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
