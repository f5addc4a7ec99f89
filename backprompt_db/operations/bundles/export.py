"""What leaves a database: parts, each of them checked, and what the catalog knows about them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import ModelRecord, Row, Selection, TokenizerRecord
from backprompt_db.errors import CatalogError, FormatError
from backprompt_db.operations.bundles.bundle import Group
from backprompt_db.operations.bundles.ingest import CheckedPart, Note, admit
from backprompt_db.operations.bundles.tar import MAX_MEMBER_NBYTES
from backprompt_db.prompt.representation import Origin, Part
from backprompt_db.store.contract import Key, Store, lacks, needs_of

if TYPE_CHECKING:
    from backprompt_db.codec.fidelity import Fidelity
    from backprompt_db.prompt.ids import Address

_Answer = TypeVar("_Answer")


class PartReader:
    """Reads the parts that may leave a store, each checked, and counts those that may not."""

    def __init__(self, store: Store, fidelity: Fidelity, *, is_closed: bool = False) -> None:
        self.num_orphaned = 0
        self._store = store
        self._fidelity = fidelity
        self._unusable = set[Key]()
        self._latest: CheckedPart | None = None
        """The part whose origin was read last: mostly, it leaves next."""
        self._with_kv: set[Address] | None = set() if is_closed else None
        """Addresses whose keys and values have left; None where the receiver may have what a part needs."""

    @property
    def num_unusable(self) -> int:
        """How many parts were met that are damaged, malformed or too large."""
        return len(self._unusable)

    def origin(self, address: Address) -> Origin | None:
        """Return what a representation was computed from, as its smallest usable part says."""
        found = (self._checked(Key(address, part)) for part in Part)
        self._latest = next((part for part in found if part is not None), None)
        return None if self._latest is None else self._latest.origin

    def parts(self, address: Address, *, besides: Store | None = None) -> list[CheckedPart]:
        """Return the parts of one representation that may leave, without those that `besides` has as well."""
        keys = (Key(address, part) for part in Part)
        found = (self._checked(key) for key in keys if besides is None or self._is_new_to(besides, key))
        return [part for part in found if part is not None and self._may_leave(part)]

    def _is_new_to(self, other: Store, key: Key) -> bool:
        nbytes = self._store.size(key)
        return nbytes is not None and lacks(other, key, nbytes)

    def _checked(self, key: Key) -> CheckedPart | None:
        if self._latest is not None and self._latest.key == key:
            return self._latest
        num_quarantined = self._store.num_quarantined
        blob = self._store.get(key)
        if blob is None and self._store.num_quarantined == num_quarantined:
            return None
        if blob is not None and blob.nbytes <= MAX_MEMBER_NBYTES:
            with contextlib.suppress(FormatError):
                return admit(key, blob, fidelity=self._fidelity)
        self._unusable.add(key)
        return None

    def _may_leave(self, part: CheckedPart) -> bool:
        if self._with_kv is None:
            return True
        if any(need.address not in self._with_kv for need in needs_of(part.key, part.origin)):
            self.num_orphaned += 1
            return False
        if part.key.part is Part.KV:
            self._with_kv.add(part.key.address)
        return True


class Remarks:
    """What a catalog knows about what leaves. Where it cannot be read, that is nothing, and `problem` says why."""

    def __init__(self, catalog: Catalog | None, *, problem: str | None = None) -> None:
        self.problem = problem
        self._catalog = catalog
        self.models: list[ModelRecord] = self._ask(Catalog.models, [])
        self.tokenizers: list[TokenizerRecord] = self._ask(Catalog.tokenizers, [])
        self._introduced = set[bytes]()

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all representations."""
        try:
            if self._catalog is not None:
                yield from self._catalog.select(Selection())
        except CatalogError as error:
            self.problem = error.message

    def noted(self, parts: Sequence[CheckedPart], note_of: Callable[[Row], Note]) -> list[CheckedPart]:
        """Return the parts; the first one of each representation has the note that its row says."""
        ids = {part.origin.segment_id for part in parts}
        rows: list[Row] = self._ask(lambda catalog: list(catalog.of_segments(ids)), [])
        notes = {row.address: note_of(row) for row in rows}
        return [replace(part, note=notes.pop(part.key.address, Note())) for part in parts]

    def group(self, parts: Sequence[CheckedPart]) -> Group:
        """Return the parts as a group, with the models and tokenizers that no group had before."""
        ids: set[bytes] = {part.origin.weights_id for part in parts} | {part.origin.tokenizer_id for part in parts}
        new = ids - self._introduced
        self._introduced |= new
        models = [each for each in self.models if each.weights_id in new]
        return Group(parts, models, [each for each in self.tokenizers if each.tokenizer_id in new])

    def _ask(self, question: Callable[[Catalog], _Answer], default: _Answer) -> _Answer:
        try:
            return default if self._catalog is None else question(self._catalog)
        except CatalogError as error:
            self.problem = error.message
            return default
