"""Where a string was found in a text: what lies around it, with the string in colour."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from backprompt_db.display import visible

if TYPE_CHECKING:
    from rich.text import Text

_NUM_CHARACTERS_BEFORE = 8
"""So few that in a narrow column, too, the string is seen."""
_NUM_CHARACTERS = 200
_MAX_PLACES = 100
_STYLE = "bold red"


def places(text: str, string: str) -> list[tuple[int, int]]:
    """Return where a string, in any case, begins and ends in a text: the first hundred places."""
    from backprompt_db.catalog.folding import occurrences

    return list(itertools.islice(occurrences(text, string), _MAX_PLACES))


def excerpt(text: str, string: str) -> Text:
    """Return the text from shortly before the first place where it has the string, with ellipses where it goes on."""
    from rich.text import Text

    found = places(text, string)
    begin = max(0, found[0][0] - _NUM_CHARACTERS_BEFORE) if found else 0
    end = begin + _NUM_CHARACTERS
    shown = Text("…" if begin else "")
    for first, last in itertools.takewhile(lambda place: place[0] < end, found):
        shown.append(visible(text[begin:first])).append(visible(text[first:last]), _STYLE)
        begin = last
    return shown.append(visible(text[begin:end])).append("…" if max(begin, end) < len(text) else "")
