"""`reindex`: mending the catalog."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backprompt_db.cli.location import DbOption, open_quietly
from backprompt_db.cli.output import JsonOption, emit, emit_json, literal, plural

if TYPE_CHECKING:
    from backprompt_db.maintenance.reindex import Reindexing


def reindex(*, db: DbOption = None, as_json: JsonOption = False) -> None:
    """Make the catalog agree with the store: add what it lacks, forget what is gone.

    Hits, pins and labels of what stays are kept. A damaged catalog is moved aside and built anew.
    """
    from backprompt_db.maintenance.reindex import reindex as rebuild

    with open_quietly(db) as database:
        done = rebuild(database)
    if as_json:
        emit_json(done)
    else:
        _print_reindexing(done)


def _print_reindexing(done: Reindexing) -> None:
    if done.moved_aside is not None:
        emit(literal(f"The damaged catalog is now {done.moved_aside}."), wrap=False)
    emit(f"{plural(done.num_added, 'part')} added, {done.num_forgotten:,} forgotten.")
    if done.num_unreadable:
        emit(
            f"{plural(done.num_unreadable, 'part')} cannot be used; `backprompt-db verify` tells why and removes them."
        )
