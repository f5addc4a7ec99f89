"""Every error says what happened and what to do now."""

from __future__ import annotations

import inspect
import pickle
import re
from typing import get_type_hints

import pytest

from backprompt_db import errors
from backprompt_db.errors import BackpromptError, PromptError

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


def drawn_tree() -> dict[str, str | None]:
    """The parent of each error in the drawing of the module's docstring."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in inspect.cleandoc(errors.__doc__ or "").split("```")[1].strip().splitlines():
        match = re.match(r"^([│├└─ ]*)(\w+)", line)
        assert match is not None
        depth = len(match[1]) // 4
        path[depth:] = [match[2]]
        parents[match[2]] = path[depth - 1] if depth else None
    return parents


def test_the_tree_is_the_one_that_is_drawn() -> None:
    actual = {kind.__name__: next(base.__name__ for base in kind.__bases__) for kind in ERRORS}
    assert actual == {name: parent or "Exception" for name, parent in drawn_tree().items()}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_has_a_message_and_a_hint(kind: type[BackpromptError]) -> None:
    error = kind("the disk is full", hint="Free some space.")
    assert (error.message, error.hint) == ("the disk is full", "Free some space.")
    assert str(error) == "the disk is full. Free some space."
    assert isinstance(error, BackpromptError)


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_without_a_hint_cannot_be_made(kind: type[BackpromptError]) -> None:
    with pytest.raises(TypeError, match="hint"):
        kind("the disk is full")  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_survives_pickling(kind: type[BackpromptError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", hint="Do this.")))  # noqa: S301 - our own bytes
    assert type(error) is kind
    assert (error.message, error.hint) == ("what", "Do this.")


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_says_what_it_is_for(kind: type[BackpromptError]) -> None:
    assert kind.__dict__["__doc__"]
    assert get_type_hints(kind.__init__)["hint"] is str


def test_a_prompt_error_is_a_value_error() -> None:
    assert issubclass(PromptError, ValueError)
    assert [kind for kind in ERRORS if issubclass(kind, ValueError) and not issubclass(kind, PromptError)] == []
