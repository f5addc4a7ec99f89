"""Carrying representations to another database: as a bundle, or from directory to directory."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO

from backprompt_db.catalog.records import Row, Selection
from backprompt_db.database.lineage import closure
from backprompt_db.database.opening import manifest_of, open_catalog, open_store
from backprompt_db.errors import CatalogError, FormatError, PromptError
from backprompt_db.operations.bundles.bundle import BundleWriter, read_bundle
from backprompt_db.operations.bundles.export import PartReader, Remarks
from backprompt_db.operations.bundles.index import Index
from backprompt_db.operations.bundles.ingest import Arrivals, CheckedPart, Intake, Note
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key, Store, lacks

if TYPE_CHECKING:
    from pathlib import Path

    from backprompt_db.database.database import Database
    from backprompt_db.prompt.ids import Address

_GROUP_NBYTES = 64 << 20
_GROUP_NUM_REPRESENTATIONS = 256
"""A group has at least one representation, and ends when it reaches one of these two."""

Progress = Callable[[Iterator["Address"]], Iterable["Address"]]
"""Wraps the iterator of the addresses that were asked for."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What went into a bundle."""

    num_representations: int
    num_parts: int
    nbytes: int
    num_orphaned: int
    """Keys and values that were left out, because those of the text before them are not in the database."""
    num_unusable: int
    """Parts that were left out, because they are damaged, malformed or too large for a bundle."""
    catalog_problem: str | None
    """Why labels, pins and names of models are missing."""


def export_bundle(
    db: Database, stream: BinaryIO, *, selection: Selection | None = None, progress: Progress = iter
) -> Exported:
    """Write a bundle of what is selected, or of everything, with all that it follows; parents before children.

    `stream` only needs `write`. Raises `PromptError` when nothing is selected, and `CatalogError` for a selection in a
    database whose catalog cannot be used.
    """
    db.flush()
    wanted = _selected(db, selection or Selection())
    reader, known = PartReader(db.store, db.fidelity, is_closed=True), _remarks(db)
    bundle = BundleWriter(stream, fidelity=db.fidelity)
    num_representations = nbytes = 0
    for parts in _groups(reader.parts(address) for address in closure(reader.origin, progress(wanted))):
        num_representations += len({part.key.address for part in parts})
        nbytes += sum(part.blob.nbytes for part in parts)
        bundle.add(known.group(known.noted(parts, _label_and_pin)))
        del parts  # else two groups would be in memory while the next one is read
    bundle.finish()
    return Exported(
        num_representations, bundle.num_parts, nbytes, reader.num_orphaned, reader.num_unusable, known.problem
    )


def import_bundle(db: Database, stream: BinaryIO) -> Arrivals:
    """Store what a bundle holds and the database lacks. `stream` only needs `read`.

    Each part is checked before it is stored, and names, labels and pins are entered. Raises `FormatError` for a bundle
    of another fidelity and at the first thing that is wrong; what came before that is stored. It can be repeated.
    """
    intake = Intake(db)
    try:
        for found in read_bundle(stream, fidelity=db.fidelity):
            if isinstance(found, Index):
                intake.introduce(found.models, found.tokenizers)
            else:
                intake.add(found)
    except FormatError as error:
        if num_stored := intake.finish().num_stored:
            message = f"{error.message}. Before that, {num_stored:,} parts were stored"
            raise type(error)(message, hint=error.hint) from error
        raise
    return intake.finish()


def merge(db: Database, directory: Path, *, progress: Progress = iter) -> Arrivals:
    """Store what the database in another directory has and this one lacks; that one is only read. Can be repeated.

    Parts are checked as in a bundle. Labels and pins are taken over, hits only for representations that were lacking.
    Raises `FormatError` for a database of another fidelity.
    """
    intake = Intake(db)
    _require_fidelity(db, directory)
    with contextlib.closing(open_store(directory)) as store, _remarks_in(directory) as known:
        intake.introduce(known.models, known.tokenizers)
        reader = PartReader(store, db.fidelity)
        lacking = closure(reader.origin, progress(_lacking(store, db.store)))
        for parts in _groups(reader.parts(address, besides=db.store) for address in lacking):
            for part in known.noted(parts, lambda row: _hits_if_new(db.store, row)):
                intake.add(part)
            del parts
        for row in known.rows():
            intake.remark(row.address, row.segment_id, _label_and_pin(row))
        arrivals = intake.finish()
    return replace(arrivals, num_unusable=reader.num_unusable, source_problem=known.problem)


def _selected(db: Database, selection: Selection) -> Iterator[Address]:
    if selection.is_everything:
        return _addresses(db.store)
    if db.catalog is None:
        raise CatalogError(
            "the catalog cannot be used, and nothing else knows what is selected",
            hint="Run `backprompt-db reindex`, or export everything.",
        )
    rows = db.catalog.select(selection)
    first = next(rows, None)
    if first is None:
        raise PromptError("nothing is selected", hint="See what there is with `backprompt-db ls`.")
    return (row.address for row in itertools.chain([first], rows))


def _addresses(store: Store) -> Iterator[Address]:
    return (address for address, _ in itertools.groupby(key.address for key, _ in store.keys()))


def _lacking(theirs: Store, ours: Store) -> Iterator[Address]:
    """Yield each address of which one store has a part that the other lacks."""
    for address, found in itertools.groupby(theirs.keys(), key=lambda entry: entry[0].address):
        if any(lacks(ours, key, nbytes) for key, nbytes in found):
            yield address


def _require_fidelity(db: Database, directory: Path) -> None:
    found = manifest_of(directory, hint="Give the directory of the database to merge.").fidelity
    if found is not db.fidelity:
        raise FormatError(
            f"{directory} keeps keys and values {found}, the database {db.fidelity}",
            hint=f"Merge it into a database that was made with fidelity={found.value!r}.",
        )


def _groups(read: Iterable[Sequence[CheckedPart]]) -> Iterator[list[CheckedPart]]:
    """Put the parts of several representations together; those of one stay together."""
    group, nbytes, num_representations = list[CheckedPart](), 0, 0
    for parts in read:
        group += parts
        nbytes += sum(part.blob.nbytes for part in parts)
        num_representations += bool(parts)
        if nbytes >= _GROUP_NBYTES or num_representations >= _GROUP_NUM_REPRESENTATIONS:
            yield group
            group, nbytes, num_representations = [], 0, 0
    if group:
        yield group


def _remarks(db: Database) -> Remarks:
    is_missing = db.catalog is None and db.directory is not None
    return Remarks(db.catalog, problem="the catalog cannot be used" if is_missing else None)


@contextlib.contextmanager
def _remarks_in(directory: Path) -> Iterator[Remarks]:
    """Yield what the catalog of another database knows, if it can be read."""
    try:
        catalog = open_catalog(directory)
    except CatalogError as error:
        yield Remarks(None, problem=error.message)
        return
    with catalog:
        yield Remarks(catalog)


def _label_and_pin(row: Row) -> Note:
    return Note(row.label, row.is_pinned)


def _hits_if_new(store: Store, row: Row) -> Note:
    is_new = not any(store.has(Key(row.address, part)) for part in Part)
    return Note(num_hits=row.num_hits if is_new else 0)
