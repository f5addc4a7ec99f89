"""Bundles, format 1: representations as one tar file, written and read as a stream.

    bundle.json                           format, fidelity, creation
    index-000001.jsonl                    which parts come next, their sizes and digests, labels, names of models
    <address, hex>/scores.safetensors     the parts, in the order of the index, each after those that it needs
    ...
    index-000002.jsonl
    ...
    end.json                              the number of parts, and one digest over all: without it, something is missing

There are only plain members, no extensions of tar. Digests are XXH3-128, as in the store: they find damage, but not
forgery. To know that a bundle is the one that was sent, compare a SHA-256 of the file.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import xxhash

from backprompt_db.codec.blob import decode_origin, header_nbytes
from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.errors import BlobFormat, FormatError
from backprompt_db.operations.bundles.index import (
    PARTS,
    End,
    Entry,
    Index,
    PartEntry,
    bounded,
    description_to_json,
    end_from_json,
    end_to_json,
    fidelity_from_json,
    index_from_json,
    index_to_json,
)
from backprompt_db.operations.bundles.ingest import CheckedPart, Note, admit, check_place
from backprompt_db.operations.bundles.tar import (
    MAX_MEMBER_NBYTES,
    ArchiveReader,
    Member,
    malformed,
    write_end,
    write_member,
)
from backprompt_db.prompt.ids import Address
from backprompt_db.store.contract import Key
from backprompt_db.store.records import xxh3_128

if TYPE_CHECKING:
    from backprompt_db.catalog.records import ModelRecord, TokenizerRecord

_FIRST = "bundle.json"
_LAST = "end.json"
_MAX_JSON_NBYTES = 1 << 16
_MAX_INDEX_NBYTES = 1 << 23


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Parts to be written together, those of one representation side by side."""

    parts: Sequence[CheckedPart]
    models: Sequence[ModelRecord] = ()
    tokenizers: Sequence[TokenizerRecord] = ()


