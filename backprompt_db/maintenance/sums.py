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

_COUNTS = "count(*), coalesce(sum(scores_nbytes), 0), coalesce(sum(logits_nbytes), 0), coalesce(sum(kv_nbytes), 0)"
_TOTALS = f"""
    SELECT {_COUNTS}, count(DISTINCT segment_id), count(DISTINCT weights_id), coalesce(sum(num_tokens), 0),
        coalesce(sum(num_hits), 0), total(num_hits * compute_seconds)
    FROM representations
"""  # noqa: S608 - constants
_BY_MODEL = f"SELECT {_COUNTS}, weights_id FROM representations GROUP BY weights_id"  # noqa: S608 - constants


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
class ModelSums:
    """Sums over the representations of one model."""

    num_representations: int = 0
    nbytes: dict[Part, int] = field(default_factory=lambda: dict.fromkeys(Part, 0))


def sums(path: Path) -> Sums:
    """Return the sums over all representations in the catalog at `path`; raises `CatalogError` if it is unusable."""
    [(count, scores, logits, kv, *others)] = _rows(path, _TOTALS)
    return Sums(count, _nbytes(scores, logits, kv), *others)


def sums_by_model(path: Path) -> dict[WeightsId, ModelSums]:
    """Return the sums of each model that has representations; raises `CatalogError` if the catalog is unusable."""
    return {
        WeightsId(weights_id): ModelSums(count, _nbytes(scores, logits, kv))
        for count, scores, logits, kv, weights_id in _rows(path, _BY_MODEL)
    }


def _nbytes(scores: int, logits: int, kv: int) -> dict[Part, int]:
    return {Part.SCORES: scores, Part.LOGITS: logits, Part.KV: kv}


def _rows(path: Path, query: str) -> Sequence[tuple[Any, ...]]:
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=_TIMEOUT_SECONDS)) as connection:
            return connection.execute(query).fetchall()
    except sqlite3.Error as error:
        raise CatalogError(
            f"the catalog {path} failed: {error}",
            hint="Run `backprompt-db reindex`: it rebuilds the catalog from the store.",
        ) from error
