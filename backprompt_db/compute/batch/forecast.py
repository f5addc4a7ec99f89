"""What a run would compute, write and need: its batches played through without the model's weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from backprompt_db.compute import plan
from backprompt_db.compute.batch.costs import (
    Peak,
    Sizes,
    header_size,
    memory_forecast,
    pages_size,
    pass_units,
    seconds_per_unit,
)
from backprompt_db.compute.batch.requests import IsStored, Order, Orders, Work, batches, lacking, too_long, work_of
from backprompt_db.compute.batch.run_plan import MAX_LISTED, RoomForecast, RunPlan, TooLong
from backprompt_db.compute.explain import wait_until_written
from backprompt_db.compute.inference.forward import fed_lengths
from backprompt_db.compute.prefill import Passes
from backprompt_db.errors import CatalogError, StoreError
from backprompt_db.prompt.representation import Part

if TYPE_CHECKING:
    from backprompt_db.catalog.records import EvictionCandidate
    from backprompt_db.compute.call import Addresses
    from backprompt_db.compute.engine import Engine
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.compute.inference.outline import Outline
    from backprompt_db.compute.plan import Pack
    from backprompt_db.database.database import Database
    from backprompt_db.prompt.ids import SegmentId
    from backprompt_db.prompt.segments import Segment


_Lengths = Mapping["Segment", int]


def forecast(engine: Engine, source: ModelSource, db: Database, orders: Orders, *, batch_size: int) -> RunPlan:
    """Return what running orders in batches would take. Nothing is computed or written; the tokenizer is loaded.

    Memory grows by some 200 bytes for each distinct segment, not with its text.
    """
    wait_until_written(db)
    addresses = engine.addresses()
    record = db.model_metadata.recall(lambda catalog: catalog.model(addresses.ids.weights_id))
    outline = source.outline(record)
    rehearsal = Rehearsal(db, source, addresses, outline, deterministic=engine.is_deterministic)
    for batch in batches(orders, batch_size):
        rehearsal.play(batch)
    counts = rehearsal.counts
    pace = seconds_per_unit(db.catalogs, addresses, outline.costs) if counts.num_passes else 0.0
    return RunPlan(
        model_name=record.name if record and record.name else source.name,
        dtype=outline.dtype,
        weights_id=addresses.ids.weights_id,
        tokenizer_id=addresses.ids.tokenizer_id,
        namespace=db.namespace,
        num_texts=counts.num_texts,
        num_stored_texts=counts.num_stored_texts,
        num_completions=None if orders.completions is None else len(orders.completions),
        num_segments=counts.num_segments,
        num_missing_segments=counts.num_missing_segments,
        num_cached_tokens=counts.num_cached_tokens,
        num_missing_tokens=counts.num_missing_tokens,
        num_passes=counts.num_passes,
        seconds=None if pace is None else pace * counts.units,
        nbytes=counts.nbytes,
        overhead_nbytes=counts.overhead_nbytes,
        memory=memory_forecast(
            outline,
            counts.peak,
            num_missing_tokens=counts.num_missing_tokens,
            written_nbytes=sum(counts.nbytes.values()) + counts.overhead_nbytes,
            budget_nbytes=db.memory.budget_nbytes,
        ),
        room=room_forecast(db, counts.pages_nbytes),
        num_too_long=counts.num_too_long,
        too_long=tuple(counts.too_long),
    )


@dataclass(slots=True)
class _Counts:
    """What the batches have come to so far; most is what `RunPlan` says of it."""

    num_texts: int = 0
    num_stored_texts: int = 0
    num_segments: int = 0
    num_missing_segments: int = 0
    num_cached_tokens: int = 0
    num_missing_tokens: int = 0
    num_passes: int = 0
    units: float = 0.0
    """What the passes cost, as `pass_units` has it."""
    nbytes: dict[Part, int] = field(default_factory=lambda: dict.fromkeys(Part, 0))
    overhead_nbytes: int = 0
    pages_nbytes: int = 0
    peak: Peak = field(default_factory=Peak)
    num_too_long: int = 0
    too_long: list[TooLong] = field(default_factory=list)


class Rehearsal:
    """Batches played through one after the other, each as if those before had been run."""

    def __init__(
        self, db: Database, source: ModelSource, addresses: Addresses, outline: Outline, *, deterministic: bool
    ) -> None:
        self.counts = _Counts()
        self._db = db
        self._source = source
        self._addresses = addresses
        self._outline = outline
        self._deterministic = deterministic
        self._sizes = Sizes(outline, db.fidelity)
        self._seen: set[SegmentId] = set()
        self._written: dict[SegmentId, frozenset[Part]] = {}
        """What would be stored by now that is not."""

    def play(self, batch: Sequence[Order]) -> None:
        """Go through what a run would do about one batch."""
        segments = dict.fromkeys(segment for order in batch for segment in order.segments)
        input_ids = self._source.tokenizer.encode(segments)
        lengths = {segment: len(ids) for segment, ids in input_ids.items()}
        is_stored = cache(self._is_stored)
        lack = lacking(batch, is_stored)
        problems = {order: self._too_long(order, lengths) for order in lack}
        work = work_of([order for order in lack if problems[order] is None], is_stored)
        missing = plan.missing_parts(work.wanted, is_stored=is_stored)
        self.counts.num_texts += len(batch)
        self.counts.num_stored_texts += len(batch) - len(lack)
        self._leave_out([problem for problem in problems.values() if problem is not None])
        taken = [order for order in batch if problems.get(order) is None]
        self._see((segment for order in taken for segment in order.segments), missing, lengths, is_stored)
        passes = Passes(
            self._packs(missing, lengths), input_ids, {}, work.wanted, missing,
            self._kept(missing, work, is_stored), self._deterministic,
        )  # fmt: skip
        self._compute(passes, lengths)

    def _is_stored(self, segment: Segment, part: Part) -> bool:
        written = self._written.get(segment.id, frozenset())
        return part in written or self._db.has(self._addresses.key(segment, part))

    def _too_long(self, order: Order, lengths: _Lengths) -> TooLong | None:
        return too_long(order, lengths, self._outline.bounds, is_deterministic=self._deterministic)

    def _packs(self, missing: Mapping[Segment, object], lengths: _Lengths) -> list[Pack]:
        """Divide what is missing as the engine does."""
        return plan.packs(
            list(missing),
            lengths,
            costs=self._outline.costs,
            max_segments=1 if self._deterministic or not self._outline.takes_packs else None,
            max_columns=self._outline.bounds.max_columns,
        )

    def _kept(self, missing: Iterable[Segment], work: Work, is_stored: IsStored) -> dict[Segment, frozenset[Part]]:
        """Return the parts of each segment that would be written: all but what is there."""
        return {
            segment: frozenset(part for part in work.keep.get(segment, Part) if not is_stored(segment, part))
            for segment in missing
        }

    def _leave_out(self, problems: Sequence[TooLong]) -> None:
        self.counts.num_too_long += len(problems)
        self.counts.too_long += problems[: MAX_LISTED - len(self.counts.too_long)]

    def _see(
        self, segments: Iterable[Segment], missing: Mapping[Segment, object], lengths: _Lengths, is_stored: IsStored
    ) -> None:
        """Count segments that no batch before has had."""
        new = dict.fromkeys(segment for segment in segments if segment.id not in self._seen)
        self._seen.update(segment.id for segment in new)
        cached = (each for each in new if each not in missing and any(is_stored(each, part) for part in Part))
        self.counts.num_segments += len(new)
        self.counts.num_cached_tokens += sum(lengths[segment] for segment in cached)

    def _compute(self, passes: Passes, lengths: _Lengths) -> None:
        for pack in passes.packs:
            self._pass(pack, passes, lengths)
        for segment in passes.missing:
            self._write(segment, passes.keep[segment], lengths[segment])
        passed_on = (segment for segment in passes.missing if passes.is_used((segment, Part.KV)))
        self.counts.peak.num_passed_on = max(
            self.counts.peak.num_passed_on, sum(lengths[segment] for segment in passed_on)
        )
        self.counts.num_missing_segments += len(passes.missing)

    def _pass(self, pack: Pack, passes: Passes, lengths: _Lengths) -> None:
        produce = {segment: passes.produced(segment) for segment in pack.segments}
        num_fed = sum(fed_lengths(pack, lengths, produce).values())
        num_context = sum(lengths[segment] for segment in pack.context)
        if num_fed:
            self.counts.num_passes += 1
            self.counts.units += pass_units(self._outline.costs, num_fed, num_context)
        self.counts.num_missing_tokens += passes.num_tokens(pack)
        self.counts.peak.see_pass(num_fed, num_context)

    def _write(self, segment: Segment, parts: frozenset[Part], num_tokens: int) -> None:
        if self._db.readonly:
            return
        self._written[segment.id] = parts | self._written.get(segment.id, frozenset())
        for part in parts:
            nbytes, header_nbytes = self._sizes.arrays(part, num_tokens), header_size(part, segment)
            self.counts.nbytes[part] += nbytes
            self.counts.overhead_nbytes += header_nbytes
            self.counts.pages_nbytes += pages_size(nbytes + header_nbytes)


logger = logging.getLogger(__name__)


def room_forecast(db: Database, written_nbytes: int) -> RoomForecast | None:
    """Return whether `written_nbytes` more fit; None for a database that keeps nothing on disk, or cannot be read."""
    if db.readonly or db.directory is None:
        return None
    try:
        live_nbytes = db.store.usage().live_nbytes
    except StoreError as error:
        logger.warning("the store cannot be read: %s", error)
        return None
    high, low = db.evictor.max_live_nbytes, db.evictor.low_live_nbytes
    has_room = high is None or low is None or live_nbytes + written_nbytes <= high
    candidates = [] if has_room or low is None else _eviction_order(db, live_nbytes + written_nbytes - low)
    return RoomForecast(
        live_nbytes=live_nbytes,
        written_nbytes=written_nbytes,
        max_live_nbytes=high,
        holds=has_room or written_nbytes <= (high or 0) - _unremovable(live_nbytes, candidates),
        num_evicted_parts=len(candidates),
        evicted_nbytes=sum(candidate.nbytes for candidate in candidates),
        evicted_seconds=sum({candidate.address: candidate.seconds for candidate in candidates}.values()),
    )


def _unremovable(live_nbytes: int, candidates: Sequence[EvictionCandidate]) -> int:
    """Return what stays when all of them have gone: what is pinned, or needed."""
    return max(0, live_nbytes - sum(candidate.nbytes for candidate in candidates))


def _eviction_order(db: Database, nbytes: int) -> Sequence[EvictionCandidate]:
    config, catalog = db.evictor.limits.config, db.catalog
    if catalog is None:
        return []
    try:
        return catalog.rehearse(
            nbytes,
            at=time.time(),
            grace_seconds=config.grace_seconds,
            ttl_seconds=config.ttl_seconds,
        )
    except CatalogError as error:
        logger.warning("the catalog cannot be read: %s", error)
        return []
