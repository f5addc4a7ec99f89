"""`export`, `import` and `merge`: moving representations from one database to another."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TextIO

import typer

from backprompt_db.cli.location import DbOption, directory_of, named_directory, open_quietly
from backprompt_db.cli.options import (
    ForceOption,
    LabelOption,
    LargerThanOption,
    ModelOption,
    NamespaceOption,
    OlderThanOption,
    PrefixOption,
    SmallerThanOption,
    UsedWithinOption,
    selected,
)
from backprompt_db.cli.output import JsonOption, emit, emit_json, progress_bar, reading_bar
from backprompt_db.errors import StoreError, UnsafeLocation
from backprompt_db.system.files import replacing
from backprompt_db.views.console import literal
from backprompt_db.views.formatting import plural, size

if TYPE_CHECKING:
    from backprompt_db.catalog.records import Selection
    from backprompt_db.operations.bundles.ingest import Arrivals
    from backprompt_db.operations.bundles.transfer import Exported

_STANDARD_STREAM = "-"


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", readable=False, help="The file to write, or - for stdout.")],
    *,
    db: DbOption = None,
    text_prefix: PrefixOption = None,
    label: LabelOption = None,
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    used_within: UsedWithinOption = None,
    older_than: OlderThanOption = None,
    larger_than: LargerThanOption = None,
    smaller_than: SmallerThanOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write representations to one file, a bundle: everything, or what all given options select.

    What a representation follows is exported with it, so that another database can continue from it. Everything is
    checked when it is read. A file that is there is only overwritten with --force. With -, the bundle goes to stdout,
    and the report to stderr.
    """
    selection = selected(
        text_prefix=text_prefix,
        label=label,
        model=model,
        namespace=namespace,
        used_within=used_within,
        older_than=older_than,
        larger_than=larger_than,
        smaller_than=smaller_than,
    )
    done = _export(db, out, selection, force=force)
    # The report must not be mixed with a bundle that goes to stdout.
    with contextlib.redirect_stdout(sys.stderr) if _is_standard(out) else contextlib.nullcontext():
        if as_json:
            emit_json(done)
        else:
            _print_export(done)


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", readable=False, help="The bundle to read, or - for stdin.")],
    *,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store what a bundle holds and the database lacks. Everything is checked before it is stored.

    Checks find damage, not lies: import only what was made by people you trust. Can be repeated after an interruption.
    """
    from backprompt_db.operations.bundles.transfer import import_bundle

    with open_quietly(db) as database, _reading(file) as stream:
        done = import_bundle(database, stream)
    _report(done, as_json=as_json)


def merge(
    other: Annotated[
        Path,
        typer.Argument(metavar="DIR", parser=named_directory, help="The other database's directory; it is only read."),
    ],
    *,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store what another database has and this one lacks, and take over its labels, pins and hits.

    Everything is checked before it is stored. Can be repeated after an interruption.
    """
    from backprompt_db.operations.bundles.transfer import merge as merge_databases

    with open_quietly(db) as database:
        done = merge_databases(
            database, directory_of(other), progress=lambda lacking: progress_bar(lacking, "Merging", total=None)
        )
    _report(done, as_json=as_json)


def _export(db: Path | None, out: Path, selection: Selection, *, force: bool) -> Exported:
    from backprompt_db.operations.bundles.transfer import export_bundle

    with open_quietly(db) as database, _writing(out, force=force) as stream:
        return export_bundle(
            database, stream, selection=selection, progress=lambda wanted: progress_bar(wanted, "Exporting", total=None)
        )


def _is_standard(path: Path) -> bool:
    return str(path) == _STANDARD_STREAM


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[BinaryIO]:
    with _naming_failures(file):
        if _is_standard(file):
            yield _opened(sys.__stdin__).buffer
            return
        with file.open("rb") as opened:
            nbytes = os.fstat(opened.fileno()).st_size
            with reading_bar(opened, "Importing", nbytes=nbytes) as stream:
                yield stream


@contextlib.contextmanager
def _writing(out: Path, *, force: bool) -> Iterator[BinaryIO]:
    with _naming_failures(out):
        if not _is_standard(out):
            with _replacing(out, force=force) as file:
                yield file
            return
        stdout = _opened(sys.__stdout__)
        if stdout.isatty():
            raise typer.BadParameter("stdout is a terminal: redirect it, or give a file.")
        # Unbuffered: what could not be written would fail once more when the interpreter exits.
        with os.fdopen(stdout.fileno(), "wb", buffering=0, closefd=False) as stream:
            yield stream


def _opened(stream: TextIO | None) -> TextIO:
    if stream is None:  # by now its descriptor may belong to a file of the database
        raise StoreError("the standard stream is closed", hint="Give a file.")
    return stream


@contextlib.contextmanager
def _replacing(out: Path, *, force: bool) -> Iterator[BinaryIO]:
    """Give a new file that only its owner may read. It gets its name when everything is written."""
    _require_free(out, force=force)
    with replacing(out) as file:
        yield file
        _require_free(out, force=force)


def _require_free(out: Path, *, force: bool) -> None:
    try:
        mode = out.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise UnsafeLocation(f"{out} is there and is not a file", hint="Give another name, or - for stdout.")
    if not force:
        raise UnsafeLocation(f"{out} is there already", hint="Give another name, or --force to overwrite it.")


@contextlib.contextmanager
def _naming_failures(path: Path) -> Iterator[None]:
    """Say which file the operating system refused. A pipe that nobody reads any more is no failure."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        hint = "Give another file, or make room, and try again."
        raise StoreError(f"{path} cannot be used: {error.strerror or error}", hint=hint) from error


def _print_export(done: Exported) -> None:
    representations, parts = plural(done.num_representations, "representation"), plural(done.num_parts, "part")
    emit(f"{representations} exported, {parts}, {size(done.nbytes)}.")
    if done.num_orphaned:
        emit(f"{done.num_orphaned:,} left out: the keys and values of the text before them are not stored any more.")
    if done.num_unusable:
        emit(f"{done.num_unusable:,} cannot be used and were left out; `backprompt-db verify` tells why.")
    if done.catalog_problem is not None:
        emit(literal(f"Labels, pins and names of models may be missing, because {done.catalog_problem}."), wrap=False)


def _report(done: Arrivals, *, as_json: bool) -> None:
    if as_json:
        emit_json(done)
    else:
        _print_arrivals(done)


def _print_arrivals(done: Arrivals) -> None:
    emit(
        f"{plural(done.num_stored, 'part')} stored, {size(done.nbytes_stored)}; {done.num_known:,} were there already."
    )
    if done.num_orphaned:
        emit(f"{done.num_orphaned:,} left out: the keys and values of the text before them are missing.")
    if done.num_unusable:
        emit(f"{done.num_unusable:,} of the other database cannot be used and were left out.")
    if done.source_problem is not None:
        emit(literal(f"Labels, pins and hits were not taken over, because {done.source_problem}."), wrap=False)
    if done.catalog_problem is not None:
        emit(literal(f"The catalog is incomplete, because {done.catalog_problem}."), wrap=False)
        emit("Run `backprompt-db reindex`.")
