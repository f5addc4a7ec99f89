"""Whose turn it is: what a call computes itself of the segments that it misses, and what it leaves to others."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from types import TracebackType
from typing import TYPE_CHECKING

from backprompt_db.prompt.segments import Segment, ancestry

if TYPE_CHECKING:
    from backprompt_db.compute.call import Addresses
    from backprompt_db.compute.plan import Pack
    from backprompt_db.database.database import Database
    from backprompt_db.prompt.ids import Address

logger = logging.getLogger(__name__)


class PackClaims:
    """Claims packs for one call, so that others who miss the same wait for it, and waits for what others have claimed.

    A call claims all of a pack or nothing, computes it, and hands it to the writer, who lets go of it whatever becomes
    of it; only then it claims more. When it waits, it holds nothing that it has yet to compute. So nobody who is waited
    for waits for anybody, and no circle can be.
    """

    def __init__(self, db: Database, addresses: Addresses) -> None:
        self.deferred: set[Segment] = set()
        """Missing segments that are left to other calls for now."""
        self._db = db
        self._addresses = addresses
        self._claims = db.single_flight.claims()
        self._mine: list[Address] = []
        self._busy: dict[Segment, Address] = {}
        """What others were seen computing since this call has last waited."""
        self._num_missing = -1
        self._deadline = 0.0

    def available(self, missing: Collection[Segment]) -> list[Segment]:
        """Return those of the missing segments that neither are others' nor depend on such, parents before children.

        Where there are none, waits until others are done with one, or for too long, and returns none: look what is
        missing now.
        """
        self._release()
        if len(missing) != self._num_missing:
            self._num_missing = len(missing)
            self._deadline = time.monotonic() + self._db.single_flight.patience_seconds
        blocked = self._busy.keys() & missing if self._busy else set[Segment]()
        if blocked:
            for segment in ancestry(missing):
                if not blocked.isdisjoint(segment.parents):
                    blocked.add(segment)
        available = [segment for segment in missing if segment not in blocked]
        if not available:
            self._wait()
        self.deferred = blocked
        return available

    def claim(self, pack: Pack) -> bool:
        """Claim all segments of a pack; False where another call has one, or what they depend on was left to others."""
        self._release()
        if self.deferred and not self.deferred.isdisjoint(pack.context):
            self.defer(pack)
            return False
        addresses = {segment: self._addresses.address(segment) for segment in pack.segments}
        busy = {segment: address for segment, address in addresses.items() if not self._claims.take(address)}
        self._mine = [address for segment, address in addresses.items() if segment not in busy]
        if busy:
            self._busy.update(busy)
            self.defer(pack)
        return not busy

    def defer(self, pack: Pack) -> None:
        """Do not compute a pack for now."""
        self.deferred.update(pack.segments)
        self._release()

    def hand_over(self) -> None:
        """Let go of the pack that was taken as soon as all that was put is written, or given up."""
        self._db.when_written(self._claims.promise(self._mine))
        self._mine = []

    def __enter__(self) -> PackClaims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()
        self._claims.close()

    def _release(self) -> None:
        self._claims.give_back(self._mine)
        self._mine = []

    def _wait(self) -> None:
        addresses = list(self._busy.values())
        self._db.tally.add("num_waits")
        if not self._claims.wait_for_any(addresses, seconds=self._deadline - time.monotonic()):
            logger.warning(
                "another process has been computing %d segments for more than %g s: computing them here too",
                len(addresses),
                self._db.single_flight.patience_seconds,
            )
            self._claims.go_alone()
        self._busy.clear()
