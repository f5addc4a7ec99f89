"""Figures as SVG files, the same for the same figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler

from backprompt_db.views.palette import DARK, GREY, LIGHT, SERIES
from benchmarks.plots.curves import Figure

PICTURES = Path(__file__).parent.parent.parent / "docs" / "pictures"

_STYLE = {
    "axes.edgecolor": LIGHT.ink,
    "axes.facecolor": LIGHT.card,
    "axes.grid": True,
    "axes.labelcolor": LIGHT.ink,
    "axes.prop_cycle": cycler(color=SERIES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": LIGHT.card,
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.color": GREY,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "svg.fonttype": "none",
    "svg.hashsalt": "backprompt-db",
    "text.color": LIGHT.ink,
    "xtick.color": LIGHT.ink,
    "ytick.color": LIGHT.ink,
}

_MARKERS = "osD^v<"
"""Colour never stands alone."""


def draw(figure: Figure, directory: Path = PICTURES) -> Path:
    """Draw a figure with both axes logarithmic; return its file."""
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context(_STYLE):
        canvas = Canvas(figsize=(7.2, 4.2))
        axes = canvas.subplots()
        for index, curve in enumerate(figure.curves):
            line = "--" if curve.is_bound else "-"
            label = f"{curve.name}: exponent {curve.exponent:.2f}"
            axes.loglog(curve.sizes, curve.values, line, marker=_MARKERS[index % len(_MARKERS)], label=label)
        _name_axes(axes, figure)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{figure.name}.svg"
        canvas.savefig(path, metadata={"Date": None, "Creator": None, "Title": figure.title})
    path.write_text(_with_dark_theme(path.read_text(encoding="utf-8")), encoding="utf-8")
    return path


def _with_dark_theme(svg: str) -> str:
    """Return what matplotlib has drawn in light, with rules that change card and ink where the reader has it dark."""
    changes = ((LIGHT.card, DARK.card), (LIGHT.ink, DARK.ink))
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}: {dark} !important}}'
        for light, dark in changes
        for kind in ("fill", "stroke")
    )
    return svg.replace("</style>", f"@media (prefers-color-scheme: dark){{{rules}}}</style>", 1)


def _name_axes(axes: Any, figure: Figure) -> None:
    sizes = sorted({size for curve in figure.curves for size in curve.sizes})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    lowest, highest = (bound(curve.values) for bound, curve in _extremes(figure))
    axes.set_ylim(lowest / 1.6, highest * 1.6)
    axes.set_xlabel(figure.size_label)
    axes.set_ylabel(figure.value_label)
    axes.set_title(figure.title, loc="left", fontweight="bold")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1, alignment="left")


def _extremes(figure: Figure) -> list[tuple[Any, Any]]:
    lowest = min(figure.curves, key=lambda curve: min(curve.values))
    highest = max(figure.curves, key=lambda curve: max(curve.values))
    return [(np.min, lowest), (np.max, highest)]
