"""The store on disk: blobs in LMDB, chunked and digested."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from backprompt_db.errors import StoreClosed, StoreError, StoreReadOnly
from backprompt_db.store.compaction import compact
from backprompt_db.store.contract import Blob, Key, Usage, beyond_limit, grows, replaces
from backprompt_db.store.environment import Environment, live_nbytes, release, shared_environment
from backprompt_db.store.files import PRIVATE, Modes, create_files
from backprompt_db.store.records import (
    CHUNK_NBYTES,
    Digest,
    blob_key,
    blob_nbytes,
    read_head,
    record_key,
    records,
    xxh3_128,
)
from backprompt_db.store.transaction import CheckedTransaction
from backprompt_db.system.failpoints import reach

logger = logging.getLogger(__name__)

_LAST_CHUNK = 2**32 - 1
_KEYS_PER_TRANSACTION = 1000


def _ignore(_: object) -> None:
    """Do nothing: for a scan that only verifies."""


class LmdbStore:
    """A `Store` in a directory, shared by any number of threads and processes.

    `digest` is the function that its chunks were digested with; a blob with another digest counts as damaged.

    Raises the `StoreError` that fits at construction: `StoreCorrupt` for files that are missing or truncated.
    """

    def __init__(self, directory: Path, *, readonly: bool = False, digest: Digest = xxh3_128) -> None:
        self.directory = directory
        self._digest = digest
        self.readonly = readonly
        self.num_quarantined = 0
        self._closing = threading.Lock()
        self._environment: Environment | None = shared_environment(directory, readonly=readonly)

    @classmethod
    def create(cls, directory: Path, *, digest: Digest = xxh3_128, modes: Modes = PRIVATE) -> LmdbStore:
        """Make an empty store in `directory` with the permissions `modes`, whatever the umask, and open it."""
        create_files(directory, modes)
        release(shared_environment(directory, readonly=False, is_new=True))
        return cls(directory, digest=digest)

    def get(self, key: Key) -> memoryview | None:
        """Return a verified, writable copy of a blob; None for a miss or a damaged blob, which is removed."""
        blob = _Copy()
        return blob.data if self.scan(key, blob.take, begin=blob.allocate) else None

    def scan(self, key: Key, take: Callable[[memoryview], None], *, begin: Callable[[int], None] = _ignore) -> bool:
        """Give a blob's verified bytes to `take`, chunk by chunk out of the map; False for a miss or a damaged blob.

        `begin` is told the number of bytes first. A damaged blob is removed.
        """
        with self._open_environment().transaction() as transaction:
            value = transaction.get(record_key(key))
            if value is None:
                return False
            is_whole = _scan(transaction, key, value, self._digest, begin, take)
        if not is_whole:
            self._quarantine(key)
        return is_whole

    def has(self, key: Key) -> bool:
        """Whether a blob is stored under `key`; its bytes are not verified."""
        with self._open_environment().transaction() as transaction:
            return transaction.get(record_key(key)) is not None

    def size(self, key: Key) -> int | None:
        """Return how many bytes a blob has, as its head claims; None where there is none."""
        with self._open_environment().transaction() as transaction:
            value = transaction.get(record_key(key))
            return None if value is None else blob_nbytes(value)

    def put(self, blobs: Sequence[Blob], *, max_nbytes: int | None = None) -> list[Key]:
        """Store all of `blobs` in one synced transaction and return the keys that were new, each once.

        Raises `StoreFull`, and stores nothing, when more than `max_nbytes` would be live after it.
        """
        # Digests are computed before the transaction, which holds the lock of all writers.
        prepared = [(blob, records(blob.key, blob.pieces, self._digest)) for blob in blobs]
        reach("store.put.before")
        with self._writable().transaction(write=True) as transaction:
            new = list(dict.fromkeys(blob.key for blob, entries in prepared if _put(transaction, blob, entries)))
            # Counted here, where no other writer is: several that looked before would go beyond the limit together.
            if max_nbytes is not None and new and live_nbytes(transaction.stat()) > max_nbytes:
                raise beyond_limit(max_nbytes)
            reach("store.put.before-commit")
        reach("store.put.after")
        return new

    def delete(self, keys: Iterable[Key]) -> int:
        """Remove blobs in one transaction; return how many there were."""
        gone = list(keys)  # before the transaction: they may come from `keys()`
        with self._writable().transaction(write=True) as transaction:
            return sum(_delete(transaction, key) for key in gone)

    def usage(self) -> Usage:
        """Return the bytes of the pages in use, and of the file."""
        return self._open_environment().usage()

    def compact(self) -> None:
        """Rewrite the file without its free pages, while others read; those who write wait for a few seconds.

        The space of deleted blobs is given back, and nothing of them is left in the file. Other processes go over to
        the new file when they use the store next; until then the old file takes up its space. Raises `StoreFull`
        without room for a second copy of what is stored.
        """
        compact(self._writable())

    def keys(self) -> Iterator[tuple[Key, int]]:
        """Yield every key and its blob's size, ascending, in short transactions."""
        position = b""
        while True:
            with self._open_environment().transaction() as transaction:
                batch = list(itertools.islice(_heads(transaction, position), _KEYS_PER_TRANSACTION))
            yield from batch
            if len(batch) < _KEYS_PER_TRANSACTION:
                return
            position = record_key(batch[-1][0], _LAST_CHUNK)

    def close(self) -> None:
        """Release the store's files; the last handle of the process closes them."""
        if not self._closing.acquire(blocking=False):  # never released: only the first caller closes
            return
        environment, self._environment = self._environment, None
        if environment is not None:
            release(environment)

    def _open_environment(self) -> Environment:
        if self._environment is None:
            raise StoreClosed(f"the store in {self.directory} was closed", hint="Open the database again.")
        return self._environment

    def _writable(self) -> Environment:
        environment = self._open_environment()
        if self.readonly:
            raise StoreReadOnly(
                f"{self.directory} was opened for reading", hint="Open the database as a user who may write to it."
            )
        return environment

    def _quarantine(self, key: Key) -> None:
        """Count a damaged blob and remove it, unless it was replaced meanwhile, so that a good one can take its key."""
        self.num_quarantined += 1
        logger.warning("quarantined a damaged %s part of %s", key.part.name.lower(), key.address.hex())
        if self.readonly:
            return
        try:
            with self._writable().transaction(write=True) as transaction:
                value = transaction.get(record_key(key))
                if value is not None and not _scan(transaction, key, value, self._digest, _ignore, _ignore):
                    _delete(transaction, key)
        except StoreError as error:
            logger.warning("could not remove it: %s", error)


