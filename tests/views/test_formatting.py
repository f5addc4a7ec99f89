"""How sizes, times and strings are shown to people."""

from __future__ import annotations

import pytest

from backprompt_db.views.formatting import age, duration, size, visible


@pytest.mark.parametrize(
    ("nbytes", "expected"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB")]
)
def test_sizes(nbytes: int, expected: str) -> None:
    assert size(nbytes) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 s"), (0.25, "0.25 s"), (90, "1 min 30 s"), (3725, "1 h 2 min"), (86400, "1 d"), (86405, "1 d")],
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_ages() -> None:
    assert [age(moment, now=100_000.0) for moment in (None, 200_000.0, 99_999.0, 99_900.0, 5_000.0)] == [
        "-", "0 s", "1 s", "1 min", "1 d",
    ]  # fmt: skip


def test_only_what_cannot_be_seen_is_escaped() -> None:
    assert visible("déjà vu 漢字 🎉 \\ '") == "déjà vu 漢字 🎉 \\ '"
    assert visible("\n\x00\x7f\ud800\u2028") == r"\n\x00\x7f\ud800\u2028"
