"""Storing parts that come from elsewhere, each of them checked, as the writer stores what was computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import ModelRecord, TokenizerRecord
from backprompt_db.codec.blob import decode, decode_origin
from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.database.writer import CatalogMissed
from backprompt_db.errors import BlobFormat, CatalogError, StoreReadOnly
from backprompt_db.prompt.representation import Arrays, Origin, Part
from backprompt_db.store.contract import Blob, Key, lacks, needs_of

if TYPE_CHECKING:
    from backprompt_db.database.database import Database
    from backprompt_db.prompt.ids import Address, SegmentId


_BATCH_NBYTES = 64 << 20
_BATCH_NUM_PARTS = 1_000
"""A transaction takes parts up to these two, and at least one."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What became of the parts that came."""

    num_stored: int
    """Parts that the database did not have, or of which it had less."""
    nbytes_stored: int
    num_known: int
    """Parts that the database had already."""
    num_orphaned: int
    """Keys and values that were left out, because those of the text before them are not in the database."""
    catalog_problem: str | None
    """Why the catalog missed something. Reindexing adds the parts; importing again adds labels and pins."""
    num_unusable: int = 0
    """Parts of another database that cannot be used."""
    source_problem: str | None = None
    """Why labels, pins and hits of another database could not be read."""


class Intake:
    """Stores parts in batches, and enters them in the catalog, best effort. Raises `StoreReadOnly` where it may not.

    Parts must come after those that they need. What the database has already stays as it is.
    """

    def __init__(self, db: Database) -> None:
        if db.readonly:
            raise StoreReadOnly(f"{db.directory} may only be read", hint="Do it as a user who may write to it.")
        self._db = db
        self._batch: list[CheckedPart] = []
        self._batch_nbytes = 0
        self._max_batch_nbytes = db.writer.max_group_nbytes(_BATCH_NBYTES)
        self._notes: dict[Address, tuple[SegmentId, Note]] = {}
        self._num_stored = self._nbytes_stored = self._num_known = self._num_orphaned = 0
        self._catalog_problem: str | None = None

    def add(self, part: CheckedPart) -> None:
        """Store a part, now or with those that come next."""
        if lacks(self._db.store, part.key, part.blob.nbytes):
            self._batch.append(part)
            self._batch_nbytes += part.blob.nbytes
        else:
            self._num_known += 1
        self.remark(part.key.address, part.origin.segment_id, part.note)

    def remark(self, address: Address, segment_id: SegmentId, note: Note) -> None:
        """Enter a pin, hits, and a label unless there is one, as soon as the parts that came before are stored."""
        if not note.is_empty:
            _, known = self._notes.get(address, (segment_id, Note()))
            self._notes[address] = segment_id, known.joined(note)
        if self._batch_nbytes >= self._max_batch_nbytes or max(len(self._batch), len(self._notes)) >= _BATCH_NUM_PARTS:
            self._flush()

    def introduce(self, models: Sequence[ModelRecord], tokenizers: Sequence[TokenizerRecord]) -> None:
        """Enter names that the catalog lacks. The verdict about a model is never taken over from elsewhere."""
        if models or tokenizers:
            self._tell(lambda catalog: _introduce(catalog, models, tokenizers))

    def finish(self) -> Arrivals:
        """Store what is left, and return what became of everything."""
        self._flush()
        return Arrivals(
            self._num_stored, self._nbytes_stored, self._num_known, self._num_orphaned, self._catalog_problem
        )

    def _flush(self) -> None:
        batch, self._batch, self._batch_nbytes = self._batch, [], 0
        notes, self._notes = self._notes, {}
        if batch:
            self._count(batch, self._store(batch))
        if notes:
            self._tell(lambda catalog: _annotate(catalog, notes))

    def _store(self, batch: Sequence[CheckedPart]) -> set[Key]:
        blobs = [Blob(part.key, [part.blob], needs_of(part.key, part.origin)) for part in batch]
        if self._db.directory is not None and self._db.catalog is None:
            self._catalog_problem = "the catalog cannot be used"
        try:
            return self._db.writer.commit(blobs, {part.key: part.origin for part in batch})
        except CatalogMissed as missed:
            if missed.__cause__ is not None:
                self._catalog_problem = getattr(missed.__cause__, "message", str(missed.__cause__))
            return missed.new

    def _count(self, batch: Sequence[CheckedPart], new: set[Key]) -> None:
        for part in batch:
            if part.key in new:
                self._db.memory.discard(part.key)  # which may hold what it was before it has grown
                self._num_stored += 1
                self._nbytes_stored += part.blob.nbytes
            elif self._db.store.has(part.key):  # somebody else has stored it meanwhile
                self._num_known += 1
            else:
                self._num_orphaned += 1

    def _tell(self, tell: Callable[[Catalog], None]) -> None:
        """Tell the catalog something, best effort: hits do not need it."""
        if self._db.directory is None:
            return
        try:
            if self._db.catalog is None:
                self._catalog_problem = "the catalog cannot be used"
            else:
                tell(self._db.catalog)
        except CatalogError as error:
            self._catalog_problem = error.message


