"""The curves of `benchmarks/plots`: what is fitted, what is kept, what is drawn."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.plots import curves
from benchmarks.plots.curves import Curve, Figure
from benchmarks.plots.drawing import PICTURES, draw

SIZES = (128, 256, 512, 1024, 2048, 4096)


@given(exponent=st.floats(0.1, 3), factor=st.floats(1e-3, 1e3))
def test_the_exponent_of_a_power_is_found(exponent: float, factor: float) -> None:
    assert Curve("power", SIZES, [factor * size**exponent for size in SIZES]).exponent == pytest.approx(exponent)


def test_a_constant_that_matters_for_small_sizes_only_hardly_changes_the_exponent() -> None:
    assert Curve("offset", SIZES, [50 + size for size in SIZES]).exponent == pytest.approx(1, abs=0.05)


def test_what_was_measured_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plots.json"
    curves.write(curves.read(), path)
    assert curves.read(path) == curves.read()


@pytest.mark.parametrize("figure", curves.read(), ids=lambda figure: figure.name)
def test_the_pictures_of_the_documentation_show_what_was_measured(figure: Figure, tmp_path: Path) -> None:
    drawn = draw(figure, tmp_path).read_text(encoding="utf-8")
    texts = "".join(ET.fromstring(drawn).itertext())  # noqa: S314  # drawn here
    for curve in figure.curves:
        assert f"{curve.name}: exponent {curve.exponent:.2f}" in texts
    assert (PICTURES / f"{figure.name}.svg").read_text(encoding="utf-8") == drawn
