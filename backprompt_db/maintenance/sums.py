"""Sums over the catalog, in plain SQL.

`Catalog.totals` has the same numbers, but importing SQLAlchemy takes several times as long as everything else that
showing them does; a test holds the two to each other.
"""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from backprompt_db.errors import CatalogError
from backprompt_db.keys import WeightsId
from backprompt_db.representation import Part

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_TIMEOUT_SECONDS = 5.0

_COUNTS = """
    coalesce(sum(num_representations), 0), coalesce(sum(scores_nbytes), 0), coalesce(sum(logits_nbytes), 0),
    coalesce(sum(kv_nbytes), 0)
"""
_TOTALS = f"""
    SELECT {_COUNTS}, (SELECT coalesce(sum(num_segments), 0) FROM namespaces WHERE ?1 IS NULL OR name = ?1),
        count(DISTINCT weights_id), coalesce(sum(num_tokens), 0), coalesce(sum(num_hits), 0), total(saved_seconds)
    FROM sums WHERE ?1 IS NULL OR namespace = ?1
"""  # noqa: S608 - constants
_BY = "SELECT {counts}, {column} FROM sums GROUP BY {column}"


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over all representations."""

    num_representations: int
    nbytes: dict[Part, int]
    num_segments: int
    num_models: int
    num_tokens: int
    num_hits: int
    saved_seconds: float


@dataclass(frozen=True, slots=True)
class GroupSums:
    """Sums over the representations of one model, or of one namespace."""

    num_representations: int = 0
    nbytes: dict[Part, int] = field(default_factory=lambda: dict.fromkeys(Part, 0))


def sums(path: Path, *, namespace: str | None = None) -> Sums:
    """Return the sums over all representations in the catalog at `path`, or over those of a namespace.

    Raises `CatalogError` if it is unusable.
    """
    [(count, scores, logits, kv, *others)] = _rows(path, _TOTALS, namespace)
    return Sums(count, _nbytes(scores, logits, kv), *others)


def sums_by_model(path: Path) -> dict[WeightsId, GroupSums]:
    """Return the sums of each model that has representations; raises `CatalogError` if the catalog is unusable."""
    return {WeightsId(weights_id): found for weights_id, found in _by(path, "weights_id").items()}


def sums_by_namespace(path: Path) -> dict[str, GroupSums]:
    """Return the sums of each namespace that has representations; raises `CatalogError` if the catalog is unusable."""
    return _by(path, "namespace")


def counts(path: Path) -> dict[str, float]:
    """Return what was counted over all processes, by name; raises `CatalogError` if the catalog is unusable."""
    return dict(_rows(path, "SELECT name, value FROM counts ORDER BY name"))


def events(path: Path, *, limit: int) -> list[tuple[float, str, bytes | None, str]]:
    """Return time, kind, address and detail of the newest events; raises `CatalogError` if it is unusable."""
    return list(_rows(path, "SELECT at, kind, address, detail FROM events ORDER BY id DESC LIMIT ?", limit))


def _by(path: Path, column: str) -> dict[Any, GroupSums]:
    return {
        key: GroupSums(count, _nbytes(scores, logits, kv))
        for count, scores, logits, kv, key in _rows(path, _BY.format(counts=_COUNTS, column=column))
    }


def _nbytes(scores: int, logits: int, kv: int) -> dict[Part, int]:
    return {Part.SCORES: scores, Part.LOGITS: logits, Part.KV: kv}


def _rows(path: Path, query: str, *values: object) -> Sequence[tuple[Any, ...]]:
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=_TIMEOUT_SECONDS)) as connection:
            return connection.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise CatalogError(
            f"the catalog {path} failed: {error}",
            hint="Run `backprompt-db reindex`: it upgrades the catalog, or rebuilds it from the store.",
        ) from error
