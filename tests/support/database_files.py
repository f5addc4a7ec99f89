"""Files of a database: copies for tests to damage, and what must stay as it is in one that is only read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import backprompt_db as bp


def copies_after(run_prompts: Callable[[bp.LanguageModel], None]) -> tuple[object, object]:
    """The fixtures `original` and `directory` of a module: what `run_prompts` leaves, and a copy for each test."""

    @pytest.fixture(scope="module")
    def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Where the first test that needs it puts the database that each test gets a copy of."""
        return tmp_path_factory.mktemp("original") / "db"

    @pytest.fixture
    def directory(original: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
        """The directory of a closed database that a test may damage."""
        if not original.exists():
            lm = request.getfixturevalue("lm")
            run_prompts(lm)
            lm.db.close()
            lm.db.directory.rename(original)
        return Path(shutil.copytree(original, tmp_path / "copy"))

    return original, directory


def snapshot(place: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file, but of the lock that readers take too."""
    files = [path for path in place.rglob("*") if path.is_file() and path.name != "lock.mdb"]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
