"""What a database holds and what it did, in numbers. `operations/stats.py` gathers them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backprompt_db.views.console import bare_table, grid, html_text, literal, plain_text
from backprompt_db.views.formatting import age, duration, plural, size

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    from backprompt_db.prompt.ids import Address, WeightsId
    from backprompt_db.prompt.representation import Part

_NUM_ID_DIGITS = 12
_NUM_GROUPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What all processes have counted since the catalog was made. Parts that were found count where they were found."""

    num_memory_hits: int
    num_disk_hits: int
    num_base_hits: int
    num_part_misses: int
    """Parts that were asked for and not found anywhere."""
    num_computed_tokens: int
    computed_seconds: float
    num_evicted: int
    """Parts."""
    num_evicted_nbytes: int
    num_quarantined: int
    """Parts that were damaged or malformed."""
    num_read_failures: int
    num_write_failures: int
    num_waits: int
    """Computations of other processes that were waited for instead of being repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUsage:
    """What is stored of one model."""

    weights_id: WeightsId
    name: str
    """`""` where only its representations are known."""
    num_representations: int
    nbytes: Mapping[Part, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceUsage:
    """What is stored in one namespace."""

    namespace: str
    """`""` for the default one."""
    num_representations: int
    nbytes: Mapping[Part, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """One thing that went wrong."""

    at: float
    """POSIX seconds."""
    age_seconds: float
    """0 for a time in the future, which a clock that was fast has left."""
    kind: str
    address: Address | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Sums over a database, or over one namespace of it. What cannot be known at the moment is None."""

    directory: Path
    namespace: str | None
    """The namespace that sums are restricted to; None for all."""
    format: int
    fidelity: str
    created_at: str
    """UTC, ISO 8601."""
    num_representations: int
    num_segments: int | None
    """Segments that have at least one representation."""
    num_models: int | None
    num_tokens: int | None
    nbytes: Mapping[Part, int]
    """Stored bytes of every part, 0 where there are none."""
    num_hits: int | None
    """Uses of what is stored now; those of what was evicted do not count any more."""
    saved_seconds: float | None
    """These uses times what the computation had taken."""
    by_model: Sequence[ModelUsage] | None
    """The largest first; None also when sums are restricted to a namespace."""
    by_namespace: Sequence[NamespaceUsage] | None
    live_nbytes: int | None
    """Bytes of the store's pages in use, to which the limit applies."""
    file_nbytes: int
    """Bytes of all files in the directory."""
    max_nbytes: int | None
    """The limit."""
    fullness: float | None
    """Live bytes as a share of the limit."""
    activity: Activity | None
    incidents: Sequence[Incident] | None
    """The newest 10, the last one first."""
    catalog_problem: str | None
    """Why the sums were counted in the store instead of being read from the catalog; None when they were read."""
    store_problem: str | None
    config_problem: str | None

    def __rich__(self) -> Group:
        """What rich prints, as the command does."""
        return _view(self)

    def __str__(self) -> str:
        return plain_text(self)

    def __repr__(self) -> str:
        nbytes = size(sum(self.nbytes.values()))
        return f"<Stats of {self.directory}: {plural(self.num_representations, 'representation')}, {nbytes}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return html_text(self)


class _Gatherer:
    gather: Callable[[Path, str | None], Stats]


def register_gatherer(gather: Callable[[Path, str | None], Stats]) -> None:
    """Register the function that sums up the database in a directory, or one namespace: only a room above knows how."""
    _Gatherer.gather = staticmethod(gather)


def gathered(directory: Path, *, namespace: str | None) -> Stats:
    """Return the numbers about the database in `directory`, or about one namespace of it."""
    return _Gatherer.gather(directory, namespace)


