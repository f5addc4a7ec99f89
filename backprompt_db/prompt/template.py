r"""Prompts from rows of a table: a template, cut into segments so that rows share what they have in common."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from backprompt_db.errors import PromptError
from backprompt_db.prompt.text import Text


@dataclass(frozen=True, slots=True)
class _Column:
    name: str


_Piece = tuple[str | _Column, ...]
"""One segment: strings, and columns whose values are strings."""


class Template:
    r"""A prompt in which `{name}` stands for the value of a column, and `{{` and `}}` for braces.

    Each of several `pieces` is a segment. One piece alone is cut before each column, with the white space before it:
    rows share the beginning up to the first column in which they differ, so columns that vary least come first.

    >>> template = Template("{context}\nQ: {question}\nA:")
    >>> [segment.string for segment in template.text({"context": "Facts.", "question": "Who?"}).segments()]
    ['Facts.\nQ:', ' Who?\nA:']

    Raises `PromptError` for braces that do not name a column.
    """

    def __init__(self, *pieces: str) -> None:
        parsed = [tuple(_parsed(piece)) for piece in pieces]
        self._pieces: list[_Piece] = list(_cut(parsed[0])) if len(parsed) == 1 else parsed
        columns = (part.name for piece in self._pieces for part in piece if isinstance(part, _Column))
        self.columns = tuple(dict.fromkeys(columns))
        """Names of the columns, in the order written."""

    def __repr__(self) -> str:
        return f"Template({', '.join(repr(_written(piece)) for piece in self._pieces)})"

    def text(self, values: Mapping[str, str]) -> Text:
        """Return the text of one row, without a model. Raises `PromptError` for a column that the row does not have."""
        text = Text("")
        for piece in self._pieces:
            text += "".join(part if isinstance(part, str) else _value(values, part.name) for part in piece)
        return text


def _written(piece: _Piece) -> str:
    """Return a segment as a template writes it."""
    return "".join(
        part.replace("{", "{{").replace("}", "}}") if isinstance(part, str) else f"{{{part.name}}}" for part in piece
    )


def _parsed(piece: str) -> Iterator[str | _Column]:
    try:
        for literal, name, form, conversion in string.Formatter().parse(piece):
            if literal:
                yield literal
            if name is None:
                continue
            if not name or form or conversion:
                raise _no_template(piece, f"{{{name}...}} is not the name of a column")
            yield _Column(name)
    except ValueError as error:
        if isinstance(error, PromptError):
            raise
        raise _no_template(piece, str(error)) from None


def _no_template(piece: str, problem: str) -> PromptError:
    return PromptError(
        f"{piece!r} is no template: {problem}", hint="Write {name} for a column, {{ and }} for braces themselves."
    )


def _cut(parts: Iterable[str | _Column]) -> Iterator[_Piece]:
    """Divide a template before each column, and before the white space that precedes it.

    Tokenizers that begin a word with its space give the same tokens there as for the whole string.
    """
    piece: list[str | _Column] = []
    for part in parts:
        if isinstance(part, _Column) and piece:
            before = piece.pop() if isinstance(piece[-1], str) else ""
            kept = str(before).rstrip()
            if kept:
                piece.append(kept)
            if piece:
                yield tuple(piece)
            piece = [space] if (space := str(before)[len(kept) :]) else []
        piece.append(part)
    if piece:
        yield tuple(piece)


def _value(values: Mapping[str, str], name: str) -> str:
    if name not in values:
        raise PromptError(f"there is no column {name!r}", hint=f"There are: {', '.join(values) or 'none'}.")
    if not isinstance(values[name], str):
        raise PromptError(
            f"the column {name!r} is of {type(values[name]).__name__}, not str", hint="Convert it with str()."
        )
    return values[name]