class _Copy:
    """A writable copy of a blob, filled piece by piece."""

    def __init__(self) -> None:
        self.data = memoryview(b"")
        self._num_taken = 0

    def allocate(self, nbytes: int) -> None:
        self.data = np.empty(nbytes, dtype=np.uint8).data

    def take(self, piece: memoryview) -> None:
        end = self._num_taken + piece.nbytes
        self.data[self._num_taken : end] = piece
        self._num_taken = end


def _scan(
    transaction: CheckedTransaction,
    key: Key,
    value: memoryview,
    digest: Digest,
    begin: Callable[[int], None],
    take: Callable[[memoryview], None],
) -> bool:
    """Verify a blob chunk by chunk, and pass each on while it is in the processor's cache; False when damaged."""
    head = read_head(record_key(key), value, digest)
    if head is None:
        return False
    begin(head.nbytes)
    if not head.chunk_digests:
        take(head.inline)
        return True
    for number, expected in enumerate(head.chunk_digests, start=1):
        chunk = transaction.get(record_key(key, number))
        is_last = number == len(head.chunk_digests)
        size = head.nbytes - (number - 1) * CHUNK_NBYTES if is_last else CHUNK_NBYTES
        if chunk is None or len(chunk) != size or digest(chunk) != expected:
            return False
        take(chunk)
    return True


def _put(transaction: CheckedTransaction, blob: Blob, entries: Sequence[tuple[bytes, bytes | memoryview]]) -> bool:
    """Write the records of a blob; False where its key is taken, or something that it needs is not there."""
    if any(transaction.get(record_key(need)) is None for need in blob.needs):
        return False
    if _is_outgrown(transaction, blob):
        _delete(transaction, blob.key)
    head, *chunks = entries
    if not transaction.put(*head, overwrite=False):
        return False
    reach("store.put.inside")
    for chunk in chunks:
        transaction.put(*chunk)
    return True


def _is_outgrown(transaction: CheckedTransaction, blob: Blob) -> bool:
    """Whether what is stored under a blob's key has to make way for it."""
    value = transaction.get(record_key(blob.key)) if grows(blob.key) else None
    return value is not None and replaces(blob.key, blob.nbytes, blob_nbytes(value) or 0)


def _delete(transaction: CheckedTransaction, key: Key) -> bool:
    """Remove the head and every chunk of a blob, however damaged; whether there was a head."""
    chunks = list(itertools.takewhile(lambda name: blob_key(name) == key, transaction.names(record_key(key))))
    had_head = transaction.delete(record_key(key))
    for chunk in chunks:
        transaction.delete(chunk)
    reach("store.delete.inside")
    return had_head


def _heads(transaction: CheckedTransaction, position: bytes) -> Iterator[tuple[Key, int]]:
    """Yield key and size of each blob whose head lies after `position`."""
    for name in transaction.names(position):
        key = blob_key(name)
        if key is not None and name == record_key(key):
            head = transaction.get(name)
            nbytes = None if head is None else blob_nbytes(head)
            if nbytes is not None:
                yield key, nbytes
