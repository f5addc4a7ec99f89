"""Where the store and the catalog disagree about what there is."""

from __future__ import annotations

import heapq
import itertools
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from backprompt_db.store.contract import Key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from backprompt_db.catalog import Catalog
    from backprompt_db.store.contract import Store


class Difference(NamedTuple):
    """A part that is on one side only."""

    key: Key
    nbytes: int | None
    """Its size in the store; None when only the catalog has it."""

    @property
    def is_stored(self) -> bool:
        """True in the store but not in the catalog; False in the catalog but not in the store."""
        return self.nbytes is not None


def differences(store: Store, catalog: Catalog) -> Iterator[Difference]:
    """Yield the parts that only one of the two has, by address, in memory that does not grow with their number.

    Parts that are stored or deleted meanwhile may appear or not.
    """
    stored = (Difference(*found) for found in store.keys())
    recorded = (Difference(key, None) for key in _recorded_keys(catalog))
    merged = heapq.merge(stored, recorded, key=lambda found: _order(found.key))
    for _, found in itertools.groupby(merged, key=itemgetter(0)):
        sides = list(found)
        if len(sides) == 1:
            yield sides[0]


def _recorded_keys(catalog: Catalog) -> Iterator[Key]:
    """Yield the catalog's keys in the store's order: it has the parts of an address in another one."""
    keys = itertools.starmap(Key, catalog.keys())
    for _, parts in itertools.groupby(keys, key=itemgetter(0)):
        yield from sorted(parts, key=_order)


def _order(key: Key) -> tuple[bytes, bytes]:
    return key.address, key.part.value
