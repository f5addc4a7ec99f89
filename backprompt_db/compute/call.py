"""One call of the engine: what it wants, what it has found and computed so far, and the addresses of everything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backprompt_db.codec.fidelity import Fidelity, restore
from backprompt_db.compute import plan
from backprompt_db.compute.plan import Need, Pack, Wanted
from backprompt_db.prompt.ids import Address, ModelIds, address
from backprompt_db.prompt.representation import Arrays, Origin, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.store.contract import Key

if TYPE_CHECKING:
    from backprompt_db.compute.inference.forward import PassResult
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.compute.prefill import Prefill
    from backprompt_db.database.database import Database


@dataclass(frozen=True, slots=True)
class Addresses:
    """Addresses under one model and one tokenizer, which must stay the same for the whole of a call."""

    ids: ModelIds
    is_certain: bool = True
    """Whether the ids are those of objects in memory, not those that were recorded for their files."""

    def address(self, segment: Segment) -> Address:
        """Return the address of a segment's representation."""
        return address(segment.id, *self.ids)

    def key(self, segment: Segment, part: Part) -> Key:
        """Return the store's key of one part of a segment."""
        return Key(self.address(segment), part)

    def origin(self, segment: Segment, num_tokens: int, seconds: float, *, versions: Mapping[str, str]) -> Origin:
        """Return what is stored beside a segment that was computed in `seconds`."""
        return Origin(
            text=segment.string,
            parents=segment.parent_ids,
            start=segment.start,
            weights_id=self.ids.weights_id,
            tokenizer_id=self.ids.tokenizer_id,
            num_tokens=num_tokens,
            compute_seconds=seconds,
            namespace=segment.namespace,
            versions=versions,
        )


class Call:
    """What one call wants, what it has found of that and of what it needs for it, and what was computed for it.

    Making one reads what is wanted. A part that was looked for and is not there, or is of no use, is not looked for
    again: it counts as missing.
    """

    def __init__(
        self, db: Database, source: ModelSource, addresses: Addresses, *, wanted: Wanted, keep: Wanted
    ) -> None:
        self.addresses = addresses
        self.wanted = wanted
        self.keep = keep
        """Parts to store of a segment that is computed; all three where this says nothing."""
        self.found: dict[Need, Arrays] = {}
        self.computed: set[Segment] = set()
        self._db = db
        self._source = source
        self._lost: set[Need] = set()
        """Parts that were gone, or of no use, when they were read."""
        self.fetch((segment, part) for segment, parts in wanted.items() for part in parts)

    def missing(self) -> Wanted:
        """Return the parts that must be computed, by segment, parents before children."""
        return plan.missing_parts(self.wanted, is_stored=self._is_stored)

    def fetch(self, needs: Iterable[Need]) -> list[Need]:
        """Read those of the needed parts that are not here yet, and return those that cannot be had."""
        absent = [need for need in needs if need not in self.found]
        segments = dict.fromkeys(segment for segment, _ in absent)
        places = {segment: self.addresses.address(segment) for segment in segments}
        wanted: dict[Address, list[Part]] = {place: [] for place in places.values()}
        for segment, part in absent:
            wanted[places[segment]].append(part)
        read = self._db.fetch(wanted)
        for segment, part in absent:
            key = Key(places[segment], part)
            arrays = self._usable(key, read[key]) if key in read else None
            if arrays is not None:
                self.found[segment, part] = arrays
        return [need for need in absent if need not in self.found]

    def fetch_from_others(self, deferred: Iterable[Segment]) -> None:
        """Read what other calls have stored by now of the segments that were left to them."""
        needs = [(segment, part) for segment in deferred for part in self.wanted.get(segment, ())]
        self.lose(self.fetch(need for need in needs if need not in self._lost and self._has(need)))

    def contents(self, segments: Iterable[Segment], prefill: Prefill) -> list[tuple[Address, int]]:
        """Return what a buffer says of segments that lie in it: their addresses and numbers of tokens."""
        return [(self.addresses.address(segment), len(prefill.input_ids[segment])) for segment in segments]

    def lose(self, needs: Iterable[Need]) -> None:
        """Note parts that were evicted or damaged since they were looked up: from now on they are missing."""
        for need in needs:
            self.found.pop(need, None)
            self._lost.add(need)

    def is_stored_by_now(self, segment: Segment, prefill: Prefill) -> bool:
        """Whether all that was missing of a segment is stored now; what is stored will not be kept once more."""
        parts = prefill.missing[segment] | prefill.keep[segment]
        stored = frozenset(part for part in parts if self._has((segment, part)))
        prefill.keep[segment] -= stored
        return prefill.missing[segment] <= {part for part in stored if (segment, part) not in self._lost}

    def add(self, pack: Pack, computed: PassResult, prefill: Prefill) -> None:
        """Add what a pack has computed, as far as somebody needs it."""
        prefill.retain(pack, computed, self.found)
        self.computed.update(pack.segments)

    def _is_stored(self, segment: Segment, part: Part) -> bool:
        need = segment, part
        was_looked_for = part in self.wanted.get(segment, ()) or need in self._lost
        return need in self.found or (not was_looked_for and self._has(need))

    def _has(self, need: Need) -> bool:
        return self._db.has(self.addresses.key(*need))

    def _usable(self, key: Key, arrays: Arrays) -> Arrays | None:
        """Return arrays as the model has them; None for keys and values that are not of its shape."""
        if key.part is not Part.KV:
            return arrays
        if self._db.fidelity is not Fidelity.EXACT:
            arrays = restore(arrays, self._source.runner.kv_dtype)
        if self._source.is_loaded and not self._source.runner.fits(arrays):
            self._db.discard(key)
            return None
        return arrays
