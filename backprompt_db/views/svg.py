"""A picture as SVG: each row has a segment's text, a bar as wide as the segment, and facts about it.

Lines lead from the bars of parents to those of their children.

No element has an id, so that several pictures on one page do not disturb each other. Markup in texts is shown as text.
"""

from __future__ import annotations

import html
import textwrap
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from backprompt_db.views import palette, wording
from backprompt_db.views.formatting import shortened
from backprompt_db.views.layout import lay_out

if TYPE_CHECKING:
    from backprompt_db.views.layout import Layout, Row
    from backprompt_db.views.scene import Scene

_WIDTH = 940
_MARGIN = 16
_LABELS_WIDTH = 300
_FACTS_WIDTH = 248
_BARS_LEFT = _MARGIN + _LABELS_WIDTH + 14
_BARS_RIGHT = _WIDTH - _MARGIN - _FACTS_WIDTH - 14
_TOP = 12
_BAR_HEIGHT = 18
_ROW_HEIGHT = 26
_LINE_HEIGHT = 18
_GAP = 6
_RAIL = 8
"""How far left of a bar the line runs down that leads to it."""
_CHARACTER_WIDTH = 7.3
"""Pixels; wide characters take two such columns."""
_NUM_LABEL_COLUMNS = int(_LABELS_WIDTH / _CHARACTER_WIDTH)
_NUM_FACTS_COLUMNS = int((_FACTS_WIDTH + _MARGIN) / _CHARACTER_WIDTH)
_NUM_REMARK_COLUMNS = int((_WIDTH - 2 * _MARGIN) / _CHARACTER_WIDTH)
_ISOLATED = "\u2068{}\u2069"
"""Between these marks, text from right to left does not reorder what stands beside it."""


class _Span(NamedTuple):
    """The left and right end of a bar, in pixels."""

    left: float
    right: float


def svg_view(scene: Scene, *, max_rows: int) -> str:
    """Return an SVG document."""
    layout = lay_out(scene, max_rows=max_rows)
    canvas = _Canvas(scene, layout)
    legend = list(canvas.legend())
    height = _TOP + len(layout.rows) * _ROW_HEIGHT + len(legend) * _LINE_HEIGHT + _GAP
    body = "\n".join([*canvas.links(), *canvas.rows(), *legend])
    summary = "; ".join(text for _, text in wording.totals(scene)) or "an empty text"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{palette.ROOT}" role="img" width="{_WIDTH}" height="{height}"'
        f' viewBox="0 0 {_WIDTH} {height}" aria-label="{html.escape(f"A prompt. {summary}")}">\n'
        f"<style>{html.escape(palette.style_sheet(), quote=False)}</style>\n"
        f'<rect class="card" width="{_WIDTH}" height="{height}" rx="6"/>\n{body}\n</svg>\n'
    )


@dataclass(frozen=True, slots=True)
class _Canvas:
    """Draws the parts of one picture."""

    scene: Scene
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
                f"{_bar(span, at, name)}{self._words(row, at)}</g>"
            )

    def _words(self, row: Row, at: int) -> str:
        """Write a row's text before its bar, and its facts behind the bar."""
        label = _fitting(wording.label(row, num_characters=_NUM_LABEL_COLUMNS), _NUM_LABEL_COLUMNS)
        facts = _fitting(wording.facts(row, self.scene.unit), _NUM_FACTS_COLUMNS)
        words = (("label", label, _MARGIN), ("facts pale", facts, _WIDTH - _MARGIN - _FACTS_WIDTH))
        return "".join(
            f'<text class="{kind}" x="{x}" y="{_top(at) + _BAR_HEIGHT - 5}">'
            f"{html.escape(_ISOLATED.format(text))}</text>"
            for kind, text, x in words
        )

    def legend(self) -> Iterator[str]:
        """Yield the lines below the rows: how much is in which state, and remarks."""
        lines = wording.totals(self.scene)
        for at, (state, text) in enumerate(lines):
            swatch = f'x="{_MARGIN}" y="{self._baseline(at) - 9}" width="16" height="10" rx="2"'
            yield (
                f'<rect class="{palette.CLASSES[state]}" {swatch}/>'
                f'<text class="pale" x="{_MARGIN + 24}" y="{self._baseline(at)}">{html.escape(text)}</text>'
            )
        remarks = wording.remarks(self.scene, self.layout)
        wrapped = (line for remark in remarks for line in textwrap.wrap(remark, _NUM_REMARK_COLUMNS))
        for at, text in enumerate(wrapped, start=len(lines)):
            yield f'<text class="pale" x="{_MARGIN}" y="{self._baseline(at)}">{html.escape(text)}</text>'

    def _baseline(self, line: int) -> float:
        return _TOP + len(self.layout.rows) * _ROW_HEIGHT + line * _LINE_HEIGHT + _LINE_HEIGHT - _GAP

    def _span(self, row: Row) -> _Span:
        scale = (_BARS_RIGHT - _BARS_LEFT) / (self.layout.extent or 1)
        return _Span(_BARS_LEFT + row.begin * scale, _BARS_LEFT + row.end * scale)


def _bar(span: _Span, at: int, name: str) -> str:
    width = span.right - span.left
    return (
        f'<rect class="{name}" x="{_pixels(span.left)}" y="{_top(at)}" width="{_pixels(width)}"'
        f' height="{_BAR_HEIGHT}" rx="{_pixels(min(3, width / 2))}"/>'
    )


def _top(row: int) -> int:
    return _TOP + row * _ROW_HEIGHT


def _pixels(number: float) -> str:
    return f"{number:.3f}".rstrip("0").rstrip(".")


def _num_columns(string: str) -> int:
    """Return how many columns of a monospaced font a string takes."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in string)


def _fitting(string: str, columns: int) -> str:
    """Return as much of the beginning of a string as fits into so many columns."""
    while _num_columns(string) > max(1, columns):
        string = shortened(string, num_characters=len(string) - 1)
    return string
