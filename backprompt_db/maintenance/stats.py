"""What a database holds, in numbers."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from backprompt_db.errors import CatalogError
from backprompt_db.maintenance.existing import CATALOG, manifest_of, open_store
from backprompt_db.maintenance.sums import sums
from backprompt_db.manifest import Manifest
from backprompt_db.representation import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Sums over a database. What only the catalog knows is None when the catalog cannot be used."""

    directory: Path
    format: int
    fidelity: str
    created_at: str
    """UTC, ISO 8601."""
    num_representations: int
    num_segments: int | None = None
    """Segments that have at least one representation."""
    num_models: int | None = None
    num_tokens: int | None = None
    nbytes: dict[Part, int]
    """Stored bytes of every part, 0 where there are none."""
    file_nbytes: int
    """Bytes of all files in the directory."""
    num_hits: int | None = None
    saved_seconds: float | None = None
    """Hits times what the computation had taken."""
    catalog_problem: str | None = None
    """Why the numbers were counted in the store instead of being read from the catalog; None when they were read."""


def gather(directory: Path) -> Stats:
    """Sum up the database in `directory`; raises `UnsafeLocation` where there is none.

    Without a usable catalog the keys of the store are counted, which takes longer and tells less.
    """
    manifest = manifest_of(directory)
    try:
        return _from_catalog(directory, manifest)
    except CatalogError as error:
        return _from_store(directory, manifest, catalog_problem=error.message)


def _from_catalog(directory: Path, manifest: Manifest) -> Stats:
    total = sums(directory / CATALOG)
    return Stats(
        directory=directory,
        format=manifest.format,
        fidelity=manifest.fidelity,
        created_at=manifest.created_at,
        num_representations=total.num_representations,
        num_segments=total.num_segments,
        num_models=total.num_models,
        num_tokens=total.num_tokens,
        nbytes=total.nbytes,
        file_nbytes=_file_nbytes(directory),
        num_hits=total.num_hits,
        saved_seconds=total.saved_seconds,
    )


def _from_store(directory: Path, manifest: Manifest, *, catalog_problem: str) -> Stats:
    nbytes = Counter(dict.fromkeys(Part, 0))
    num_representations, last = 0, b""
    with contextlib.closing(open_store(directory)) as store:
        for key, size in store.keys():
            nbytes[key.part] += size
            num_representations += key.address != last
            last = key.address
    return Stats(
        directory=directory,
        format=manifest.format,
        fidelity=manifest.fidelity,
        created_at=manifest.created_at,
        num_representations=num_representations,
        nbytes=dict(nbytes),
        file_nbytes=_file_nbytes(directory),
        catalog_problem=catalog_problem,
    )


def _file_nbytes(directory: Path) -> int:
    paths = (Path(folder, name) for folder, _, names in os.walk(directory) for name in names)
    return sum(map(_nbytes, paths))


def _nbytes(path: Path) -> int:
    # A journal may vanish between being listed and being looked at.
    with contextlib.suppress(OSError):
        return path.lstat().st_size
    return 0
