"""A picture of a prompt, as users get it: it can be printed, saved, and shown in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backprompt_db.errors import PromptError
from backprompt_db.views.console import plain_text
from backprompt_db.views.formatting import plural
from backprompt_db.views.scene import Scene

if TYPE_CHECKING:
    import os

    from rich.console import Group

NUM_ROWS = 40
"""The rows of a picture at most. Further segments are folded, and the picture says so."""

MIN_ROWS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture(Scene):
    """A prompt as a graph: one row for each segment, as wide as it has tokens, from where its parents end.

    A notebook shows it, `print` draws it in characters, `save` writes it to an SVG file. The same prompt in the same
    states gives the same picture.
    """

    def svg(self, *, max_rows: int = NUM_ROWS) -> str:
        """Return an SVG document of at most `max_rows` rows; what does not fit is folded and counted.

        Raises `PromptError` for fewer than 3 rows.
        """
        from backprompt_db.views.svg import svg_view

        return svg_view(self, max_rows=_checked(max_rows))

    def save(self, path: str | os.PathLike[str], *, max_rows: int = NUM_ROWS) -> None:
        """Write the SVG document to a file that only its owner may read. An older one is replaced.

        Raises `PromptError` for fewer than 3 rows, and `OSError`.
        """
        from backprompt_db.system.files import replace_file

        replace_file(Path(path), self.svg(max_rows=max_rows))

    def __rich__(self) -> Group:
        """What rich prints: a table with bars."""
        from backprompt_db.views.terminal import terminal_view

        return terminal_view(self, max_rows=NUM_ROWS)

    def __str__(self) -> str:
        return plain_text(self)

    def __repr__(self) -> str:
        return f"<Picture of {plural(len(self.segments), 'segment')} in {self.unit.value}>"

    def _repr_svg_(self) -> str:
        """What a notebook shows where it shows no HTML."""
        return self.svg()

    def _repr_html_(self) -> str:
        """What a notebook shows: the SVG in the page, so that a text can be pointed at."""
        return self.svg()


def _checked(max_rows: int) -> int:
    if max_rows < MIN_ROWS:
        raise PromptError(f"a picture of {max_rows} rows shows nothing", hint=f"Give max_rows={MIN_ROWS} or more.")
    return max_rows
