"""Copies of a database that prompts were run on, for tests to damage."""

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
