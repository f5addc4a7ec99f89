"""`evict`, `compact` and `purge`: making room, and removing texts for good."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from backprompt_db.catalog.records import EXPIRED, ROOM, SELECTED, VALUE
from backprompt_db.cli.location import DbOption, open_quietly
from backprompt_db.cli.options import (
    AddressOption,
    ContainsOption,
    DryRunOption,
    LabelOption,
    LargerThanOption,
    ModelOption,
    NamespaceOption,
    OlderThanOption,
    PrefixOption,
    SmallerThanOption,
    selected,
    size_nbytes,
)
from backprompt_db.cli.output import JsonOption, emit, emit_json
from backprompt_db.views.console import bare_table
from backprompt_db.views.formatting import age, duration, plural, size

if TYPE_CHECKING:
    from rich.table import Table

    from backprompt_db.catalog.records import EvictionCandidate

_NUM_ADDRESS_DIGITS = 12
_NUM_SHOWN = 40

_To = Annotated[
    int | None,
    typer.Option("--to", metavar="SIZE", parser=size_nbytes, help="Evict until at most this much is in use."),
]


def evict(
    *,
    db: DbOption = None,
    to: _To = None,
    text_prefix: PrefixOption = None,
    contains: ContainsOption = None,
    label: LabelOption = None,
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    older_than: OlderThanOption = None,
    larger_than: LargerThanOption = None,
    smaller_than: SmallerThanOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what is expired, then what is worth least: seconds of computation per byte, less the longer it is unused.

    With --to, removal stops when SIZE is in use. Without it, everything that the options select is removed, and without
    any option what is above the low water mark. Pinned representations stay, and keys and values that others need.
    --dry-run prints what would go, in order, and why.
    """
    from backprompt_db.operations import evict

    selection = selected(
        text_prefix=text_prefix,
        text_contains=contains,
        label=label,
        model=model,
        namespace=namespace,
        older_than=older_than,
        larger_than=larger_than,
        smaller_than=smaller_than,
    )
    with open_quietly(db) as database:
        if dry_run:
            candidates = evict.eviction_order(database, to_nbytes=to, selection=selection)
            emit_json([candidate._asdict() for candidate in candidates]) if as_json else _print_order(candidates)
            return
        done = evict.evict(database, to_nbytes=to, selection=selection)
        live_nbytes = database.store.usage().live_nbytes
    if as_json:
        emit_json({"num_parts": done.num_parts, "nbytes": done.nbytes, "live_nbytes": live_nbytes})
    else:
        emit(f"{plural(done.num_parts, 'part')} evicted, {size(done.nbytes)}; {size(live_nbytes)} are in use.")


def compact(*, db: DbOption = None, as_json: JsonOption = False) -> None:
    """Give the room of what was removed back to the filesystem, while others read and write.

    Needs room for a second copy of what is stored, until every process that uses the old file has changed to the new.
    """
    from backprompt_db.operations.evict import compact as compact_database

    with open_quietly(db) as database:
        before, after = compact_database(database)
    if as_json:
        emit_json({"file_nbytes_before": before, "file_nbytes": after})
    else:
        emit(f"{size(before)} became {size(after)}.")


def purge(
    *,
    db: DbOption = None,
    text_prefix: PrefixOption = None,
    contains: ContainsOption = None,
    address: AddressOption = None,
    label: LabelOption = None,
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    older_than: OlderThanOption = None,
    larger_than: LargerThanOption = None,
    smaller_than: SmallerThanOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove texts for good, pinned or not, with all that follows them. Nothing of them stays in the files.

    What follows a text is removed too, because keys and values contain what they were computed from. Bundles, backups
    and databases that were merged from this one are not touched. Needs room for a second copy of what stays.
    """
    from backprompt_db.operations import purge as purging

    selection = selected(
        text_prefix=text_prefix,
        text_contains=contains,
        address_prefix=address,
        label=label,
        model=model,
        namespace=namespace,
        older_than=older_than,
        larger_than=larger_than,
        smaller_than=smaller_than,
    )
    with open_quietly(db) as database:
        if not yes:
            num_doomed = len(purging.doomed(database, selection))
            typer.confirm(f"Remove {plural(num_doomed, 'representation')} for good?", abort=True, err=True)
        done = purging.purge(database, selection)
    if as_json:
        emit_json(done)
    else:
        emit(f"{plural(done.num_representations, 'representation')} purged, {plural(done.num_parts, 'part')}.")


def _print_order(candidates: Sequence[EvictionCandidate]) -> None:
    if not candidates:
        emit("Nothing would go.")
        return
    emit(_table(candidates[:_NUM_SHOWN]))
    if len(candidates) > _NUM_SHOWN:
        emit(f"... and {len(candidates) - _NUM_SHOWN:,} more; --json lists all of them.")
    nbytes, seconds = sum(candidate.nbytes for candidate in candidates), _seconds(candidates)
    emit(
        f"{plural(len(candidates), 'part')} would go, {size(nbytes)}."
        f" Computing all of them again would take {duration(seconds)}."
    )


def _seconds(candidates: Sequence[EvictionCandidate]) -> float:
    """Return the seconds that computing all of it took. The parts of one representation were computed together."""
    return sum({candidate.address: candidate.seconds for candidate in candidates}.values())


def _table(candidates: Sequence[EvictionCandidate]) -> Table:
    table, now = bare_table(), time.time()
    table.add_column("address", no_wrap=True)
    table.add_column("part")
    for name in ("size", "took", "used"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("why")
    for candidate in candidates:
        table.add_row(
            candidate.address.hex()[:_NUM_ADDRESS_DIGITS],
            candidate.part.name.lower(),
            size(candidate.nbytes),
            duration(candidate.seconds),
            f"{age(candidate.used_at, now=now)} ago",
            _WHY[candidate.reason],
        )
    return table


_WHY = {EXPIRED: "expired", VALUE: "worth least", ROOM: "nothing older is left", SELECTED: "selected"}
