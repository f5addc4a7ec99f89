"""Whether the records of an LMDB store fit together, without reading the blobs.

The check reads the numbers in each head, and the name and the length of every other record. Digests are verified when
the blobs are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from backprompt_db.store.contract import Key
from backprompt_db.store.environment import release, shared_environment
from backprompt_db.store.files import DATA
from backprompt_db.store.lmdb_pages import check_pages
from backprompt_db.store.records import CHUNK_NBYTES, DIGEST_NBYTES, blob_key, blob_nbytes, record_key
from backprompt_db.store.transaction import CheckedTransaction

_RECORDS_PER_TRANSACTION = 10_000
_NUM_CHUNKS_NBYTES = 4
_FIELDS_NBYTES = 12


class Flaw(NamedTuple):
    """A record, or a blob, that does not fit with the others."""

    key: Key | None
    """The blob's key; None for a record that belongs to no blob."""
    has_head: bool
    """Whether the blob can be found. Without a head, nobody finds its chunks, which only take up room."""
    detail: str


class _Record(NamedTuple):
    name: bytes
    value: memoryview

    @property
    def blob(self) -> Key | bytes:
        return blob_key(self.name) or self.name


def flaws(directory: Path) -> Iterator[Flaw]:
    """Yield what is wrong with the records of the store in `directory`, in short transactions, blob by blob.

    Raises the `StoreError` that fits when the file itself cannot be walked through.
    """
    check_pages(directory / DATA, however_many=True)
    environment = shared_environment(directory, readonly=True)
    position: bytes | None = b""
    try:
        while position is not None:
            with environment.transaction() as transaction:
                found, position = _some_flaws(transaction, position)
            yield from found
    finally:
        release(environment)


def _some_flaws(transaction: CheckedTransaction, after: bytes) -> tuple[list[Flaw], bytes | None]:
    """Return the flaws of the next blobs, and where to go on; None at the end."""
    found = list[Flaw]()
    num_records = 0
    for blob, group in itertools.groupby(_records(transaction, after), key=lambda record: record.blob):
        records = list(group)
        num_records += len(records)
        if isinstance(blob, bytes):
            found.append(Flaw(None, has_head=False, detail=f"the record {blob[:64].hex()} is not one of ours"))
        else:
            found.extend(_flaws(blob, records))
        if num_records >= _RECORDS_PER_TRANSACTION:
            return found, records[-1].name
    return found, None


def _records(transaction: CheckedTransaction, after: bytes) -> Iterator[_Record]:
    for name in transaction.names(after):
        value = transaction.get(name)
        if value is not None:
            yield _Record(name, value)


def _flaws(blob: Key, records: list[_Record]) -> Iterator[Flaw]:
    head, *chunks = records
    if head.name != record_key(blob):
        yield Flaw(blob, has_head=False, detail=f"{len(records)} chunks without a head")
        return
    wrong = _wrong_head(head.value) or _wrong_chunks(blob, blob_nbytes(head.value) or 0, chunks)
    if wrong is not None:
        yield Flaw(blob, has_head=True, detail=wrong)


def _wrong_head(value: memoryview) -> str | None:
    nbytes = blob_nbytes(value)
    if nbytes is None:
        return f"its head has only {len(value)} bytes"
    num_chunks = int.from_bytes(value[:_NUM_CHUNKS_NBYTES])
    if num_chunks != _num_chunks(nbytes):
        return f"its head counts {num_chunks} chunks for a blob of {nbytes} bytes"
    content_nbytes = DIGEST_NBYTES * num_chunks or nbytes
    if len(value) != _FIELDS_NBYTES + content_nbytes + DIGEST_NBYTES:
        return f"its head has {len(value)} bytes for a blob of {nbytes}"
    return None


def _num_chunks(nbytes: int) -> int:
    return -(-nbytes // CHUNK_NBYTES) if nbytes > CHUNK_NBYTES else 0


def _wrong_chunks(blob: Key, nbytes: int, chunks: Iterable[_Record]) -> str | None:
    found = {record.name: len(record.value) for record in chunks}
    for number in range(1, _num_chunks(nbytes) + 1):
        expected_nbytes = min(CHUNK_NBYTES, nbytes - (number - 1) * CHUNK_NBYTES)
        chunk_nbytes = found.pop(record_key(blob, number), None)
        if chunk_nbytes != expected_nbytes:
            return f"its chunk {number} has {chunk_nbytes or 'no'} bytes instead of {expected_nbytes}"
    return f"it has {len(found)} chunks that its head does not count" if found else None