def _view(found: Stats) -> Group:
    from rich.console import Group

    whole = _room(found) | _activity(found.activity) if found.namespace is None else {}
    blocks: list[RenderableType] = [grid(_facts(found) | whole)]
    if found.by_model and len(found.by_model) > 1:
        names = [f"{each.name or '?'} ({each.weights_id.hex()[:_NUM_ID_DIGITS]})" for each in found.by_model]
        blocks.append(_table("model", dict(zip(names, found.by_model, strict=True))))
    if found.by_namespace and len(found.by_namespace) > 1:
        blocks.append(_table("namespace", {each.namespace or "(default)": each for each in found.by_namespace}))
    if found.incidents and found.namespace is None:
        blocks += ["what went wrong last", *map(_line, found.incidents)]
    if found.catalog_problem is not None:
        problem = f"Counted in the store, because {found.catalog_problem}. `backprompt-db reindex` rebuilds it."
        blocks.append(literal(problem))
    blocks += [literal(problem) for problem in (found.store_problem, found.config_problem) if problem is not None]
    return Group(*blocks)


def _facts(found: Stats) -> dict[str, str]:
    from backprompt_db.prompt.representation import OWN_PARTS

    shown = {part: nbytes for part, nbytes in found.nbytes.items() if nbytes or part in OWN_PARTS}
    parts = ", ".join(f"{part.name.lower()} {size(nbytes)}" for part, nbytes in shown.items())
    return {
        "database": str(found.directory),
        **({} if found.namespace is None else {"namespace": found.namespace or "(default)"}),
        "representations": f"{found.num_representations:,}",
        "segments": _count(found.num_segments),
        "models": _count(found.num_models),
        "tokens": _count(found.num_tokens),
        "stored": f"{size(sum(found.nbytes.values()))} ({parts})",
        "hits": _count(found.num_hits),
        "saved": "unknown" if found.saved_seconds is None else f"{duration(found.saved_seconds)} of computation",
        "format": f"{found.format}, {found.fidelity}",
        "created": found.created_at,
    }


def _room(found: Stats) -> dict[str, str]:
    live = "unknown" if found.live_nbytes is None else size(found.live_nbytes)
    limit = "no limit" if found.max_nbytes is None else f"limit {size(found.max_nbytes)}"
    full = "" if found.fullness is None else f", {found.fullness:.1%} full"
    return {"in use": f"{live}, {limit}{full}", "on disk": size(found.file_nbytes)}


def _activity(found: Activity | None) -> dict[str, str]:
    if found is None:
        return {}
    return {
        "parts found": f"{found.num_memory_hits:,} in memory, {found.num_disk_hits:,} on disk, "
        f"{found.num_base_hits:,} in a database below",
        "parts missed": f"{found.num_part_misses:,}",
        "computed": f"{plural(found.num_computed_tokens, 'token')} in {duration(found.computed_seconds)}",
        "waited for": f"{found.num_waits:,} computations of other processes",
        "evicted": f"{plural(found.num_evicted, 'part')}, {size(found.num_evicted_nbytes)}",
        "quarantined": plural(found.num_quarantined, "part"),
        "failed": f"{found.num_read_failures:,} reads, {found.num_write_failures:,} writes",
    }


def _table(name: str, groups: Mapping[str, ModelUsage | NamespaceUsage]) -> Table:
    table = bare_table()
    table.add_column(name, overflow="fold")
    for column in ("representations", "size"):
        table.add_column(column, no_wrap=True, justify="right")
    for group, found in itertools.islice(groups.items(), _NUM_GROUPS):
        table.add_row(literal(group), f"{found.num_representations:,}", size(sum(found.nbytes.values())))
    if len(groups) > _NUM_GROUPS:
        table.add_row(f"and {len(groups) - _NUM_GROUPS:,} more, see --json")
    return table


def _line(incident: Incident) -> Text:
    where = "" if incident.address is None else f" {incident.address.hex()[:_NUM_ID_DIGITS]}"
    return literal(f"  {age(incident.at, now=time.time())} ago: {incident.kind}{where}: {incident.detail}")


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"
