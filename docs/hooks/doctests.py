"""Examples in docstrings are shown as code: Markdown would take their `>>>` for quotations."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

_EXAMPLE = re.compile(r"^>>> .*?(?=\n\n|\Z)", flags=re.MULTILINE | re.DOTALL)


class Doctests(Extension):
    """Put a fence around each example."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Put fences into the docstring of a module, a class, a function or an attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
