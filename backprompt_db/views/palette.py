"""The colours of all pictures, in light and dark, and the style sheets that choose among them.

The colours are after Okabe and Ito (2008), which people with colour blindness can tell apart, and can be seen on white
and on black alike. Colour never stands alone: what is stored is filled darkly, what was computed now is filled lightly,
what is missing is hollow and dashed, and words say the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from backprompt_db.views.scene import State

BLUE, AMBER, VERMILION, GREEN, PINK, GREY = "#0072b2", "#c07a00", "#d55e00", "#009e73", "#cc79a7", "#7d8590"
VIOLET, OLIVE, TEAL = "#7a5cc0", "#7c8a14", "#178f9c"

STORED, COMPUTED, MISSING = BLUE, AMBER, VERMILION
SURPRISE, PROBABILITY = VERMILION, BLUE
SERIES = (BLUE, VERMILION, GREEN, PINK, GREY, VIOLET)
"""The curves of a plot, in this order."""

ROOT = "backprompt-picture"
"""The class of a picture's outermost element. Rules are only for what is inside it, on any page."""

FONT = 'ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace'

CLASSES = {State.STORED: "stored", State.COMPUTED: "computed", State.MISSING: "missing", State.UNKNOWN: "unknown"}
MIXED = "unknown"
"""The class of a fold whose segments are in several states."""

TERMINAL = {State.STORED: "blue", State.COMPUTED: "yellow", State.MISSING: "red", State.UNKNOWN: "bright_black"}
"""The colours that a terminal has names for."""


@dataclass(frozen=True, slots=True)
class Theme:
    """What differs between light and dark."""

    card: str
    """What a picture is drawn on."""
    raised: str
    """Panels and buttons on it."""
    ink: str
    pale: str
    """Words that matter less."""
    hairline: str
    """The finest lines, and fills that mean nothing."""
    accent: str
    """What is selected."""
    share: float
    """How much of a colour is left in its tint, on which words are written in ink."""


LIGHT = Theme("#ffffff", "#f4f5f8", "#1f2328", "#59636e", "#d0d7de", "#0b57d0", share=0.4)
DARK = Theme("#161b22", "#1f252e", "#e6edf3", "#9aa4af", "#3d444d", "#8ab4f8", share=0.6)

_CATEGORIES = (BLUE, GREEN, AMBER, PINK, VIOLET, VERMILION, OLIVE, TEAL)
_NUM_STEPS = 5
_FOUND, _FOUND_INK = "#ffb000", LIGHT.ink
"""What a search has found stands out in both themes."""

_DARK_PAGES = (
    '[data-jp-theme-light="false"] ',
    ".vscode-dark ",
    '[data-theme="dark"] ',
    '[data-md-color-scheme="slate"] ',
)
_LIGHT_PAGES = (
    '[data-jp-theme-light="true"] ',
    ".vscode-light ",
    '[data-theme="light"] ',
    '[data-md-color-scheme="default"] ',
)
"""How notebooks and documentation say which theme the reader has chosen there, against the system's theme."""


def channels(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue of `#rrggbb`, from 0 to 255.

    >>> channels("#0072b2")
    (0, 114, 178)
    """
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def tint(colour: str, theme: Theme, *, share: float) -> str:
    """Return a colour of which so much is left, the rest being the theme's card.

    >>> tint("#0072b2", LIGHT, share=0.5)
    '#80b8d8'
    """
    pairs = zip(channels(colour), channels(theme.card), strict=True)
    return "#" + "".join(f"{round(share * own + (1 - share) * card):02x}" for own, card in pairs)


def style_sheet() -> str:
    """Return the CSS of a picture. It is the same for all pictures, so that several can be on one page."""
    return "".join(
        [
            _common(),
            _rules(LIGHT),
            f"@media (prefers-color-scheme:dark){{{_rules(DARK)}}}",
            *(_rules(DARK, page=page) for page in _DARK_PAGES),
            *(_rules(LIGHT, page=page) for page in _LIGHT_PAGES),
        ]
    )


def _common() -> str:
    return (
        f".{ROOT}{{font:12px {FONT};max-width:100%;height:auto}}"
        f".{ROOT} text{{white-space:pre}}"
        f".{ROOT} .link{{fill:none;stroke:{GREY};stroke-width:1.5}}"
        f".{ROOT} rect{{stroke-width:1.5}}"
        f".{ROOT} .stored{{fill:{STORED};stroke:{STORED}}}"
        f".{ROOT} .computed{{fill:{COMPUTED};stroke:{COMPUTED}}}"
        f".{ROOT} .missing{{stroke-dasharray:4 3;stroke:{MISSING}}}"
        f".{ROOT} .unknown{{stroke:{GREY}}}"
    )


def _rules(theme: Theme, *, page: str = "") -> str:
    here = f"{page}.{ROOT}"
    return (
        f"{here} .card{{fill:{theme.card}}}"
        f"{here} text{{fill:{theme.ink}}}"
        f"{here} .pale{{fill:{theme.pale}}}"
        f"{here} .missing{{fill:{theme.card}}}"
        f"{here} .unknown{{fill:{theme.hairline}}}"
    )


def page_colours() -> str:
    """Return the CSS that gives the interactive page its colours, as custom properties."""
    light, dark = (
        "".join(f"--{name}:{colour};" for name, colour in page_properties(theme).items()) for theme in (LIGHT, DARK)
    )
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def page_properties(theme: Theme) -> dict[str, str]:
    """Return the colours of the interactive page in one theme, by the names of their custom properties."""
    categories = {f"category{at}": tint(each, theme, share=theme.share) for at, each in enumerate(_CATEGORIES)}
    shares = ((at + 1) * theme.share / (_NUM_STEPS - 1) for at in range(_NUM_STEPS))
    return {
        "paper": theme.card,
        "raised": theme.raised,
        "ink": theme.ink,
        "faint": theme.pale,
        "line": theme.hairline,
        "accent": theme.accent,
        "found": _FOUND,
        "found-ink": _FOUND_INK,
        "merged": tint(GREY, theme, share=theme.share),
        "trunk": theme.hairline,
        "unexpected": " ".join(map(str, channels(SURPRISE))),
        **categories,
        **{f"step{at}": tint(BLUE, theme, share=share) for at, share in enumerate(shares)},
    }
