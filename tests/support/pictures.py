"""What a picture shows, read back out of its SVG and HTML."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

SVG = "{http://www.w3.org/2000/svg}"
_ISOLATES = re.compile("[\u2068\u2069]")


@dataclass(frozen=True)
class DrawnRow:
    segment: int
    num_segments: int
    state: str
    x: float
    width: float
    label: str
    facts: str
    tooltip: str


@dataclass(frozen=True)
class Drawn:
    rows: list[DrawnRow]
    edges: list[tuple[int, int]]
    """By the numbers of rows."""
    texts: list[str]
    """Everything that is written, tooltips apart."""
    tags: set[str]
    attributes: set[str]

    @property
    def states(self) -> list[str]:
        return [row.state for row in self.rows]


def read_svg(svg: str) -> Drawn:
    root = ET.fromstring(svg)  # noqa: S314 - we have just made it
    return Drawn(
        rows=[_row(group) for group in root.iter(f"{SVG}g")],
        edges=[
            (int(path.attrib["data-from"]), int(path.attrib["data-to"]))
            for path in root.iter(f"{SVG}path")
            if path.attrib["class"] == "link"
        ],
        texts=[_text(element) for element in root.iter(f"{SVG}text")],
        tags={element.tag.removeprefix(SVG) for element in root.iter()},
        attributes={name for element in root.iter() for name in element.attrib},
    )


def _row(group: ET.Element) -> DrawnRow:
    bar, title = group.find(f"{SVG}rect"), group.find(f"{SVG}title")
    label, facts = group.iter(f"{SVG}text")
    assert bar is not None
    assert title is not None
    return DrawnRow(
        segment=int(group.attrib["data-segment"]),
        num_segments=int(group.attrib["data-num-segments"]),
        state=group.attrib["data-state"],
        x=float(bar.attrib["x"]),
        width=float(bar.attrib["width"]),
        label=_text(label),
        facts=_text(facts),
        tooltip=title.text or "",
    )


def _text(element: ET.Element) -> str:
    return _ISOLATES.sub("", "".join(element.itertext()))


@dataclass(frozen=True)
class ShownToken:
    segment: int
    state: str
    title: str
    style: str
    text: str


class ReadTokens(HTMLParser):
    """The tokens of a result's HTML, each with the segment that it stands in; the next ones have none."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.tokens: list[ShownToken] = []
        self.next: list[tuple[str, str]] = []
        """Title and text."""
        self.texts: list[str] = []
        self.segments: list[dict[str, str]] = []
        self._open: list[dict[str, str]] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "span":
            return
        found = {name: value or "" for name, value in attrs}
        if "data-segment" in found:
            self.segments.append(found)
        self._open.append(found | {"text": ""})

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        for span in self._open:
            span["text"] += data

    def handle_endtag(self, tag: str) -> None:
        if tag != "span":
            return
        span = self._open.pop()
        if not span.get("title", "").startswith("token "):
            return
        if self._open:
            above = self._open[-1]
            self.tokens.append(
                ShownToken(int(above["data-segment"]), above["data-state"], span["title"], span["style"], span["text"])
            )
        else:
            self.next.append((span["title"], span["text"]))