def _introduce(catalog: Catalog, models: Sequence[ModelRecord], tokenizers: Sequence[TokenizerRecord]) -> None:
    for model in models:
        known = catalog.model(model.weights_id)
        if model.name and (known is None or not known.name):
            catalog.save(_unchecked(model))
    named = {each.tokenizer_id for each in catalog.tokenizers() if each.name}
    for tokenizer in tokenizers:
        if tokenizer.name and tokenizer.tokenizer_id not in named:
            catalog.save(tokenizer)


def _unchecked(model: ModelRecord) -> ModelRecord:
    """Return a model without its verdict: it is checked anew where it is used."""
    return replace(
        model, verdict="unchecked", mask_form=None, max_error=None, reason=None, checked_with=None, signature=None
    )


def _annotate(catalog: Catalog, notes: dict[Address, tuple[SegmentId, Note]]) -> None:
    """Pin what is pinned, label what has no label here, and add the hits."""
    catalog.pin([address for address, (_, note) in notes.items() if note.is_pinned])
    catalog.touch({address: note.num_hits for address, (_, note) in notes.items() if note.num_hits}, at=time.time())
    labels: dict[str, list[Address]] = {}
    for row in catalog.of_segments({segment_id for segment_id, note in notes.values() if note.label is not None}):
        _, note = notes.get(row.address, (None, Note()))
        if row.label is None and note.label is not None:
            labels.setdefault(note.label, []).append(row.address)
    for label, addresses in labels.items():
        catalog.label(addresses, label)


_MAX_COMPUTE_SECONDS = 1e9
_MAX_NUM_TOKENS = 1 << 31
"""The catalog sums both up; impossible numbers must not spoil its sums."""

_LOSSY_DTYPES = {Fidelity.BFLOAT16: frozenset({"BF16", "F16"}), Fidelity.INT8: frozenset({"I8"})}


@dataclass(frozen=True, slots=True)
class Note:
    """What a bundle carries about a representation besides its parts."""

    label: str | None = None
    is_pinned: bool = False
    num_hits: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return self == Note()

    def joined(self, other: Note) -> Note:
        """Return what two notes say about one representation; of two labels, the first."""
        label = other.label if self.label is None else self.label
        return Note(label, self.is_pinned or other.is_pinned, self.num_hits + other.num_hits)


@dataclass(frozen=True, slots=True, eq=False)
class CheckedPart:
    """A part that has passed every check that is possible without the model that computed it."""

    key: Key
    origin: Origin
    blob: memoryview
    note: Note = Note()


def admit(key: Key, blob: memoryview, *, fidelity: Fidelity, note: Note | None = None) -> CheckedPart:
    """Return a part that is what its key says, and is kept with `fidelity`.

    Raises `BlobFormat` for any other part, `FormatTooNew` for one of a newer version.
    """
    part, origin = decode_origin(blob)
    check_place(key, part, origin)
    reason = _flaw(part, decode(part, blob), origin, fidelity)
    if reason is not None:
        raise _refusal(key, reason)
    return CheckedPart(key, origin, blob, note or Note())


def check_place(key: Key, part: Part, origin: Origin) -> None:
    """Raise `BlobFormat` for a part that was computed from something else than its key says."""
    if (origin.address, part) != key:
        raise _refusal(key, f"it is the {part.name.lower()} part of {origin.address.hex()}")


def _flaw(part: Part, arrays: Arrays, origin: Origin, fidelity: Fidelity) -> str | None:
    if not 0 <= origin.compute_seconds <= _MAX_COMPUTE_SECONDS:  # NaN is not between them
        return f"nothing takes {origin.compute_seconds} seconds to compute"
    if not origin.num_tokens <= _MAX_NUM_TOKENS or _num_tokens(part, arrays) not in (None, origin.num_tokens):
        return f"it does not have {origin.num_tokens:,} tokens"
    if part is Part.KV and not _is_kept(arrays["keys"].dtype, fidelity):
        return f"its keys and values are {arrays['keys'].dtype}, which {fidelity} ones are not"
    return None


def _num_tokens(part: Part, arrays: Arrays) -> int | None:
    if part is Part.KV:
        return arrays["keys"].shape[2]
    return arrays["input_ids"].shape[0] if part is Part.SCORES else None


def _is_kept(dtype: str, fidelity: Fidelity) -> bool:
    return dtype != "I8" if fidelity is Fidelity.EXACT else dtype in _LOSSY_DTYPES[fidelity]


def _refusal(key: Key, reason: str) -> BlobFormat:
    return BlobFormat(
        f"the {key.part.name.lower()} part of {key.address.hex()} cannot be used: {reason}",
        hint="It was left out and will be computed again.",
    )
