"""The wheel holds all that it needs: installed in an empty environment, it upgrades a catalog with its migrations."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WHAT_A_CATALOG_NEEDS = [
    "alembic",
    "blake3",
    "lmdb",
    "msgspec",
    "numpy",
    "platformdirs",
    "prometheus-client",
    "psutil",
    "rich",
    "safetensors",
    "sqlalchemy",
    "typer",
    "xxhash",
]

UPGRADE = """
import sqlite3, sys
from pathlib import Path
import backprompt_db
from backprompt_db.catalog.catalog import Catalog
assert ".venv-wheel" in backprompt_db.__file__, backprompt_db.__file__
path = Path(sys.argv[1])
Catalog.open(path).close()
print(sqlite3.connect(path).execute("SELECT version_num FROM alembic_version").fetchone()[0])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(directory), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = directory.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_its_migrations_and_its_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"backprompt_db/py.typed", "backprompt_db/migrations/env.py"} <= names
    assert {"backprompt_db/cli/demo/endpoints.json", "backprompt_db/cli/demo/requests.jsonl"} <= names
    for asset in (ROOT / "backprompt_db" / "views" / "page_assets").iterdir():
        assert f"backprompt_db/views/page_assets/{asset.name}" in names
    for migration in (ROOT / "migrations" / "versions").glob("*.py"):
        assert f"backprompt_db/migrations/versions/{migration.name}" in names
    assert not any(name.startswith(("tests", "benchmarks", "migrations")) for name in names)


@pytest.mark.exhaustive
def test_the_installed_wheel_creates_and_upgrades_a_catalog(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / ".venv-wheel"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*install, *WHAT_A_CATALOG_NEEDS], check=True)
    subprocess.run([*install, "--no-deps", str(wheel)], check=True)
    catalog = tmp_path / "catalog.sqlite"
    ran = subprocess.run(
        [str(python), "-I", "-c", UPGRADE, str(catalog)], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    newest = max((ROOT / "migrations" / "versions").glob("*.py")).name.split("_")[0]
    assert ran.stdout.strip() == newest
    program = subprocess.run(
        [str(environment / "bin" / "backprompt-db"), "path"], check=True, capture_output=True, text=True
    )
    assert program.stdout.strip()
