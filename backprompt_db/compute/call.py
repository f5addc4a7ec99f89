"""One call of the engine: the parts that it wants, those that it has found or computed so far, and the addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from backprompt_db.codec.fidelity import Fidelity, restore
from backprompt_db.compute import plan
from backprompt_db.compute.plan import Need, Pack, Wanted
from backprompt_db.prompt.ids import Address, ModelIds, address
from backprompt_db.prompt.representation import Arrays, Origin, Part
from backprompt_db.prompt.segments import Segment, ancestry
from backprompt_db.store.contract import Key

if TYPE_CHECKING:
    from backprompt_db.compute.inference.forward import PassResult
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.compute.prefill import Prefill
    from backprompt_db.database.database import Database


@dataclass(frozen=True, slots=True)
class Addresses:
    """Makes addresses under one model and one tokenizer, which must stay the same during a whole call."""

    ids: ModelIds
    is_certain: bool = True
    """Whether the ids are those of objects in memory, and not the recorded ids of their files."""

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
    """The parts that one call wants, the parts that it has found, and the segments that were computed for it.

    Creating a call reads the wanted parts. A part that could not be found, or could not be used, is not looked for
    again: it counts as missing.
    """

    def __init__(
        self,
        db: Database,
        source: ModelSource,
        addresses: Addresses,
        *,
        wanted: Wanted,
        keep: Wanted,
        welcome: Wanted = MappingProxyType({}),
    ) -> None:
        self.addresses = addresses
        self.wanted = wanted
        self.taken = plan.merged([wanted, welcome])
        """What is wanted, and what else is taken of segments that are computed."""
        self.keep = keep
        """Parts to store of a segment that is computed; all of its own where this says nothing."""
        self.found: dict[Need, Arrays] = {}
        self.computed: set[Segment] = set()
        self.spare: dict[Segment, Callable[[], None]] = {}
        """What stores logits that the caller wants, and that were computed and are not kept."""
        self.lengths: dict[Segment, int] = {}
        """Tokens of the segments that had to be tokenised."""
        self.num_model_calls = 0
        self.seconds = 0.0
        self._db = db
        self._source = source
        self._lost: set[Need] = set()
        """Parts that were gone, or could not be used, when they were read."""
        self.fetch((segment, part) for segment, parts in wanted.items() for part in parts)

    def missing(self) -> Wanted:
        """Return the parts that must be computed, by segment, parents before children."""
        return plan.missing_parts(self.wanted, is_stored=self._is_stored)

    def fetch(self, needs: Iterable[Need]) -> list[Need]:
        """Read the needed parts that were not found yet, and return those that are not stored or cannot be used."""
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

    def fetch_wanted(self, segment: Segment) -> None:
        """Read the wanted parts of a segment that was stored since this call was made."""
        self.fetch((segment, part) for part in self.wanted.get(segment, ()))

    def fetch_from_others(self, deferred: Iterable[Segment]) -> None:
        """Read the parts of deferred segments that other calls have stored by now."""
        needs = [(segment, part) for segment in deferred for part in self.wanted.get(segment, ())]
        absent = [need for need in needs if need not in self.found and need not in self._lost]
        self.lose(self.fetch(need for need in absent if self._has(need)))

    def contents(self, segments: Iterable[Segment], prefill: Prefill) -> list[tuple[Address, int]]:
        """Return the addresses and numbers of tokens of segments, as a buffer lists its contents."""
        return [(self.addresses.address(segment), len(prefill.input_ids[segment])) for segment in segments]

    def lose(self, needs: Iterable[Need]) -> None:
        """Record that parts were evicted or damaged since they were looked up: from now on they are missing."""
        for need in needs:
            self.found.pop(need, None)
            self._lost.add(need)

    def is_stored_by_now(self, segment: Segment, prefill: Prefill) -> bool:
        """Whether all missing parts of a segment are stored by now; stored parts will not be stored again."""
        parts = prefill.missing[segment] | prefill.keep[segment]
        stored = frozenset(part for part in parts if self._has((segment, part)))
        prefill.keep[segment] -= stored
        return prefill.missing[segment] <= {part for part in stored if (segment, part) not in self._lost}

    def add(self, pack: Pack, computed: PassResult, prefill: Prefill) -> None:
        """Add the computed parts of a pack that the caller or another pack needs."""
        prefill.retain(pack, computed, self.found)
        self.computed.update(pack.segments)
        self.num_model_calls += computed.num_tokens > 0

    def include(self, other: Call) -> None:
        """Count what another call has computed for this one."""
        self.computed.update(other.computed)
        self.num_model_calls += other.num_model_calls

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the wanted segments, and of those before them, that needed no computation."""
        return sum(self._num_tokens(segment) for segment in ancestry(self.wanted) if segment not in self.computed)

    def _num_tokens(self, segment: Segment) -> int:
        """Return how many tokens a segment has that was found; 0 where nothing is left that could tell."""
        for part, name, axis in ((Part.SCORES, "input_ids", 0), (Part.KV, "keys", 2)):
            if (segment, part) in self.found:
                return self.found[segment, part][name].shape[axis]
        if segment in self.lengths:
            return self.lengths[segment]
        return self._db.num_tokens(self.addresses.address(segment)) or 0

    def _is_stored(self, segment: Segment, part: Part) -> bool:
        need = segment, part
        was_looked_for = part in self.wanted.get(segment, ()) or need in self._lost
        return need in self.found or (not was_looked_for and self._has(need))

    def _has(self, need: Need) -> bool:
        return self._db.has(self.addresses.key(*need))

    def _usable(self, key: Key, arrays: Arrays) -> Arrays | None:
        """Return arrays in the model's dtype; None for keys and values that have not the model's shape."""
        if key.part is not Part.KV:
            return arrays
        if self._db.fidelity is not Fidelity.EXACT:
            arrays = restore(arrays, self._source.runner.kv_dtype)
        if self._source.is_loaded and not self._source.runner.fits(arrays):
            self._db.discard(key)
            return None
        return arrays
