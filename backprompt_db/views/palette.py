"""The colours of pictures, in light and dark, and the style sheet that chooses among them.

The colours are those of Okabe and Ito, which people with colour blindness can tell apart. Colour never stands alone:
what is stored is filled darkly, what was computed now is filled lightly, what is missing is hollow and dashed, and
words say the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from backprompt_db.views.scene import State

ROOT = "backprompt-picture"
"""The class of a picture's outermost element. Rules are only for what is inside it, on any page."""

FONT = 'ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace'

CLASSES = {State.STORED: "stored", State.COMPUTED: "computed", State.MISSING: "missing", State.UNKNOWN: "unknown"}
MIXED = "unknown"
"""The class of a fold whose segments are in several states."""

TERMINAL = {State.STORED: "blue", State.COMPUTED: "yellow", State.MISSING: "red", State.UNKNOWN: "bright_black"}
"""The colours that a terminal has names for."""


@dataclass(frozen=True, slots=True)
class _Theme:
    card: str
    ink: str
    pale: str
    line: str
    missing: str
    unknown: str


_LIGHT = _Theme(card="#ffffff", ink="#1f2328", pale="#59636e", line="#8c959f", missing="#b3400a", unknown="#d0d7de")
_DARK = _Theme(card="#161b22", ink="#e6edf3", pale="#9aa4af", line="#6e7681", missing="#ff9a66", unknown="#3d444d")

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


def style_sheet() -> str:
    """Return the CSS of a picture. It is the same for all pictures, so that several can be on one page."""
    return "".join(
        [
            _common(),
            _rules(_LIGHT),
            f"@media (prefers-color-scheme:dark){{{_rules(_DARK)}}}",
            *(_rules(_DARK, page=page) for page in _DARK_PAGES),
            *(_rules(_LIGHT, page=page) for page in _LIGHT_PAGES),
        ]
    )


def _common() -> str:
    return (
        f".{ROOT}{{font:12px {FONT};max-width:100%;height:auto}}"
        f".{ROOT} text{{white-space:pre}}"
        f".{ROOT} .link{{fill:none;stroke-width:1.5}}"
        f".{ROOT} rect{{stroke-width:1.5}}"
        f".{ROOT} .stored{{fill:#0072b2;stroke:#0072b2}}"
        f".{ROOT} .computed{{fill:#e69f00;stroke:#e69f00}}"
        f".{ROOT} .missing{{stroke-dasharray:4 3}}"
    )


def _rules(theme: _Theme, *, page: str = "") -> str:
    here = f"{page}.{ROOT}"
    return (
        f"{here} .card{{fill:{theme.card}}}"
        f"{here} text{{fill:{theme.ink}}}"
        f"{here} .pale{{fill:{theme.pale}}}"
        f"{here} .link{{stroke:{theme.line}}}"
        f"{here} .missing{{fill:{theme.card};stroke:{theme.missing}}}"
        f"{here} .unknown{{fill:{theme.unknown};stroke:{theme.line}}}"
    )
