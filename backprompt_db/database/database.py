"""The database: parts of representations by address, over a store, a catalog, a writer and a memory cache."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from backprompt_db.codec.blob import decode
from backprompt_db.codec.fidelity import Fidelity, restore_into
from backprompt_db.codec.kv_reader import KVReader, KVSpan
from backprompt_db.database.catalogs import Catalogs, ModelMetadata
from backprompt_db.database.config import Limits
from backprompt_db.database.counters import Counters, Tally
from backprompt_db.database.eviction import Evictor
from backprompt_db.database.memory_cache import FreeShare, MemoryCache, default_budget_nbytes
from backprompt_db.database.single_flight import SingleFlight
from backprompt_db.database.statistics import gathered
from backprompt_db.database.writer import NewPart, Writer, at_end_of_forked_process
from backprompt_db.errors import (
    BackpromptError,
    BlobFormat,
    CatalogError,
    FormatError,
    StoreClosed,
    StoreError,
    StoreReadOnly,
)
from backprompt_db.prompt.explanation import Place
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.representation import Arrays, Part
from backprompt_db.store.contract import Key, Store
from backprompt_db.store.layered import own_store
from backprompt_db.store.records import Digest, xxh3_128
from backprompt_db.system.platform import register_at_fork
from backprompt_db.views.console import html_text, literal
from backprompt_db.views.formatting import visible

if TYPE_CHECKING:
    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.database.statistics import Stats


logger = logging.getLogger(__name__)

_Taken = TypeVar("_Taken")

MEMORY = ":memory:"
"""The location of a database that is kept in memory and leaves nothing behind."""

_PATIENCE_SECONDS = 10.0
"""How long those who only look wait for what is being written."""

_OVERHEAD_NBYTES = 2048
"""What a part costs in memory beside its bytes, roughly."""


class Database:
    """Representations by address. Use `open_database` to get one; it is a context manager.

    A failing store never fails a computation: failures count as misses, are logged once and shown in `counters`. With
    `strict`, they raise.

    One that nobody holds any more is closed soon, without having to be told to: what was put is written first.
    """

    def __init__(
        self,
        store: Store,
        *,
        directory: Path | None,
        readonly: bool = False,
        namespace: str = "",
        strict: bool = False,
        fidelity: Fidelity = Fidelity.EXACT,
        memory_nbytes: int | None = None,
        single_flight: SingleFlight | None = None,
        seal: Digest = xxh3_128,
        base: Path | None = None,
    ) -> None:
        self.directory = directory
        self.single_flight = single_flight or SingleFlight(None)
        self.fidelity = fidelity
        self.memory = (
            MemoryCache(default_budget_nbytes(), share=FreeShare())
            if memory_nbytes is None
            else MemoryCache(memory_nbytes)
        )
        self.readonly = readonly
        self.namespace = namespace
        self.strict = strict
        self._layers = store
        self.store = own_store(store)
        """What is kept here; what is found may also lie in the database below."""
        self._resources = Resources(store, directory, readonly=readonly, fidelity=fidelity, base=base)
        self.catalogs = self._resources.catalogs
        self.model_metadata = ModelMetadata(self.catalogs, seal=seal)
        self.writer = self._resources.writer
        self.evictor = self._resources.evictor
        self.tally = self._resources.tally
        self._is_closed = False
        self._finalizer = weakref.finalize(self, self._resources.close_soon)
        self._finalizer.atexit = False  # then `_close_all` closes
        self._has_failed_to_read = False
        self._num_damaged = store.num_quarantined
        _open_databases.add(self)

    @property
    def catalog(self) -> Catalog | None:
        """The catalog; None for a database in memory, and where it cannot be used, which is logged. No hit needs it."""
        return self.catalogs.own

    @property
    def counters(self) -> Counters:
        """What this handle did since it was opened."""
        return self.tally.counters

    def stats(self, *, namespace: str | None = None) -> Stats:
        """Return what the database holds and what it saved, as `backprompt-db stats` shows it; printed, it is a table.

        With `namespace`, what one namespace holds. Waits a moment for what is still being written. Raises
        `CatalogError` for a database in memory.
        """
        self._check_open()
        if self.directory is None:
            raise CatalogError(
                "a database in memory has no statistics", hint="Open one in a directory; `counters` are there always."
            )
        self.wait_until_written()
        self._resources.record_uses()
        return gathered(self.directory, namespace=namespace)

    def fetch(self, wanted: Mapping[Address, Iterable[Part]]) -> dict[Key, Arrays]:
        """Return the wanted parts that are there. Arrays are not to be written to; a miss is absent."""
        found = {}
        for address, parts in wanted.items():
            arrays = {Key(address, part): self._read(Key(address, part), _as_it_is, self._decode) for part in parts}
            found.update({key: value for key, value in arrays.items() if value is not None})
            is_hit = None not in arrays.values()
            self.tally.add("num_hits" if is_hit else "num_misses")
            self._resources.uses[address] += is_hit
        return found

    def load(self, key: Key, span: KVSpan, dtype: str) -> bool:
        """Copy stored keys and values into place, in one pass; False for a miss, which leaves anything there.

        `dtype` is the safetensors name of the span's.
        """
        copy = partial(_restore, span=span)
        return self._read(key, copy, partial(self._fill, span=span, dtype=dtype)) is not None

    def touch(self, addresses: Iterable[Address]) -> None:
        """Count uses of representations that are in memory already, as `fetch` does."""
        self._resources.uses.update(addresses)

    def has(self, key: Key) -> bool:
        """Whether a part is stored or queued."""
        self._check_open()
        try:
            return self.writer.get(key) is not None or self._layers.has(key)
        except StoreError as error:
            self._read_failed(error)
            return False

    def look(self, key: Key) -> tuple[Place, int] | None:
        """Return where a part would be found and its size, without reading or counting it; None for a miss."""
        self._check_open()
        queued = self.writer.get(key)
        if queued is not None:
            return Place.MEMORY, sum(array.nbytes for array in queued.values())
        held_nbytes = self.memory.size(key)
        if held_nbytes is not None:
            return Place.MEMORY, held_nbytes - _OVERHEAD_NBYTES
        try:
            own_nbytes, nbytes = self.store.size(key), self._layers.size(key)
        except StoreError as error:
            self._read_failed(error)
            return None
        here = Place.MEMORY if self.directory is None else Place.DISK
        return None if nbytes is None else (Place.BASE if own_nbytes is None else here, nbytes)

    def num_tokens(self, address: Address) -> int | None:
        """Return how many tokens a representation has, without counting a use; None where its scores are not there."""
        self._check_open()
        key = Key(address, Part.SCORES)
        scores: Arrays | None = self.writer.get(key) or self.memory.get(key)
        try:
            scores = scores or self._decode(key)
        except (FormatError, StoreError):  # whoever needs them will say what is wrong with them
            return None
        return None if scores is None else scores["input_ids"].shape[0]

    def put(self, parts: Sequence[NewPart]) -> None:
        """Queue parts for writing; a database opened read-only drops them. Raises `StoreClosed` after `close`."""
        self._check_open()
        origins = {part.key.address: part.origin for part in parts}
        self.tally.add("num_computed_tokens", sum(origin.num_tokens for origin in origins.values()))
        self.tally.add("computed_seconds", sum(origin.compute_seconds for origin in origins.values()))
        if not self.readonly:
            self.writer.put(parts)

    def put_later(self, part: NewPart) -> None:
        """Queue a part of something that was put before; it is dropped where nothing can be stored any more."""
        if not (self.readonly or self._is_closed):
            self.writer.put([part])
            self.memory.discard(part.key)  # which may hold what it was before it has grown

    def when_written(self, then: Callable[[], None]) -> None:
        """Call `then`, which must not raise, as soon as all that was put by now is stored, or given up."""
        self.writer.when_done(then)

    def wait_until_written(self) -> None:
        """Wait for what is queued for writing, but not for long."""
        is_written = threading.Event()
        self.when_written(is_written.set)
        is_written.wait(_PATIENCE_SECONDS)

    def discard(self, key: Key) -> None:
        """Remove a stored part that turned out to be unusable, and count it as quarantined."""
        self.tally.add("num_quarantined")
        self.memory.discard(key)
        logger.warning("quarantined the %s part of %s", key.part.name.lower(), key.address.hex())
        self._report_quarantine(key, "cannot be used")
        if self.readonly:
            return
        try:
            self._layers.delete([key])
        except StoreError as error:
            self._read_failed(error)

    def report_if_damaged(self, key: Key) -> None:
        """Put a part on the list of what went wrong, if the store has just found it damaged, and counted it."""
        if self._layers.num_quarantined > self._num_damaged:
            self._num_damaged = self._layers.num_quarantined
            self._report_quarantine(key, "does not match its digest")

    def flush(self) -> None:
        """Wait until everything that was put is on disk. Raises the first `StoreError` since the last flush."""
        self._check_open()
        try:
            self.writer.flush()
        finally:
            self._resources.record_uses()

    def close(self) -> None:
        """Write what is queued and release the files. Closing twice is allowed.

        With `strict`, raises the first failure to write since the last flush, after everything was released.
        """
        if self._finalizer.detach() is None:  # which succeeds once: of several callers one closes
            return
        self._is_closed = True
        try:
            self._resources.close()
        finally:
            self.memory.close()
        if self.strict:
            self.writer.flush()

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __dir__(self) -> list[str]:
        """What is offered at a prompt: what users need, and not what the library itself uses."""
        return ["close", "counters", "flush", "stats"]

    def _repr_html_(self) -> str:
        """What a notebook shows: the numbers about it, where there are any."""
        try:
            return self.stats()._repr_html_()
        except BackpromptError:
            return html_text(literal(repr(self)))

    def __repr__(self) -> str:
        return f"<Database {visible(str(self.directory or MEMORY))}{' (read-only)' if self.readonly else ''}>"

    def _read(self, key: Key, take: Callable[[Arrays], _Taken], read: Callable[[Key], _Taken | None]) -> _Taken | None:
        """Look for a part where it may be, one place after the other: the queue, memory, the store.

        Arrays in memory are what `take` makes of them, those in the store what `read` does. What fails is a miss.
        """
        self._check_open()
        known: Arrays | None = self.writer.get(key) or self.memory.get(key)
        taken = None
        try:
            taken = read(key) if known is None else take(known)
        except BlobFormat:
            self.discard(key)
        except FormatError:  # newer than this version
            pass
        except StoreError as error:
            self._read_failed(error)
        where = "num_disk_hits" if known is None else "num_memory_hits"
        self.tally.add("num_part_misses" if taken is None else where)
        return taken

    def _decode(self, key: Key) -> Arrays | None:
        """Return a part out of the store, and keep it in memory."""
        blob = self._layers.get(key)
        if blob is None:
            self.report_if_damaged(key)
            return None
        arrays = decode(key.part, blob)
        if key.part is not Part.KV:  # of which memory holds whole prefixes, ready for use
            self.memory.put(key, arrays, nbytes=blob.nbytes + _OVERHEAD_NBYTES)
        return arrays

    def _fill(self, key: Key, span: KVSpan, dtype: str) -> KVSpan | None:
        """Copy keys and values out of the map of the store's file into place; None where there are none."""
        if self.fidelity is Fidelity.EXACT:
            reader = KVReader(span, dtype)
            if self._layers.scan(key, reader.take):
                reader.finish()
                return span
        elif (blob := self._layers.get(key)) is not None:
            return _restore(decode(key.part, blob), span)
        self.report_if_damaged(key)
        return None

    def _read_failed(self, error: StoreError) -> None:
        if self.strict or isinstance(error, StoreClosed):
            raise error
        if not self._has_failed_to_read:
            logger.warning("the store cannot be read, computing instead: %s", error)
        self._has_failed_to_read = True
        self.tally.add("num_read_failures")
        self.tally.report("read-failure", str(error))

    def _report_quarantine(self, key: Key, why: str) -> None:
        self.tally.report("quarantine", f"the {key.part.name.lower()} part {why}", address=key.address)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosed(f"{self!r} was closed", hint="Open it again with backprompt_db.open(...).")


