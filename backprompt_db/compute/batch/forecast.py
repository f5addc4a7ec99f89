"""What a run would compute, write and need: a dry run of its batches, without the model's weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
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
from backprompt_db.compute.batch.requests import IsStored, Request, Requests, Work, batches, lacking, too_long, work_of
from backprompt_db.compute.batch.run_plan import MAX_LISTED, NO_MEMORY, MemoryForecast, RoomForecast, RunPlan, TooLong
from backprompt_db.compute.call import Addresses
from backprompt_db.compute.misses import Records
from backprompt_db.compute.prefill import Passes
from backprompt_db.errors import CatalogError, StoreError
from backprompt_db.prompt.representation import OWN_PARTS, Part

if TYPE_CHECKING:
    from backprompt_db.catalog.records import EvictionCandidate, ModelRecord
    from backprompt_db.compute.engine import Engine
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.compute.inference.spec import ModelSpec
    from backprompt_db.compute.plan import Pack
    from backprompt_db.database.database import Database
    from backprompt_db.prompt.ids import ModelIds, SegmentId
    from backprompt_db.prompt.segments import Segment

logger = logging.getLogger(__name__)

_Lengths = Mapping["Segment", int]


def forecast(engine: Engine, source: ModelSource, db: Database, requests: Requests, *, batch_size: int) -> RunPlan:
    """Return what running requests in batches would take. Nothing is computed or written.

    Loads the tokenizer where something is missing, and the model's configuration; where all is stored, nothing.
    Memory grows by some 200 bytes for each distinct segment, whatever the length of its text.
    """
    db.wait_until_written()
    ids = source.ids
    record = db.model_metadata.recall(lambda catalog: catalog.model(ids.weights_id))
    dry_run = DryRun(db, source, ids, record, deterministic=engine.is_deterministic)
    for batch in batches(requests, batch_size):
        dry_run.add(batch)
    counts = dry_run.counts
    pace = seconds_per_unit(db.catalogs, ids, dry_run.spec.costs) if counts.num_passes else 0.0
    return RunPlan(
        model_name=record.name if record and record.name else source.name,
        dtype=record.dtype if record and record.dtype else dry_run.spec.dtype,
        weights_id=ids.weights_id,
        tokenizer_id=ids.tokenizer_id,
        namespace=db.namespace,
        num_texts=counts.num_texts,
        num_stored_texts=counts.num_stored_texts,
        num_completions=None if requests.completions is None else len(requests.completions),
        num_segments=counts.num_segments,
        num_missing_segments=counts.num_missing_segments,
        num_cached_tokens=counts.num_cached_tokens,
        num_missing_tokens=counts.num_missing_tokens,
        num_passes=counts.num_passes,
        seconds=None if pace is None else pace * counts.units,
        nbytes=counts.nbytes,
        overhead_nbytes=counts.overhead_nbytes,
        memory=dry_run.memory() if counts.num_missing_segments else NO_MEMORY,
        room=room_forecast(db, counts.pages_nbytes),
        num_too_long=counts.num_too_long,
        too_long=tuple(counts.too_long),
    )


@dataclass(slots=True)
class _Counts:
    """Sums over the batches so far; most fields are those of `RunPlan`."""

    num_texts: int = 0
    num_stored_texts: int = 0
    num_segments: int = 0
    num_missing_segments: int = 0
    num_cached_tokens: int = 0
    num_missing_tokens: int = 0
    num_passes: int = 0
    units: float = 0.0
    """The sum of `pass_units` over the passes."""
    nbytes: dict[Part, int] = field(default_factory=lambda: dict.fromkeys(OWN_PARTS, 0))
    overhead_nbytes: int = 0
    pages_nbytes: int = 0
    peak: Peak = field(default_factory=Peak)
    num_too_long: int = 0
    too_long: list[TooLong] = field(default_factory=list)


class DryRun:
    """A dry run of batches, one after the other, each as if those before it had been run."""

    def __init__(
        self, db: Database, source: ModelSource, ids: ModelIds, record: ModelRecord | None, *, deterministic: bool
    ) -> None:
        self.counts = _Counts()
        self._db = db
        self._source = source
        self._ids = ids
        self._addresses = Addresses(ids)
        self._record = record
        self._deterministic = deterministic
        self._seen: set[SegmentId] = set()
        self._written: dict[SegmentId, frozenset[Part]] = {}
        """Parts that the batches so far would have stored."""

    @cached_property
    def spec(self) -> ModelSpec:
        """What follows from the model's shape, which is not known without transformers."""
        return self._source.spec(self._record)

    @cached_property
    def _sizes(self) -> Sizes:
        return Sizes(self.spec, self._db.fidelity)

    def memory(self) -> MemoryForecast:
        """Return what the batches so far need at their peak."""
        return memory_forecast(
            self.spec,
            self.counts.peak,
            num_missing_tokens=self.counts.num_missing_tokens,
            written_nbytes=sum(self.counts.nbytes.values()) + self.counts.overhead_nbytes,
            budget_nbytes=self._db.memory.budget_nbytes,
        )

    def add(self, batch: Sequence[Request]) -> None:
        """Count what a run would do for one batch."""
        is_stored = cache(self._is_stored)
        lack = lacking(batch, is_stored)
        self.counts.num_texts += len(batch)
        self.counts.num_stored_texts += len(batch) - len(lack)
        segments = dict.fromkeys(segment for request in batch for segment in request.segments)
        if lack:
            self._add_work(batch, lack, self._source.tokenizer.encode(segments), is_stored)
        else:
            self._count_segments(segments, {}, self._recorded_lengths(list(segments)), is_stored)

    def _recorded_lengths(self, segments: Sequence[Segment]) -> _Lengths:
        """Return how many tokens segments have, by the catalog; the tokenizer is loaded for what it does not list."""
        records = Records(self._db, self._ids, segments)
        recorded = {segment: row.num_tokens for segment in segments if (row := records.row(segment)) is not None}
        unknown = [segment for segment in segments if segment not in recorded]
        encoded = self._source.tokenizer.encode(unknown) if unknown else {}
        return recorded | {segment: len(ids) for segment, ids in encoded.items()}

    def _add_work(
        self,
        batch: Sequence[Request],
        lack: Sequence[Request],
        input_ids: Mapping[Segment, Sequence[int]],
        is_stored: IsStored,
    ) -> None:
        """Count a batch in which some requests lack parts."""
        lengths = {segment: len(ids) for segment, ids in input_ids.items()}
        problems = {request: self._too_long(request, lengths) for request in lack}
        work = work_of([request for request in lack if problems[request] is None], is_stored)
        missing = plan.missing_parts(work.wanted, is_stored=is_stored)
        self._add_too_long([problem for problem in problems.values() if problem is not None])
        taken = [request for request in batch if problems.get(request) is None]
        self._count_segments(
            (segment for request in taken for segment in request.segments), missing, lengths, is_stored
        )
        passes = Passes(
            self._packs(missing, lengths), input_ids, {}, work.wanted, missing,
            self._kept(missing, work, is_stored), self._deterministic,
        )  # fmt: skip
        self._add_passes(passes, lengths)

    def _is_stored(self, segment: Segment, part: Part) -> bool:
        written = self._written.get(segment.id, frozenset())
        return part in written or self._db.has(self._addresses.key(segment, part))

    def _too_long(self, request: Request, lengths: _Lengths) -> TooLong | None:
        return too_long(request, lengths, self.spec.bounds, is_deterministic=self._deterministic)

    def _packs(self, missing: Mapping[Segment, object], lengths: _Lengths) -> list[Pack]:
        """Divide the missing segments into packs as the engine does."""
        return plan.packs(
            list(missing),
            lengths,
            costs=self.spec.costs,
            max_segments=1 if self._deterministic or not self.spec.takes_packs else None,
            max_columns=self.spec.bounds.max_columns,
        )

    def _kept(self, missing: Iterable[Segment], work: Work, is_stored: IsStored) -> dict[Segment, frozenset[Part]]:
        """Return the parts of each segment that would be written: those to keep that are not stored."""
        return {
            segment: frozenset(part for part in work.keep.get(segment, OWN_PARTS) if not is_stored(segment, part))
            for segment in missing
        }

    def _add_too_long(self, problems: Sequence[TooLong]) -> None:
        self.counts.num_too_long += len(problems)
        self.counts.too_long += problems[: MAX_LISTED - len(self.counts.too_long)]

    def _count_segments(
        self, segments: Iterable[Segment], missing: Mapping[Segment, object], lengths: _Lengths, is_stored: IsStored
    ) -> None:
        """Count the segments that no earlier batch had."""
        new = dict.fromkeys(segment for segment in segments if segment.id not in self._seen)
        self._seen.update(segment.id for segment in new)
        cached = (each for each in new if each not in missing and any(is_stored(each, part) for part in OWN_PARTS))
        self.counts.num_segments += len(new)
        self.counts.num_cached_tokens += sum(lengths[segment] for segment in cached)

    def _add_passes(self, passes: Passes, lengths: _Lengths) -> None:
        for pack in passes.packs:
            self._add_pass(pack, passes, lengths)
        for segment in passes.missing:
            self._add_written(segment, passes.keep[segment], lengths[segment])
        passed_on = (segment for segment in passes.missing if passes.is_used((segment, Part.KV)))
        self.counts.peak.num_passed_on = max(
            self.counts.peak.num_passed_on, sum(lengths[segment] for segment in passed_on)
        )
        self.counts.num_missing_segments += len(passes.missing)

    def _add_pass(self, pack: Pack, passes: Passes, lengths: _Lengths) -> None:
        produce = {segment: passes.produced(segment) for segment in pack.segments}
        num_fed = sum(plan.fed_lengths(pack, lengths, produce).values())
        num_context = sum(lengths[segment] for segment in pack.context)
        if num_fed:
            self.counts.num_passes += 1
            self.counts.units += pass_units(self.spec.costs, num_fed, num_context)
        self.counts.num_missing_tokens += passes.num_tokens(pack)
        self.counts.peak.add(num_fed, num_context)

    def _add_written(self, segment: Segment, parts: frozenset[Part], num_tokens: int) -> None:
        if self._db.readonly:
            return
        self._written[segment.id] = parts | self._written.get(segment.id, frozenset())
        for part in parts:
            nbytes, header_nbytes = self._sizes.arrays(part, num_tokens), header_size(part, segment)
            self.counts.nbytes[part] += nbytes
            self.counts.overhead_nbytes += header_nbytes
            self.counts.pages_nbytes += pages_size(nbytes + header_nbytes)


def room_forecast(db: Database, written_nbytes: int) -> RoomForecast | None:
    """Return whether `written_nbytes` more fit; None for a database that writes nothing to disk, or cannot be read."""
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
    """Return how many bytes stay when all candidates are evicted: what is pinned, or what others need."""
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
