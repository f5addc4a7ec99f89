"""How commands explain themselves: text that is wrapped at the terminal's width, and flags without a type."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import cleandoc
from typing import Any

from typer.core import TyperCommand


class Command(TyperCommand):
    """A command whose help fits the terminal, whatever the width of the docstring that it is made of."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.help = unwrapped(self.help)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return arguments and options, `--help` included."""
        return without_types(super().get_params(ctx))


def unwrapped(text: str | None) -> str:
    """Return the paragraphs of a docstring, each in one line: typer keeps all line breaks but those of the first."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in cleandoc(text or "").split("\n\n"))


def without_types(parameters: Iterable[Any]) -> list[Any]:
    """Return parameters whose flags show no type, which typer calls `<bool>`: they take no value."""
    shown = list(parameters)
    for parameter in shown:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return shown
