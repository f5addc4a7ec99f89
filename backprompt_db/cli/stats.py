"""`stats`: what the database holds, in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backprompt_db.cli.location import DbOption, directory_of
from backprompt_db.cli.output import JsonOption, duration, emit, emit_json, grid, literal, size

if TYPE_CHECKING:
    from backprompt_db.maintenance.stats import Stats


def stats(*, db: DbOption = None, as_json: JsonOption = False) -> None:
    """Show what the database holds and what it saved: representations, models, tokens, bytes, hits.

    The numbers come from the catalog. Where it cannot be used, what the store holds is counted instead.
    """
    from backprompt_db.maintenance.stats import gather

    found = gather(directory_of(db))
    if as_json:
        emit_json(found)
        return
    emit(grid(_lines(found)))
    if found.catalog_problem is not None:
        emit(literal(f"Counted in the store, because {found.catalog_problem}. `backprompt-db reindex` rebuilds it."))


def _lines(found: Stats) -> dict[str, str]:
    parts = ", ".join(f"{part.name.lower()} {size(nbytes)}" for part, nbytes in found.nbytes.items())
    return {
        "database": str(found.directory),
        "representations": f"{found.num_representations:,}",
        "segments": _count(found.num_segments),
        "models": _count(found.num_models),
        "tokens": _count(found.num_tokens),
        "stored": f"{size(sum(found.nbytes.values()))} ({parts})",
        "on disk": size(found.file_nbytes),
        "hits": _count(found.num_hits),
        "saved": "unknown" if found.saved_seconds is None else f"{duration(found.saved_seconds)} of computation",
        "format": f"{found.format}, {found.fidelity}",
        "created": found.created_at,
    }


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"