class _Sum:
    """The digest over all members of a bundle so far: over the name of each, a zero byte, and its own digest."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def add(self, name: str, digest: bytes) -> None:
        self._state.update(name.encode() + b"\0" + digest)

    def digest(self) -> bytes:
        return self._state.digest()


class BundleWriter:
    """Writes a bundle to a stream, which only needs `write`. Readers refuse it unless `finish` was called."""

    def __init__(self, stream: BinaryIO, *, fidelity: Fidelity) -> None:
        self.num_parts = 0
        self._stream = stream
        self._made_at = time.time()
        self._num_groups = 0
        self._sum = _Sum()
        self._write(_FIRST, description_to_json(fidelity, made_at=self._made_at))

    def add(self, group: Group) -> None:
        """Write the index of parts, then the parts. No representation may come in two groups."""
        digests = [xxh3_128(part.blob) for part in group.parts]
        self._num_groups += 1
        index = Index(_entries(group.parts, digests), group.models, group.tokenizers)
        self._write(_index_name(self._num_groups), index_to_json(index))
        for part, digest in zip(group.parts, digests, strict=True):
            self._write(_part_name(part.key), part.blob, digest)
        self.num_parts += len(group.parts)

    def finish(self) -> None:
        """Write the end."""
        self._write(_LAST, end_to_json(End(self.num_parts, self._sum.digest().hex())))
        write_end(self._stream)

    def _write(self, name: str, content: bytes | memoryview, digest: bytes | None = None) -> None:
        write_member(self._stream, name, [content], made_at=self._made_at)
        self._sum.add(name, digest or xxh3_128(content))


def read_bundle(stream: BinaryIO, *, fidelity: Fidelity) -> Iterator[Index | CheckedPart]:
    """Yield what a bundle holds as it is read: each index, then its parts.

    An index, one part and all addresses so far are in memory.

    A part is yielded after every possible check. Raises `FormatError` at the first thing that is wrong, also for a
    bundle of another fidelity, and for one whose end is missing.
    """
    reading = _Reading(ArchiveReader(stream), fidelity)
    reading.begin()
    while (index := reading.next_index()) is not None:
        yield index
        for entry in index.entries:
            for part in entry.parts:
                yield reading.part(entry, part)


class _Reading:
    """What has to be remembered from one member of a bundle to the next."""

    def __init__(self, archive: ArchiveReader, fidelity: Fidelity) -> None:
        self._archive = archive
        self._fidelity = fidelity
        self._sum = _Sum()
        self._num_groups = 0
        self._num_parts = 0
        self._seen = set[str]()

    def begin(self) -> None:
        member = self._archive.next()
        if member.name != _FIRST or member.nbytes > _MAX_JSON_NBYTES:
            raise malformed(f"it does not begin with {_FIRST}")
        found = fidelity_from_json(self._content(member))
        if found is not self._fidelity:
            raise FormatError(
                f"the bundle keeps keys and values {found}, the database {self._fidelity}",
                hint=f"Import it into a database that was made with fidelity={found.value!r}, or export it from such.",
            )

    def next_index(self) -> Index | None:
        """Return the next index, None at the end of the bundle."""
        member = self._archive.next(max_nbytes=_MAX_INDEX_NBYTES)
        if member.name == _LAST:
            self._end(member)
            return None
        self._num_groups += 1
        _require(member, _index_name(self._num_groups))
        index = index_from_json(self._content(member))
        for entry in index.entries:
            if entry.address in self._seen:
                raise malformed(f"{entry.address} comes twice")
            self._seen.add(entry.address)
        return index

    def part(self, entry: Entry, expected: PartEntry) -> CheckedPart:
        """Read a part; its header is checked before the rest is read."""
        key = Key(Address(bytes.fromhex(entry.address)), PARTS[expected.part])
        member = self._archive.next(max_nbytes=MAX_MEMBER_NBYTES)
        _require(member, _part_name(key), nbytes=expected.nbytes)
        blob = self._blob(member, key)
        digest = xxh3_128(memoryview(blob))
        if digest.hex() != expected.xxh3_128:
            raise malformed(f"the bytes of {member.name} do not match their digest")
        self._sum.add(member.name, digest)
        self._num_parts += 1
        note = Note(entry.label, entry.is_pinned) if expected is entry.parts[0] else Note()
        with _refusing_parts():
            return admit(key, memoryview(blob), fidelity=self._fidelity, note=note)

    def _blob(self, member: Member, key: Key) -> bytearray:
        blob = self._archive.read(min(8, member.nbytes))
        with _refusing_parts():
            self._archive.read(header_nbytes(bytes(blob)) - len(blob), into=blob)
            check_place(key, *decode_origin(memoryview(blob)))
        return self._archive.read(member.nbytes - len(blob), into=blob)

    def _end(self, member: Member) -> None:
        expected = End(self._num_parts, self._sum.digest().hex())
        if end_from_json(self._content(member)) != expected:
            raise malformed("its end does not fit what came before")
        self._archive.finish()

    def _content(self, member: Member) -> bytes:
        content = bytes(self._archive.read(member.nbytes))
        self._sum.add(member.name, xxh3_128(content))
        return content


@contextlib.contextmanager
def _refusing_parts() -> Iterator[None]:
    """Refuse the bundle for a part that, in a database, would only be computed again."""
    try:
        yield
    except BlobFormat as error:
        raise malformed(error.message) from None


def _require(member: Member, name: str, *, nbytes: int | None = None) -> None:
    if member.name != name or nbytes not in (None, member.nbytes):
        raise malformed(f"{name} should come, not {member.name!r:.200} of {member.nbytes:,} bytes")


def _entries(parts: Sequence[CheckedPart], digests: Sequence[bytes]) -> list[Entry]:
    """Return an entry for each representation, with the note of the first of its parts."""
    entries: dict[Address, Entry] = {}
    for part, digest in zip(parts, digests, strict=True):
        new = Entry(part.key.address.hex(), [], bounded(part.note.label), part.note.is_pinned)
        come = PartEntry(part.key.part.name.lower(), part.blob.nbytes, digest.hex())
        entries.setdefault(part.key.address, new).parts.append(come)
    return list(entries.values())


def _index_name(number: int) -> str:
    return f"index-{number:06}.jsonl"


def _part_name(key: Key) -> str:
    return f"{key.address.hex()}/{key.part.name.lower()}.safetensors"
