"""The store on disk: blobs in LMDB, chunked and digested."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import lmdb
import numpy as np

from backprompt_db.errors import StoreClosed, StoreError, StoreReadOnly
from backprompt_db.store.contract import Blob, Key
from backprompt_db.store.environment import Environment, create_files, release, shared_environment
from backprompt_db.store.records import CHUNK_NBYTES, blob_key, blob_nbytes, digest, read_head, record_key, records

logger = logging.getLogger(__name__)

_LAST_CHUNK = 2**32 - 1
_KEYS_PER_TRANSACTION = 1000


class LmdbStore:
    """A `Store` in a directory, shared by any number of threads and processes.

    Raises the `StoreError` that fits at construction: `StoreCorrupt` for files that are missing or truncated.
    """

    def __init__(self, directory: Path, *, readonly: bool = False) -> None:
        self.directory = directory
        self.readonly = readonly
        self.num_quarantined = 0
        self._closing = threading.Lock()
        self._environment: Environment | None = shared_environment(directory, readonly=readonly)

    @classmethod
    def create(cls, directory: Path) -> LmdbStore:
        """Make an empty store in `directory`, private to the user, and open it."""
        create_files(directory)
        return cls(directory)

    def get(self, key: Key) -> memoryview | None:
        """Return a verified, writable copy of a blob; None for a miss or a damaged blob, which is removed."""
        with self._open_environment().transaction() as transaction:
            value = transaction.get(record_key(key))
            if value is None:
                return None
            blob = _read(transaction, key, value)
        if blob is None:
            self._quarantine(key)
        return blob

    def has(self, key: Key) -> bool:
        """Whether a blob is stored under `key`; its bytes are not verified."""
        with self._open_environment().transaction() as transaction:
            return transaction.get(record_key(key)) is not None

    def put(self, blobs: Sequence[Blob]) -> list[Key]:
        """Store all of `blobs` in one synced transaction and return the keys that were new."""
        # Digests are computed before the transaction, which holds the lock of all writers.
        prepared = [(blob.key, list(records(blob.key, blob.data))) for blob in blobs]
        new = []
        with self._writable().transaction(write=True) as transaction:
            for key, (head, *chunks) in prepared:
                if transaction.put(*head, overwrite=False):
                    new.append(key)
                    for chunk in chunks:
                        transaction.put(*chunk)
        return new

    def delete(self, keys: Iterable[Key]) -> int:
        """Remove blobs in one transaction; return how many there were."""
        gone = list(keys)  # before the transaction: they may come from `keys()`
        with self._writable().transaction(write=True) as transaction:
            return sum(_delete(transaction, key) for key in gone)

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
        if not self._closing.acquire(blocking=False):  # never released: of several callers one closes
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
                if value is not None and _read(transaction, key, value) is None:
                    _delete(transaction, key)
        except StoreError as error:
            logger.warning("could not remove it: %s", error)


def _read(transaction: lmdb.Transaction[memoryview], key: Key, value: memoryview) -> memoryview | None:
    """Copy a blob out of the map, verifying each chunk while it is in the processor's cache; None when damaged."""
    head = read_head(record_key(key), value)
    if head is None:
        return None
    blob = np.empty(head.nbytes, dtype=np.uint8).data
    if not head.chunk_digests:
        blob[:] = head.inline
        return blob
    for index, expected in enumerate(head.chunk_digests):
        chunk = transaction.get(record_key(key, index + 1))
        target = blob[index * CHUNK_NBYTES : (index + 1) * CHUNK_NBYTES]
        if chunk is None or len(chunk) != len(target) or digest(chunk) != expected:
            return None
        target[:] = chunk
    return blob


def _delete(transaction: lmdb.Transaction[memoryview], key: Key) -> bool:
    """Remove the head and every chunk of a blob, however damaged; whether there was a head."""
    had_head = transaction.delete(record_key(key))
    cursor = transaction.cursor()
    while cursor.set_range(record_key(key)) and blob_key(bytes(cursor.key())) == key:
        cursor.delete()
    return had_head


def _heads(transaction: lmdb.Transaction[memoryview], position: bytes) -> Iterator[tuple[Key, int]]:
    """Yield key and size of each blob whose head lies after `position`, skipping chunks."""
    cursor = transaction.cursor()
    found = cursor.set_range(position) if position else cursor.first()
    while found:
        key = blob_key(bytes(cursor.key()))
        if key is None:
            found = cursor.next()
            continue
        nbytes = blob_nbytes(cursor.value()) if bytes(cursor.key()) == record_key(key) else None
        if nbytes is not None:
            yield key, nbytes
        found = cursor.set_range(record_key(key, _LAST_CHUNK))
