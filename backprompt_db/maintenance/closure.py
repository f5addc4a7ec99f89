"""Which representations go together: what is wanted, with all that it follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from backprompt_db.keys import Address
from backprompt_db.representation import Origin

Origins = Callable[[Address], Origin | None]
"""Tells what the representation at an address was computed from, None where nothing tells it."""


def closure(origin_of: Origins, wanted: Iterable[Address]) -> Iterator[Address]:
    """Yield the wanted addresses and those of all that they follow, under the same ids, each after what it follows.

    The parts themselves are asked and not the catalog: an address follows from what is found under it. Each address
    comes once; there may be nothing under it.
    """
    done = set[Address]()
    for address in wanted:
        # Not by recursion: a prompt may have ten thousand segments.
        path = [(address, _following(origin_of, address, done))]
        while path:
            current, before = path[-1]
            if before:
                first = before.pop()
                path.append((first, _following(origin_of, first, done)))
                continue
            path.pop()
            if current not in done:
                done.add(current)
                yield current


def _following(origin_of: Origins, address: Address, done: set[Address]) -> list[Address]:
    """Return the addresses that one directly follows and that have not come yet."""
    origin = None if address in done else origin_of(address)
    return [] if origin is None else [each for each in origin.parent_addresses if each not in done]
