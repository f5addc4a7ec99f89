"""Prompts out of rows: which column or template makes them, and where each of them came from."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from backprompt_db.cli.rows import LINE, Broken, Place, Row
from backprompt_db.errors import PromptError
from backprompt_db.prompt.template import Template

if TYPE_CHECKING:
    from backprompt_db.prompt.text import Text

MAX_LISTED = 1_000
"""Up to so many rows that are left out are listed; further ones are only counted."""

_COLUMNS = ("prompt", "completion", "text", LINE)
"""Without a template, the first of these that a row has is the prompt."""

_ESCAPE = re.compile(r"\\([nrt\\])")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


class Prompts:
    """Texts out of rows, one after the other.

    Iterating raises `PromptError` at the first row of which no text can be made, unless errors are skipped.
    """

    def __init__(self, rows: Iterable[Row | Broken], template: Template | None, *, skip_errors: bool = False) -> None:
        self.num_broken = 0
        self.broken: list[Broken] = []
        """The first of those that were skipped."""
        self._rows = rows
        self._template = template
        self._skips_errors = skip_errors
        self._lines = array("Q")
        self._files: list[tuple[int, str]] = []
        """The number of the first prompt of each file."""

    def __iter__(self) -> Iterator[Text]:
        for row in self._rows:
            made = self._made(row)
            if isinstance(made, Broken):
                self._leave_out(made)
            else:
                self._remember(row.place)
                yield made

    def place_of(self, number: int) -> Place:
        """Return where a prompt came from, by its number among all prompts, from 0."""
        firsts = [first for first, _ in self._files]
        return Place(self._files[bisect_right(firsts, number) - 1][1], self._lines[number])

    def _made(self, row: Row | Broken) -> Text | Broken:
        if isinstance(row, Broken):
            return row
        try:
            text = (self._template or _default_template(row.values)).text(row.values)
        except PromptError as error:
            return Broken(row.place, f"{error.message}. {error.hint}")
        return text or Broken(row.place, "the prompt is empty")

    def _leave_out(self, broken: Broken) -> None:
        if not self._skips_errors:
            raise PromptError(
                f"{broken.place}: {broken.problem}", hint="Mend it, or leave such rows out with --skip-errors."
            )
        self.num_broken += 1
        self.broken += [broken] if len(self.broken) < MAX_LISTED else []

    def _remember(self, place: Place) -> None:
        if not self._files or self._files[-1][1] != place.file:
            self._files.append((len(self._lines), place.file))
        self._lines.append(place.line)


def template_of(pieces: Sequence[str], separator: str | None) -> Template | None:
    r"""Return the template of a command line, where `\n` means a line break; None where none was given.

    Several pieces are segments as they are; a separator divides them further, and is itself left out.
    """
    if not pieces:
        return None
    plain = [unescaped(piece) for piece in pieces]
    if separator is not None:
        plain = [each for piece in plain for each in piece.split(unescaped(separator))]
        plain += [""] if len(plain) == 1 else []  # a template of two pieces is not cut any further
    return Template(*plain)


def unescaped(string: str) -> str:
    r"""Return a string of a command line with `\n`, `\r`, `\t` and `\\` as what they mean.

    >>> unescaped(r"Q: {question}\nA:")
    'Q: {question}\nA:'
    """
    return _ESCAPE.sub(lambda match: _ESCAPED[match[1]], string)


def _default_template(values: Mapping[str, str]) -> Template:
    name = next((each for each in _COLUMNS if each in values), None)
    if name is None and len(values) != 1:
        raise PromptError(
            f"nothing says which column is the prompt: {', '.join(values) or 'there is none'}",
            hint="Give a --template such as '{question}'.",
        )
    escaped = (name or next(iter(values))).replace("{", "{{").replace("}", "}}")
    return Template("{" + escaped + "}")
