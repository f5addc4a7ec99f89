"""Running many texts in batches so that their parts are stored afterwards, and pinning texts."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from backprompt_db.compute.batch.requests import Request, Requests, batches, lacking, too_long, work_of
from backprompt_db.compute.batch.run_plan import MAX_LISTED, TooLong, Warmed
from backprompt_db.compute.plan import Bounds
from backprompt_db.database.database import writable_catalog
from backprompt_db.errors import StoreError, StoreReadOnly
from backprompt_db.prompt.representation import OWN_PARTS, Part
from backprompt_db.store.contract import Key

if TYPE_CHECKING:
    from backprompt_db.compute.engine import Engine
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.database.database import Database
    from backprompt_db.prompt.segments import Segment


_SECONDS_BETWEEN_FLUSHES = 10.0
"""A failed write ends the run after this time at most; waiting for each batch would cost more."""

_HOW_TO_GO_ON = "What was computed is stored: run the same again to go on."

_NUM_TRIES = 3
"""How often segments that were evicted before they could be pinned are computed again."""


class Warmer:
    """Computes what requests lack, batch by batch, and counts what it did."""

    def __init__(self, engine: Engine, source: ModelSource, db: Database) -> None:
        if db.readonly:
            raise StoreReadOnly("nothing can be kept in a database that is only read", hint="Open it for writing.")
        self._engine = engine
        self._source = source
        self._db = db
        self._began = self._flushed = time.monotonic()
        self._num_tokens_before = engine.num_computed_tokens
        self._num_passes = self._num_texts = self._num_stored_texts = self._num_too_long = 0
        self._too_long: list[TooLong] = []

    def run(self, requests: Requests, *, batch_size: int, progress: bool) -> Warmed:
        """Compute everything. What was computed is stored, even if this is interrupted or fails.

        Raises what `Database.flush` raises where something cannot be stored.
        """
        with _stored_afterwards(self._db), _bar(requests, is_shown=progress) as bar:
            for batch in batches(requests, batch_size):
                self._run_batch(batch)
                self._flush_at_times()
                bar.set_postfix_str(f"{self.result().tokens_per_second:,.0f} tok/s", refresh=False)
                bar.update(len(batch))
        return self.result()

    def result(self) -> Warmed:
        """Return what was done so far."""
        return Warmed(
            num_texts=self._num_texts,
            num_stored_texts=self._num_stored_texts,
            num_computed_tokens=self._engine.num_computed_tokens - self._num_tokens_before,
            num_passes=self._num_passes,
            seconds=time.monotonic() - self._began,
            num_too_long=self._num_too_long,
            too_long=tuple(self._too_long),
        )

    def _run_batch(self, batch: Sequence[Request]) -> None:
        addresses = self._engine.addresses()

        @cache
        def is_stored(segment: Segment, part: Part) -> bool:
            return self._db.has(addresses.key(segment, part))

        lack = lacking(batch, is_stored)
        fitting = self._fitting(lack) if lack else []
        work = work_of(fitting, is_stored)
        if work.wanted:
            num_calls = self._num_calls()
            self._engine.represent(work.wanted, keep=work.keep, addresses=addresses, donors=work.donors)
            self._num_passes += self._num_calls() - num_calls
        self._num_texts += len(batch)
        self._num_stored_texts += len(batch) - len(lack)

    def _fitting(self, batch: Sequence[Request]) -> list[Request]:
        """Return the requests that the model can run, and list the others as too long. Loads the model."""
        runner = self._engine.prove()
        bounds = Bounds(runner.max_positions, runner.max_columns)
        segments = dict.fromkeys(segment for request in batch for segment in request.segments)
        num_tokens = {segment: len(ids) for segment, ids in self._source.tokenizer.encode(segments).items()}
        problems = {
            request: too_long(request, num_tokens, bounds, is_deterministic=self._engine.is_deterministic)
            for request in batch
        }
        found = [problem for problem in problems.values() if problem is not None]
        self._num_too_long += len(found)
        self._too_long += found[: MAX_LISTED - len(self._too_long)]
        return [request for request in batch if problems[request] is None]

    def _num_calls(self) -> int:
        return self._source.runner.num_calls if self._source.is_loaded else 0

    def _flush_at_times(self) -> None:
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._db.flush()
            self._flushed = time.monotonic()


def pin(engine: Engine, db: Database, segments: Sequence[Segment], *, label: str | None) -> None:
    """Compute the missing parts of segments, pin the segments, and label them if there is a label.

    Raises `StoreReadOnly` and `CatalogError` where nothing can be pinned, what `Database.flush` raises, and
    `StoreError` where parts are evicted faster than they can be pinned.
    """
    catalog = writable_catalog(db)
    addresses = engine.addresses()
    pinned = [addresses.address(segment) for segment in segments]
    for _ in range(_NUM_TRIES):
        engine.represent(dict.fromkeys(segments, frozenset(OWN_PARTS)), keep={}, addresses=addresses)
        db.flush()
        catalog.pin(pinned)
        if all(db.has(Key(address, part)) for address in pinned for part in OWN_PARTS):
            break
    else:
        raise StoreError("not all that was to be pinned could be kept", hint="Look at `backprompt-db stats`.")
    if label is not None:
        catalog.label(pinned, label)


def unpin(engine: Engine, db: Database, segments: Sequence[Segment]) -> None:
    """Let segments be evicted again. Raises `StoreReadOnly` and `CatalogError` where nothing can be written."""
    addresses = engine.addresses()
    writable_catalog(db).pin([addresses.address(segment) for segment in segments], is_pinned=False)


def _bar(requests: Requests, *, is_shown: bool) -> tqdm[Any]:
    """Return a progress bar, which appears after a second, in a terminal."""
    total = operator.length_hint(requests) or None
    return tqdm(total=total, unit="text", desc="warming", delay=1, disable=None if is_shown else True, leave=False)


@contextmanager
def _stored_afterwards(db: Database) -> Iterator[None]:
    """Wait at the end until everything is stored, also when the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(_HOW_TO_GO_ON)
        raise
    finally:
        db.flush()
