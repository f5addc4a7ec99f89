"""What rich renders, as plain text and as HTML for notebooks."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from rich.console import Group
from rich.text import Text

from backprompt_db.views.console import bare_table, grid, html_text, literal, plain_text

HOSTILE = "<script>alert(1)</script>\x1b[31m[bold]\u202e&amp;\n:smile:"
SHOWN = r"<script>alert(1)</script>\x1b[31m[bold]\u202e&amp;\n:smile:"


class Reader(HTMLParser):
    """The text of an element, its tags, and the attributes that these have."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set[str](), set[str](), ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def table(*cells: str) -> Group:
    made = bare_table()
    for name in ("first", "second"):
        made.add_column(name, overflow="fold")
    made.add_row(*map(literal, cells), style="yellow")
    return Group(made, "", literal("and a remark", "yellow"))


def test_html_has_every_cell_and_obeys_none() -> None:
    read = Reader(html_text(table(HOSTILE, "plain")))
    assert read.tags == {"pre", "span"}
    assert read.attributes == {"style"}
    assert re.split(r"\s{2,}|\n", read.text.strip()) == ["first", "second", SHOWN, "plain", "and a remark"]


def test_plain_text_has_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = plain_text(table(HOSTILE, "plain")).splitlines()
    assert lines[0].split() == ["first", "second"]
    assert lines[1:] == [f"{SHOWN}  plain", "", "and a remark"]


def test_plain_text_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert max(map(len, plain_text(table("x" * 200, "y" * 200)).splitlines())) == 30
    assert plain_text(grid({"name": "z" * 40})).splitlines() == ["name  " + "z" * 24, "      " + "z" * 16]


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    html_text(table("a", "b"))
    assert "\x1b" not in plain_text(table("a", "b"))
    assert capsys.readouterr() == ("", "")


def test_colours_can_be_read_on_white_and_on_black() -> None:
    html = html_text(Text("careful", "yellow"))
    assert "background" not in html
    (colour,) = set(re.findall(r"color: (#\w{6})", html))
    luminance = sum(
        share * (int(colour[at : at + 2], 16) / 255) ** 2.2 for share, at in ((0.2126, 1), (0.7152, 3), (0.0722, 5))
    )
    assert min(1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05) > 4
