"""Whether a database has room for what somebody is about to write, and what would have to go. Nothing is changed."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from backprompt_db.errors import CatalogError, StoreError
from backprompt_db.run_plan import RoomForecast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backprompt_db.catalog import Victim
    from backprompt_db.database import Database

logger = logging.getLogger(__name__)

_VICTIMS_PER_CHOICE = 100_000


def room_forecast(db: Database, written_nbytes: int) -> RoomForecast | None:
    """Return whether `written_nbytes` more fit; None for a database that keeps nothing on disk, or cannot be read."""
    if db.readonly or db.directory is None:
        return None
    try:
        live_nbytes = db.store.usage().live_nbytes
    except StoreError as error:
        logger.warning("the store cannot be read: %s", error)
        return None
    high, low = db.collector.max_live_nbytes, db.collector.low_live_nbytes
    has_room = high is None or low is None or live_nbytes + written_nbytes <= high
    victims = [] if has_room or low is None else _victims(db, live_nbytes + written_nbytes - low)
    return RoomForecast(
        live_nbytes=live_nbytes,
        written_nbytes=written_nbytes,
        max_live_nbytes=high,
        holds=has_room or written_nbytes <= (high or 0) - _unremovable(live_nbytes, victims),
        num_evicted_parts=len(victims),
        evicted_nbytes=sum(victim.nbytes for victim in victims),
        evicted_seconds=sum({victim.address: victim.seconds for victim in victims}.values()),
    )


def _unremovable(live_nbytes: int, victims: Sequence[Victim]) -> int:
    """Return what stays when all of them have gone: what is pinned, or needed."""
    return max(0, live_nbytes - sum(victim.nbytes for victim in victims))


def _victims(db: Database, nbytes: int) -> Sequence[Victim]:
    config, catalog = db.collector.limits.config, db.catalog
    if catalog is None:
        return []
    try:
        return catalog.rehearse(
            nbytes,
            at=time.time(),
            grace_seconds=config.grace_seconds,
            ttl_seconds=config.ttl_seconds,
            limit=_VICTIMS_PER_CHOICE,
        )
    except CatalogError as error:
        logger.warning("the catalog cannot be read: %s", error)
        return []