def _as_it_is(arrays: Arrays) -> Arrays:
    return arrays


def _restore(arrays: Arrays, span: KVSpan) -> KVSpan:
    restore_into(arrays, span.keys, span.values)
    return span


class Resources:
    """What a database has open. It knows no `Database`, so it keeps none alive, and lives on until all is written."""

    def __init__(
        self, store: Store, directory: Path | None, *, readonly: bool, fidelity: Fidelity, base: Path | None
    ) -> None:
        self.uses: Counter[Address] = Counter()
        """How often each representation was used since the uses were last recorded."""
        self.tally = Tally(store)
        limits = Limits(directory)
        self.catalogs = Catalogs(directory, limits=limits, readonly=readonly, base=base)
        own = own_store(store)  # what lies below a layered one is not this database's to remove
        self.evictor = Evictor(own, self.catalogs, directory=directory, limits=limits, tally=self.tally)
        self.writer = Writer(store, self.catalogs, self.evictor, fidelity=fidelity, tally=self.tally)
        self._store = store

    def record_uses(self) -> None:
        """Enter the uses, and what was counted, in the catalog, best effort."""
        uses, self.uses = +self.uses, Counter()
        if self.catalogs.readonly or not (uses or self.tally.has_news()) or self.catalogs.own is None:
            return
        self.tally.record(self.catalogs.own)
        try:
            self.catalogs.own.touch(uses, at=time.time())
        except CatalogError as error:
            logger.warning("the catalog missed %d uses: %s", len(uses), error)

    def close(self) -> None:
        """Write what is queued, then close everything."""
        try:
            self.writer.close()
            self.record_uses()
        finally:
            self.catalogs.close()
            self._store.close()

    def close_soon(self) -> None:
        """Do what `close` does on a thread of its own, for which the interpreter's exit waits.

        For finalisers: they run at any moment in any thread, which may hold the very lock that closing waits for.
        """
        try:
            threading.Thread(target=self.close, name="backprompt-db closing").start()
        except RuntimeError:  # no more threads: the writer goes on until the interpreter's exit
            logger.warning("a database that nobody holds any more could not be closed yet: no thread can be started")


def writable_catalog(db: Database) -> Catalog:
    """Return the catalog to set something in. Raises `StoreReadOnly` or `CatalogError` where there is none."""
    if db.readonly:
        raise StoreReadOnly(f"{db.directory} may only be read", hint="Do it as a user who may write to it.")
    if db.directory is None:
        raise CatalogError("a database in memory has no catalog", hint="Open one in a directory.")
    if db.catalog is None:
        raise CatalogError("this needs the catalog, which cannot be used", hint="Run `backprompt-db reindex`.")
    return db.catalog


_open_databases: weakref.WeakSet[Database] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """At interpreter exit, wait for every queue: what was computed is not lost."""
    for database in list(_open_databases):
        try:
            database.close()
        except Exception:
            logger.exception("%r could not be closed", database)


def _after_fork_in_child() -> None:
    # What the parent used is the parent's to record.
    for database in list(_open_databases):
        database._resources.uses = Counter()
        database.memory.after_fork_in_child()
    at_end_of_forked_process(_close_all)


register_at_fork(after_in_child=_after_fork_in_child)
