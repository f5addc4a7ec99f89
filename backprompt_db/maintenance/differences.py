"""Where the store and the catalog disagree about what there is."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from backprompt_db.store.contract import Key

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from backprompt_db.catalog import Catalog
    from backprompt_db.keys import Address
    from backprompt_db.store.contract import Store

_ADDRESSES_PER_PAGE = 5_000


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
    recorded = _Recorded(catalog)
    for sizes in _pages(store):
        last = next(reversed(sizes)).address
        yield from _compare(sizes, recorded.up_to(last))
    yield from recorded.rest()


def _compare(stored: Mapping[Key, int], recorded: set[Key]) -> list[Difference]:
    apart = stored.keys() ^ recorded
    return [Difference(key, stored.get(key)) for key in sorted(apart, key=_order)]


def _pages(store: Store) -> Iterator[dict[Key, int]]:
    """Yield what is stored under the next addresses: all parts of one together, as the catalog has them too."""
    by_address = itertools.groupby(store.keys(), key=lambda found: found[0].address)
    while page := {key: size for _, found in itertools.islice(by_address, _ADDRESSES_PER_PAGE) for key, size in found}:
        yield page


class _Recorded:
    """What the catalog lists, from one address to the next."""

    def __init__(self, catalog: Catalog) -> None:
        self._keys = itertools.starmap(Key, catalog.keys())
        self._next = next(self._keys, None)

    def up_to(self, address: Address) -> set[Key]:
        """Return what comes next, up to an address."""
        found = set[Key]()
        while self._next is not None and self._next.address <= address:
            found.add(self._next)
            self._next = next(self._keys, None)
        return found

    def rest(self) -> Iterator[Difference]:
        """Yield what comes after all that is stored."""
        while self._next is not None:
            address = self._next.address
            yield from _compare({}, self.up_to(address))


def _order(key: Key) -> tuple[bytes, bytes]:
    return key.address, key.part.value
