"""Which missing segments a call computes itself, and which it defers because other calls compute them."""

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
    """Claims packs for one call, so that other calls that miss them wait, and waits for what others have claimed.

    A call claims all of a pack or nothing, computes it, and hands it to the writer, which releases the claim whether
    the pack could be written or not. Only then the call claims more. While it waits, it holds no claim on anything that
    it still has to compute. So a call that others wait for never waits itself, and there is no deadlock.
    """

    def __init__(self, db: Database, addresses: Addresses) -> None:
        self.deferred: set[Segment] = set()
        """Missing segments that this call does not compute for now, because other calls do."""
        self._db = db
        self._addresses = addresses
        self._claims = db.single_flight.claims()
        self._mine: list[Address] = []
        self._busy: dict[Segment, Address] = {}
        """Segments that others were seen computing since this call last waited."""
        self._num_missing = -1
        self._deadline = 0.0

    def available(self, missing: Collection[Segment]) -> list[Segment]:
        """Return the missing segments that no other call computes and that depend on none of these.

        They come parents before children. If there are none, waits until others are done with one, or until patience
        ends, and returns none; then the caller must find out what is missing now.
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
        """Claim all segments of a pack; False if another call has one of them, or if they depend on a deferred one."""
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
        """Put off the computation of a pack, and release the claim on it."""
        self.deferred.update(pack.segments)
        self._release()

    def hand_over(self) -> None:
        """Release the claimed pack as soon as everything that was put is written, or given up."""
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
                "another process has been computing %d segments for %g s, or is stopped: computing them here too",
                len(addresses),
                self._db.single_flight.patience_seconds,
            )
            self._claims.go_alone()
        self._busy.clear()
