"""What a database holds and what it did, in numbers.

Sums are read from the catalog by plain SQL: SQLAlchemy alone would take longer to import than all of this.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from backprompt_db.catalog.plain_sql import rows
from backprompt_db.catalog.records import GroupTotals, Totals
from backprompt_db.database.counters import NAMES_IN_CATALOG
from backprompt_db.database.location import CATALOG
from backprompt_db.database.opening import manifest_of, open_store
from backprompt_db.database.statistics import Activity, Incident, ModelUsage, NamespaceUsage, Stats
from backprompt_db.errors import CatalogError
from backprompt_db.operations.disk_usage import room_of
from backprompt_db.prompt.ids import Address, WeightsId
from backprompt_db.prompt.representation import Part

_NUM_INCIDENTS = 10

_SUMMED = ("num_representations", *(f"{part.name.lower()}_nbytes" for part in Part))
_COUNTS = ", ".join(f"coalesce(sum({column}), 0)" for column in _SUMMED)
_TOTALS = f"""
    SELECT {_COUNTS},
        (SELECT coalesce(sum(num_segments), 0) FROM namespaces WHERE :namespace IS NULL OR name = :namespace),
        count(DISTINCT weights_id), coalesce(sum(num_tokens), 0), coalesce(sum(num_hits), 0), total(saved_seconds)
    FROM sums WHERE :namespace IS NULL OR namespace = :namespace
"""  # noqa: S608 - constants
_BY = "SELECT {counts}, {column} FROM sums GROUP BY {column}"

_TOTALS_KINDS = (*[int] * 9, float)
_EVENTS = "SELECT at, kind, address, detail FROM events ORDER BY id DESC LIMIT :limit"

_Group = TypeVar("_Group")


def gather(directory: Path, *, namespace: str | None = None) -> Stats:
    """Sum up the database in `directory`, or one namespace of it; raises `UnsafeLocation` where there is none.

    Without a usable catalog the keys of the store are counted, which takes longer and tells less. Raises `CatalogError`
    for a namespace then: keys do not tell their namespace.
    """
    manifest = manifest_of(directory)
    return Stats(
        directory=directory,
        namespace=namespace,
        format=manifest.format,
        fidelity=manifest.fidelity,
        created_at=manifest.created_at,
        **asdict(room_of(directory)),
        **_contents(directory, namespace),
    )


def _contents(directory: Path, namespace: str | None) -> dict[str, Any]:
    try:
        return _from_catalog(directory / CATALOG, namespace)
    except CatalogError as error:
        if namespace is not None:
            raise
        return _from_store(directory) | {"catalog_problem": error.message}


def _from_catalog(path: Path, namespace: str | None) -> dict[str, Any]:
    total = sums(path, namespace=namespace)
    is_whole = namespace is None
    return {
        "num_representations": total.num_representations,
        "num_segments": total.num_segments,
        "num_models": total.num_models,
        "num_tokens": total.num_tokens,
        "nbytes": total.nbytes,
        "num_hits": total.num_hits,
        "saved_seconds": total.saved_seconds,
        "by_model": _by_model(path) if is_whole else None,
        "by_namespace": _by_namespace(path) if is_whole else None,
        "activity": _activity(counts(path)),
        "incidents": _incidents(path, now=time.time()),
        "catalog_problem": None,
    }


def _from_store(directory: Path) -> dict[str, Any]:
    nbytes = Counter(dict.fromkeys(Part, 0))
    num_representations, last = 0, b""
    with contextlib.closing(open_store(directory)) as store:
        for key, size in store.keys():
            nbytes[key.part] += size
            num_representations += key.address != last
            last = key.address
    unknown = ("num_segments", "num_models", "num_tokens", "num_hits", "saved_seconds", "by_model", "by_namespace")
    return {
        "num_representations": num_representations,
        "nbytes": dict(nbytes),
        **dict.fromkeys((*unknown, "activity", "incidents")),
    }


def _by_model(path: Path) -> list[ModelUsage]:
    names = dict[bytes, str]()
    with contextlib.suppress(CatalogError):  # nothing else depends on names
        names = dict(rows(path, "SELECT weights_id, name FROM models", (bytes, str)))
    return [
        ModelUsage(
            weights_id=weights_id,
            name=names.get(weights_id, ""),
            num_representations=found.num_representations,
            nbytes=found.nbytes,
        )
        for weights_id, found in _largest_first(sums_by_model(path))
    ]


def _by_namespace(path: Path) -> list[NamespaceUsage]:
    return [
        NamespaceUsage(namespace=namespace, num_representations=found.num_representations, nbytes=found.nbytes)
        for namespace, found in _largest_first(sums_by_namespace(path))
    ]


def _largest_first(found: Mapping[_Group, GroupTotals]) -> list[tuple[_Group, GroupTotals]]:
    return sorted(found.items(), key=lambda item: sum(item[1].nbytes.values()), reverse=True)


def _activity(found: Mapping[str, float]) -> Activity:
    counted = {each.name: found.get(NAMES_IN_CATALOG[each.name], 0) for each in fields(Activity)}
    whole: dict[str, Any] = {
        name: number if name.endswith("seconds") else int(number) for name, number in counted.items()
    }
    return Activity(**whole)


def _incidents(path: Path, *, now: float) -> list[Incident]:
    return [
        Incident(
            at=at,
            age_seconds=max(0.0, now - at),
            kind=kind,
            address=None if address is None else Address(address),
            detail=detail,
        )
        for at, kind, address, detail in events(path, limit=_NUM_INCIDENTS)
    ]


def sums(path: Path, *, namespace: str | None = None) -> Totals:
    """Return the sums over all representations in the catalog at `path`, or over those of a namespace.

    Raises `CatalogError` if it is unusable.
    """
    [(count, *sizes, num_segments, num_models, num_tokens, num_hits, saved_seconds)] = rows(
        path, _TOTALS, _TOTALS_KINDS, namespace=namespace
    )
    return Totals(count, num_segments, num_models, num_tokens, _nbytes(sizes), num_hits, saved_seconds)


def sums_by_model(path: Path) -> dict[WeightsId, GroupTotals]:
    """Return the sums of each model that has representations; raises `CatalogError` if the catalog is unusable."""
    return {WeightsId(weights_id): found for weights_id, found in _by(path, "weights_id", bytes).items()}


def sums_by_namespace(path: Path) -> dict[str, GroupTotals]:
    """Return the sums of each namespace that has representations; raises `CatalogError` if the catalog is unusable."""
    return _by(path, "namespace", str)


def counts(path: Path) -> dict[str, float]:
    """Return what was counted over all processes, by name; raises `CatalogError` if the catalog is unusable."""
    return dict(rows(path, "SELECT name, value FROM counts ORDER BY name", (str, float | int)))


def events(path: Path, *, limit: int) -> list[tuple[float, str, bytes | None, str]]:
    """Return time, kind, address and detail of the newest events; raises `CatalogError` if it is unusable."""
    return list(rows(path, _EVENTS, (float | int, str, bytes | None, str), limit=limit))


def _by(path: Path, column: str, kind: type) -> dict[Any, GroupTotals]:
    return {
        key: GroupTotals(count, _nbytes(sizes))
        for count, *sizes, key in rows(
            path, _BY.format(counts=_COUNTS, column=column), (*[int] * (1 + len(Part)), kind)
        )
    }


def _nbytes(sizes: Sequence[int]) -> dict[Part, int]:
    return dict(zip(Part, sizes, strict=True))
