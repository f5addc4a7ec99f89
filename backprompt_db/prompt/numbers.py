"""Whole numbers as callers give them: Python's own, and those of other libraries."""

from __future__ import annotations

import operator
from typing import Any


def plain_int(value: Any) -> Any:
    """Return an integer of another library, such as NumPy's, as an int; anything else as it is.

    >>> import numpy
    >>> plain_int(numpy.int64(3)), plain_int(True), plain_int(2.5)
    (3, True, 2.5)
    """
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:  # arrays have the method, and raise it too
        return value
