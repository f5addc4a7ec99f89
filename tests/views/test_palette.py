"""All pictures have the colours of one palette, and these can be seen and read on white and on black."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.views import palette, token_colours
from backprompt_db.views.page import html_page
from backprompt_db.views.palette import DARK, LIGHT, Theme

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = sorted(path for kind in ("svg", "html", "ipynb") for path in DOCS.rglob(f"*.{kind}"))
ACCENTS = {
    *(palette.BLUE, palette.AMBER, palette.VERMILION, palette.GREEN, palette.PINK, palette.GREY),
    *(palette.VIOLET, palette.OLIVE, palette.TEAL),
}
THEMES = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
PAGES = ["#ffffff", "#111111", LIGHT.card, DARK.card]
"""What pictures lie on."""


def luminance(colour: str) -> float:
    """How light a colour is, from 0 to 1, as WCAG 2 defines it."""
    shares = [channel / 255 for channel in palette.channels(colour)]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """From 1, the same, to 21, black on white."""
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def colours_in(text: str) -> set[str]:
    return set(re.findall(r"#[0-9a-f]{6}\b", text))


def test_contrast_is_what_wcag_says() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize("page", PAGES)
def test_every_colour_can_be_seen_on_every_page(page: str) -> None:
    assert {colour for colour in ACCENTS if contrast(colour, page) < 3} == set()


def test_curves_have_colours_of_their_own() -> None:
    assert len(set(palette.SERIES)) == len(palette.SERIES)
    assert set(palette.SERIES) <= ACCENTS


@THEMES
def test_words_can_be_read_on_what_they_lie_on(theme: Theme) -> None:
    for paper in (theme.card, theme.raised):
        assert min(contrast(words, paper) for words in (theme.ink, theme.pale)) >= 4.5
        assert contrast(theme.accent, paper) >= 3


@THEMES
def test_words_can_be_read_in_every_box_of_the_page(theme: Theme) -> None:
    colours = palette.page_properties(theme)
    categories, steps = ({colours[name] for name in colours if name.startswith(kind)} for kind in ("category", "step"))
    assert (len(categories), len(steps)) == (8, 5), "one cannot be told from another"
    boxes = categories | steps | {colours["merged"], colours["trunk"]}
    assert {box for box in boxes if contrast(colours["ink"], box) < 4.5} == set()
    assert contrast(colours["found-ink"], colours["found"]) >= 4.5


@pytest.mark.parametrize(("ink", "page"), [(LIGHT.ink, "#ffffff"), (DARK.ink, "#111111")], ids=["light", "dark"])
def test_the_most_surprising_token_can_be_read(ink: str, page: str) -> None:
    under = Theme(page, page, ink, ink, ink, ink, share=1)
    deepest = max(float(depth) for depth in re.findall(r"rgba\([\d,]+,([\d.]+)\)", token_colours._legend()))
    assert deepest > 0.5
    assert contrast(ink, palette.tint(palette.SURPRISE, under, share=deepest)) >= 4.5


def test_the_interactive_page_has_no_other_colours() -> None:
    known = {colour for theme in (LIGHT, DARK) for colour in palette.page_properties(theme).values()}
    shown = html_page({}, title="").partition("<style>")[2].partition("</style>")[0]
    assert palette.page_colours() in shown
    assert colours_in(shown) <= known
    used = set(re.findall(r"var\(--([\w-]+)\)", shown))
    assert used <= set(palette.page_properties(LIGHT))


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: str(path.relative_to(DOCS)))
def test_a_picture_of_the_documentation_has_no_other_colours(path: Path) -> None:
    themed = {colour for theme in (LIGHT, DARK) for colour in (theme.card, theme.ink, theme.pale, theme.hairline)}
    shown = path.read_text(encoding="utf-8")
    assert colours_in(shown) <= ACCENTS | themed
    tints = {tuple(map(int, each)) for each in re.findall(r"rgba\((\d+),(\d+),(\d+),", shown)}
    assert tints <= {palette.channels(palette.SURPRISE), palette.channels(palette.PROBABILITY)}


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.svg")), ids=lambda path: str(path.relative_to(DOCS)))
def test_a_picture_of_the_documentation_has_a_dark_theme(path: Path) -> None:
    light, _, dark = path.read_text(encoding="utf-8").partition("prefers-color-scheme")
    assert {LIGHT.card, LIGHT.ink} <= colours_in(light + dark)
    assert {DARK.card, DARK.ink} <= colours_in(dark)


def test_a_picture_drawn_now_has_no_other_colours() -> None:
    svg = bp.Text("a").picture().svg()
    known = ACCENTS | {colour for theme in (LIGHT, DARK) for colour in palette.page_properties(theme).values()}
    assert colours_in(svg) <= known
