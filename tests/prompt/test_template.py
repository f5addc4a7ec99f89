"""Templates: columns, braces, and where they are cut into segments."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db import Template
from backprompt_db.errors import PromptError

VALUES = {"a": "one", "b": "two", "first name": "Ada"}


def segments(template: Template) -> list[str]:
    return [segment.string for segment in template.text(VALUES).segments()]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{a}", ["one"]),
        ("Q: {a}\nA:", ["Q:", " one\nA:"]),
        ("{a}\nQ: {b}\nA:", ["one\nQ:", " two\nA:"]),
        ("{a} {b}", ["one", " two"]),
        ("{a}{b}", ["one", "two"]),
        (" \n{a}", [" \none"]),
        ("No column.", ["No column."]),
        ("{{{a}}} and {{}}", ["{", "one} and {}"]),
        ("Dear {first name},", ["Dear", " Ada,"]),
    ],
)
def test_it_is_cut_before_each_column_and_the_space_before_it(template: str, expected: list[str]) -> None:
    assert segments(Template(template)) == expected


def test_several_pieces_are_segments_as_they_are() -> None:
    assert segments(Template("Q: {a}{b}", "", "\nA: {a}")) == ["Q: onetwo", "\nA: one"]


def test_columns_are_named_once_in_the_order_written() -> None:
    assert Template("{b} {a} {b}").columns == ("b", "a")


@pytest.mark.parametrize("template", ["{", "}", "{}", "{a!r}", "{a:>5}", "{a", "a}"])
def test_braces_that_are_no_columns_are_refused(template: str) -> None:
    with pytest.raises(PromptError, match="is no template"):
        Template(template)


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(PromptError, match="no column 'c'") as error:
        Template("{c}").text(VALUES)
    assert error.value.hint == "There are: a, b, first name."


def test_a_value_that_is_no_string_is_named() -> None:
    row: Any = {"a": 7}
    with pytest.raises(PromptError, match="the column 'a' is of int, not str"):
        Template("{a}").text(row)


@given(st.lists(st.sampled_from(["{a}", "{b}", " ", "\n", "x", "{{", "}}"]), max_size=12))
def test_cuts_change_no_character(parts: list[str]) -> None:
    template = "".join(parts)
    assert str(Template(template).text(VALUES)) == template.format(**VALUES)
    assert bool(Template(template).text(VALUES)) == bool(template)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_values_stand_as_they_are(value: str) -> None:
    assert str(Template("[{a}]").text({"a": value})) == f"[{value}]"
    assert isinstance(Template("[{a}]").text({"a": value}), bp.Text)
