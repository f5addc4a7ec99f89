"""How prompts go on greedily, remembered in the catalog, and in memory where there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from backprompt_db.catalog import GreedyPath

if TYPE_CHECKING:
    from backprompt_db.compute.names import Names
    from backprompt_db.database import Database
    from backprompt_db.keys import Address
    from backprompt_db.text import Segment


class GreedyPaths:
    """The greedy paths that a database knows, and those that were found since."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._unsaved: dict[Address, tuple[int, ...]] = {}
        """Where nothing can be saved, as in memory."""

    def known(self, tips: Iterable[Segment], names: Names) -> dict[Segment, tuple[int, ...]]:
        """Return the path after each of these last segments of prompts, empty where nothing is known of it."""
        addresses = {tip: names.address(tip) for tip in tips}
        recalled = self._db.notes.greedy_paths(set(addresses.values())) | self._unsaved
        return {tip: recalled.get(address, ()) for tip, address in addresses.items()}

    def save(
        self, paths: Mapping[Segment, tuple[int, ...]], names: Names, *, known: Mapping[Segment, tuple[int, ...]]
    ) -> None:
        """Save the paths that say more than those that were known."""
        new = {names.address(tip): path for tip, path in paths.items() if len(path) > len(known[tip])}
        if self._db.catalog is None or self._db.readonly:
            self._unsaved |= new
        elif new:
            self._db.notes.save(*(GreedyPath(address, path) for address, path in new.items()))
