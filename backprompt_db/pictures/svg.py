"""A picture as SVG: bars in rows, as wide as their segments, and lines from parents to children.

No element has an id, so that pictures on one page cannot get in each other's way. Whatever texts hold is shown and
means nothing.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from backprompt_db.display import shortened
from backprompt_db.pictures import palette, wording
from backprompt_db.pictures.layout import lay_out

if TYPE_CHECKING:
    from backprompt_db.pictures.layout import Layout, Row
    from backprompt_db.pictures.picture import Picture

_WIDTH = 860
_LEFT = 18
_RIGHT = 12
_TOP = 12
_BAR_HEIGHT = 20
_ROW_HEIGHT = 28
_LINE_HEIGHT = 18
_RAIL = 8
"""How far left of a bar the line runs down that leads to it."""
_GAP = 6
"""Between a bar and the text in it or beside it."""
_CHARACTER_WIDTH = 7.3
"""Of the monospaced font; wide characters take two."""
_NUM_LABEL_CHARACTERS = 80
_NUM_COLUMNS_INSIDE = 45
"""A bar with room for so much has its text inside, though there might be more room beside it."""
_ISOLATED = "\u2068{}\u2069"
"""Keeps what is written from right to left from turning what stands beside it around."""


def svg_view(picture: Picture, *, max_rows: int) -> str:
    """Return an SVG document."""
    layout = lay_out(picture, max_rows=max_rows)
    canvas = _Canvas(picture, layout)
    legend = list(canvas.legend())
    height = _TOP + len(layout.rows) * _ROW_HEIGHT + len(legend) * _LINE_HEIGHT + _GAP
    body = "\n".join([*canvas.links(), *canvas.rows(), *legend])
    summary = "; ".join(text for _, text in wording.totals(picture)) or "an empty text"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{palette.ROOT}" role="img" width="{_WIDTH}" height="{height}"'
        f' viewBox="0 0 {_WIDTH} {height}" aria-label="{html.escape(f"A prompt. {summary}")}">\n'
        f"<style>{html.escape(palette.style_sheet(), quote=False)}</style>\n"
        f'<rect class="card" width="{_WIDTH}" height="{height}" rx="6"/>\n{body}\n</svg>\n'
    )


class _Span(NamedTuple):
    """From where to where something goes across the picture, in pixels."""

    left: float
    right: float

    @property
    def width(self) -> float:
        return self.right - self.left


@dataclass(frozen=True, slots=True)
class _Canvas:
    """Draws what is laid out."""

    picture: Picture
    layout: Layout

    def links(self) -> Iterator[str]:
        """Yield a line for each edge, down and to the right. Bars are drawn over them."""
        for parent, child in self.layout.edges:
            yield f'<path class="link" data-from="{parent}" data-to="{child}" d="{self._path(parent, child)}"/>'

    def _path(self, parent: int, child: int) -> str:
        above, below = self._span(self.layout.rows[parent]), self._span(self.layout.rows[child])
        rail = below.left - _RAIL
        arrival = f"V{_top(child) + _BAR_HEIGHT / 2} H{_pixels(below.left)}"
        if above.right < rail:
            return f"M{_pixels(above.right)} {_top(parent) + _BAR_HEIGHT - 1} H{_pixels(rail)} {arrival}"
        leave = min(above.right, max(above.left, rail))
        bottom = _top(parent) + _BAR_HEIGHT
        return f"M{_pixels(leave)} {bottom} V{bottom + (_ROW_HEIGHT - _BAR_HEIGHT) / 2} H{_pixels(rail)} {arrival}"

    def rows(self) -> Iterator[str]:
        """Yield a group for each row: its bar, its text, and what is shown when it is pointed at."""
        for at, row in enumerate(self.layout.rows):
            name = palette.CLASSES[row.state] if row.state else palette.MIXED
            span = self._span(row)
            yield (
                f'<g data-segment="{row.number}" data-num-segments="{len(row.segments)}" data-state="{name}">'
                f"<title>{html.escape(wording.tooltip(row))}</title>"
                f'<rect class="{name}" x="{_pixels(span.left)}" y="{_top(at)}" width="{_pixels(span.width)}"'
                f' height="{_BAR_HEIGHT}" rx="{_pixels(min(3, span.width / 2))}"/>{self._text(row, at, span, name)}</g>'
            )

    def _text(self, row: Row, at: int, bar: _Span, name: str) -> str:
        """Write a row's text into its bar where there is room, else beside it where there is most."""
        facts = wording.facts(row, self.picture.unit)
        label = wording.label(row, num_characters=_NUM_LABEL_CHARACTERS)
        needed = (_num_columns(label) + 2 + len(facts)) * _CHARACTER_WIDTH
        inside = _Span(bar.left + _GAP, bar.right - _GAP)
        before = _Span(_GAP, bar.left - (_RAIL if row.segments[0].parents else 0) - _GAP)
        after = _Span(bar.right + _GAP, _WIDTH - _GAP)
        enough = min(needed, _NUM_COLUMNS_INSIDE * _CHARACTER_WIDTH, max(before.width, after.width))
        is_inside = inside.width >= enough
        room = inside if is_inside else max(after, before, key=lambda span: span.width)
        place, anchor = (room.right, "end") if room is before else (room.left, "start")
        label = _fitting(label, int(room.width / _CHARACTER_WIDTH) - 2 - len(facts))
        style = f"in-{name}" if is_inside else "beside"
        return (
            f'<text class="{style}" x="{_pixels(place)}" y="{_top(at) + _BAR_HEIGHT - 6}" text-anchor="{anchor}">'
            f'<tspan class="label">{html.escape(_ISOLATED.format(label))}</tspan>'
            f'<tspan class="facts {style if is_inside else "pale"}">  {html.escape(facts)}</tspan></text>'
        )

    def legend(self) -> Iterator[str]:
        """Yield the lines below: how much is in which state, and what else is to be said."""
        lines = wording.totals(self.picture)
        for at, (state, text) in enumerate(lines):
            swatch = f'x="{_LEFT}" y="{self._baseline(at) - 9}" width="16" height="10" rx="2"'
            yield (
                f'<rect class="{palette.CLASSES[state]}" {swatch}/>'
                f'<text class="pale" x="{_LEFT + 24}" y="{self._baseline(at)}">{html.escape(text)}</text>'
            )
        for at, text in enumerate(wording.remarks(self.picture, self.layout), start=len(lines)):
            yield f'<text class="pale" x="{_LEFT}" y="{self._baseline(at)}">{html.escape(text)}</text>'

    def _baseline(self, line: int) -> float:
        return _TOP + len(self.layout.rows) * _ROW_HEIGHT + line * _LINE_HEIGHT + _LINE_HEIGHT - _GAP

    def _span(self, row: Row) -> _Span:
        scale = (_WIDTH - _LEFT - _RIGHT) / (self.layout.extent or 1)
        return _Span(_LEFT + row.begin * scale, _LEFT + row.end * scale)


def _top(row: int) -> int:
    return _TOP + row * _ROW_HEIGHT


def _pixels(number: float) -> str:
    return f"{number:.3f}".rstrip("0").rstrip(".")


def _num_columns(string: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in string)


def _fitting(string: str, num_columns: int) -> str:
    """Return as much of the beginning of a string as fits."""
    while _num_columns(string) > max(1, num_columns):
        string = shortened(string, num_characters=len(string) - 1)
    return string
