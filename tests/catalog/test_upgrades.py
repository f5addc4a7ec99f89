"""Catalogs of older revisions: what is in them stays, and what they lack is filled in."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config

from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import Selection, TokenizerRecord
from backprompt_db.catalog.schema_check import HEAD
from backprompt_db.errors import CatalogError
from backprompt_db.prompt.representation import Part
from tests.support.catalogs import MODEL, OTHER_WEIGHTS, TOKENIZER, origin_of, stored

MIGRATIONS = Path(__file__).parents[2] / "migrations"
OLDER = [f"{number:04}" for number in range(1, int(HEAD))]
"""All revisions but the newest."""


def fill(catalog: Catalog) -> None:
    """Enter two models, two namespaces, parallel branches, parts of all kinds, hits, a pin and a label."""
    context, tenant = origin_of("context"), origin_of("tenant's", namespace="tenant")
    branches = [origin_of("left", context), origin_of("right", context)]
    origins = [context, *branches, origin_of("question", *branches), tenant]
    origins.append(origin_of("other", context, weights_id=OTHER_WEIGHTS))
    catalog.save(MODEL)
    catalog.save(TokenizerRecord(TOKENIZER, "gpt2", "GPT2Tokenizer", 50257))
    catalog.record([stored(origin, part, 10) for origin in origins for part in (Part.SCORES, Part.KV)], at=1.0)
    catalog.record([stored(origin_of("after", tenant, namespace="tenant"), Part.LOGITS, 30)], at=2.0)
    catalog.touch({origin.address: 3 for origin in origins[:2]}, at=3.0)
    catalog.pin([context.address])
    catalog.label([tenant.address], "kept")


def everything(catalog: Catalog) -> list[object]:
    """All that a catalog says of what is stored, and of what may go, round by round."""
    found: list[object] = [catalog.rows(), catalog.models(), catalog.tokenizers()]
    found += [catalog.totals_by_model()]
    found += [catalog.totals(namespace=name) for name in (None, "", "tenant")]
    while candidates := catalog.eviction_order(2**62, at=9.0, grace_seconds=0.0):
        found.append(candidates)
        catalog.evict([candidate[:2] for candidate in candidates], at=9.0)
    return [*found, catalog.rows(), catalog.totals()]


def query(path: Path, statement: str) -> list[object]:
    with closing(sqlite3.connect(path)) as file, file:
        return [row[0] for row in file.execute(statement)]


@pytest.fixture
def current(tmp_path: Path) -> Path:
    with Catalog.open(tmp_path / "current.sqlite") as catalog:
        fill(catalog)
    return tmp_path / "current.sqlite"


def as_of(revision: str, current: Path) -> Path:
    """Copy a catalog as an older revision would have it."""
    path = Path(shutil.copy(current, current.with_name(f"{revision}.sqlite")))
    config = Config(MIGRATIONS / "alembic.ini")
    config.set_main_option("sqlalchemy.url", f"sqlite:///{path}".replace("%", "%%"))
    command.downgrade(config, revision)
    assert query(path, "SELECT version_num FROM alembic_version") == [revision]
    return path


@pytest.fixture
def first(current: Path) -> Path:
    path = as_of("0001", current)
    assert "sums" not in query(path, "SELECT name FROM sqlite_master")
    return path


@pytest.mark.parametrize("revision", OLDER)
def test_an_upgraded_catalog_is_like_one_that_was_always_current(current: Path, revision: str) -> None:
    with Catalog.open(current) as expected, Catalog.open(as_of(revision, current)) as upgraded:
        rows = {row.text: row for row in upgraded.rows()}
        assert [row.text for row in upgraded.rows(selection=Selection(text_matches="CONT"))] == ["context"]
        assert everything(upgraded) == everything(expected)
    assert (rows["context"].is_pinned, rows["context"].num_hits, rows["tenant's"].label) == (True, 3, "kept")
    assert rows["after"].namespace == "tenant"


@pytest.mark.parametrize("revision", OLDER)
def test_an_upgraded_catalog_sums_what_may_follow(current: Path, revision: str) -> None:
    with Catalog.open(as_of(revision, current)) as upgraded:
        before = upgraded.totals()
        upgraded.record([stored(origin_of("context"), Part.CONTINUATIONS, nbytes) for nbytes in (40, 90)], at=5.0)
        assert upgraded.totals().nbytes == before.nbytes | {Part.CONTINUATIONS: 90}
        upgraded.forget([(origin_of("context").address, Part.CONTINUATIONS)])
        assert upgraded.totals() == before


def test_an_upgrade_that_fails_changes_nothing(current: Path, first: Path) -> None:
    query(first, "CREATE TABLE sums (mine)")
    schema = query(first, "SELECT sql FROM sqlite_master ORDER BY sql")
    with pytest.raises(CatalogError, match="sums already exists"):
        Catalog.open(first)
    assert query(first, "SELECT sql FROM sqlite_master ORDER BY sql") == schema
    assert query(first, "SELECT version_num FROM alembic_version") == ["0001"]
    query(first, "DROP TABLE sums")
    with Catalog.open(first) as upgraded, Catalog.open(current) as expected:
        assert upgraded.rows() == expected.rows()


def test_nothing_is_upgraded_for_reading_only(first: Path) -> None:
    before = first.read_bytes()
    with pytest.raises(CatalogError, match="older schema"):
        Catalog.open(first, readonly=True)
    assert first.read_bytes() == before


@pytest.mark.parametrize("name", ["first", "missing"])
def test_six_processes_may_create_or_upgrade_it_at_once(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "missing.sqlite" if name == "missing" else request.getfixturevalue(name)
    script = (
        "from pathlib import Path; from backprompt_db.catalog.catalog import Catalog; print(flush=True); input()\n"
        f"with Catalog.open(Path({str(path)!r})) as catalog: print(catalog.totals())"
    )
    outputs = at_once([sys.executable, "-c", script], number=6)
    with Catalog.open(path) as catalog:
        assert outputs == [f"\n{catalog.totals()}\n".encode()] * 6


def at_once(command: list[str], *, number: int) -> list[bytes]:
    """Run a command several times, each of which waits until all have begun, and return what they print."""
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(number)]
    begun = []
    for child in children:
        assert child.stdout is not None
        begun.append(child.stdout.read(1))
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
    return [first + child.communicate(timeout=300)[0] for first, child in zip(begun, children, strict=True)]
