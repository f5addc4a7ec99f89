"""What the catalog remembers of what happened: counts, events, evictions. And what it forgets for good."""

from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from backprompt_db.catalog import events
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import Event
from backprompt_db.errors import CatalogError
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.representation import Part
from tests.support.catalogs import HOSTILE, MODEL, evicted_at, new_catalog, origin_of, stored, texts

PRIVATE = "the launch code is 0000-1234"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    with new_catalog(path) as opened:
        yield opened


class TestCounts:
    def test_they_begin_at_zero_and_add_up(self, catalog: Catalog) -> None:
        assert catalog.counts() == {}
        catalog.count({"misses": 3, "waits": 0})
        catalog.count({"misses": 4, "computed_tokens": 0.5})
        catalog.count({})
        assert catalog.counts() == {"misses": 7.0, "computed_tokens": 0.5}

    @pytest.mark.parametrize("name", HOSTILE)
    def test_a_name_is_a_name(self, catalog: Catalog, name: str) -> None:
        catalog.count({name: 1})
        assert catalog.counts() == {name: 1.0}

    def test_a_number_that_is_none_is_left_out(self, catalog: Catalog) -> None:
        catalog.count({"misses": float("nan"), "waits": float("inf"), "disk_hits": 1})
        assert catalog.counts() == {"disk_hits": 1.0}

    def test_many_processes_that_count_at_once_add_up_exactly(self, catalog: Catalog, path: Path) -> None:
        script = (
            "import sys; from pathlib import Path; from backprompt_db.catalog.catalog import Catalog\n"
            f"with Catalog.open(Path({str(path)!r})) as catalog:\n"
            "    print(flush=True); input()\n"
            "    for number in range(40): catalog.count({'misses': 1, 'computed_tokens': number, sys.argv[1]: 2})"
        )
        names = [f"own {number}" for number in range(5)]
        children = [
            subprocess.Popen([sys.executable, "-c", script, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for name in names
        ]
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        for child in children:
            assert child.stdin is not None
            child.stdin.write(b"\n")
            child.stdin.flush()
        for child in children:
            child.communicate(timeout=300)
        assert [child.returncode for child in children] == [0] * 5
        own = dict.fromkeys(names, 80.0)
        assert catalog.counts() == {"misses": 200.0, "computed_tokens": 5.0 * sum(range(40)), **own}


def event(number: int, *, address: Address | None = None, detail: str = "detail") -> Event:
    return Event(float(number), f"kind {number}", address, detail)


class TestEvents:
    def test_the_newest_come_first(self, catalog: Catalog) -> None:
        catalog.log([event(1), event(2, address=Address(b"a" * 32))])
        catalog.log([event(0)])
        catalog.log([])
        assert catalog.events() == [event(0), event(2, address=Address(b"a" * 32)), event(1)]
        assert catalog.events(limit=1) == [event(0)]

    def test_the_newest_thousand_are_kept(self, catalog: Catalog) -> None:
        for begin in range(0, 1500, 300):
            catalog.log([event(number) for number in range(begin, begin + 300)])
        assert [kept.at for kept in catalog.events(limit=9999)] == [float(number) for number in range(1499, 499, -1)]
        catalog.log([event(number) for number in range(2000, 3500)])
        assert [kept.at for kept in catalog.events(limit=9999)] == [float(number) for number in range(3499, 2499, -1)]

    @pytest.mark.parametrize("detail", HOSTILE)
    def test_a_detail_may_be_anything(self, catalog: Catalog, detail: str) -> None:
        catalog.log([event(1, detail=detail)])
        assert catalog.events() == [event(1, detail=detail)]

    def test_a_file_name_that_is_no_text_is_shown_with_escapes(self, catalog: Catalog) -> None:
        catalog.log([event(1, detail="cannot read /tmp/\udcff")])
        assert catalog.events() == [event(1, detail="cannot read /tmp/\\udcff")]

    def test_erasing_takes_the_events_of_an_address_too(self, catalog: Catalog) -> None:
        gone, kept = Address(b"a" * 32), Address(b"b" * 32)
        catalog.log([event(1, address=gone), event(2, address=kept), event(3)])
        catalog.erase([(gone, Part.KV)])
        assert [found.at for found in catalog.events()] == [3.0, 2.0]


class TestEvictions:
    def test_the_newest_are_kept(self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(events, "MAX_EVICTIONS", 20)
        addresses = [Address(bytes([number]) * 32) for number in range(60)]
        catalog.evict([(address, Part.KV) for address in addresses[:10]], at=2.0)
        catalog.evict([(address, Part.KV) for address in addresses[10:25]], at=1.0)
        assert [evicted_at(catalog, address) for address in addresses[:10]] == [2.0] * 10
        assert [evicted_at(catalog, address) for address in addresses[10:25]].count(1.0) == 10

    def test_equal_times_do_not_keep_more(self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(events, "MAX_EVICTIONS", 20)
        addresses = [Address(bytes([number]) * 32) for number in range(60)]
        catalog.evict([(address, Part.KV) for address in addresses], at=1.0)
        assert [evicted_at(catalog, address) for address in addresses].count(1.0) == 20

    def test_the_last_one_of_an_address_counts(self, catalog: Catalog) -> None:
        address = Address(b"a" * 32)
        for at in (5.0, 3.0):
            catalog.evict([(address, Part.SCORES), (address, Part.KV)], at=at)
        assert evicted_at(catalog, address) == 3.0


def holds(directory: Path, string: str) -> bool:
    """Whether the string's bytes are in any file."""
    return any(string.encode() in path.read_bytes() for path in directory.iterdir() if path.is_file())


class TestForgettingForGood:
    """Bytes that were deleted are in no file any more."""

    @pytest.fixture
    def private(self, catalog: Catalog) -> list[tuple[Address, Part]]:
        """Texts, short and over many pages, a label and an event, among others."""
        parts = [stored(origin_of(f"{PRIVATE} {number} " * (1 if number % 2 else 900))) for number in range(40)]
        others = [stored(origin_of(f"harmless {number}")) for number in range(400)]
        catalog.record([*parts[:20], *others, *parts[20:]], at=1.0)
        keys = [(part.address, part.part) for part in parts]
        catalog.label([address for address, _ in keys], PRIVATE)
        catalog.log([event(1, address=keys[0][0], detail=PRIVATE)])
        return keys

    def test_what_was_erased(self, catalog: Catalog, path: Path, private: list[tuple[Address, Part]]) -> None:
        assert holds(path.parent, PRIVATE)
        catalog.erase(private)
        assert not holds(path.parent, PRIVATE)
        catalog.vacuum()
        assert not holds(path.parent, PRIVATE)
        assert len(catalog.rows()) == 400

    def test_what_others_deleted_without_care(
        self, catalog: Catalog, path: Path, private: list[tuple[Address, Part]]
    ) -> None:
        with closing(sqlite3.connect(path)) as careless, careless:
            careless.execute("PRAGMA secure_delete = OFF")
            for table in ("parents", "representations", "segments", "events"):
                careless.execute(f"DELETE FROM {table}")  # noqa: S608 - constants
        assert holds(path.parent, PRIVATE)
        catalog.vacuum()
        assert not holds(path.parent, PRIVATE)

    def test_the_file_gets_smaller_and_rows_keep_their_order(
        self, catalog: Catalog, path: Path, private: list[tuple[Address, Part]]
    ) -> None:
        catalog.erase(private)
        before, size = catalog.rows(), path.stat().st_size
        catalog.vacuum()
        assert path.stat().st_size < size / 2
        assert catalog.rows() == before
        catalog.record([stored(origin_of("last"))], at=1.0)
        assert texts(catalog.rows(limit=2)) == ["last", before[0].text]

    def test_a_catalog_that_may_only_be_read_is_not_rewritten(self, catalog: Catalog, path: Path) -> None:
        before = path.read_bytes()
        with Catalog.open(path, readonly=True) as readonly, pytest.raises(CatalogError):
            readonly.vacuum()
        assert path.read_bytes() == before


def test_what_is_saved_about_models_can_be_signed(catalog: Catalog) -> None:
    signed = dataclasses.replace(MODEL, signature=b"s" * 16)
    catalog.save(signed)
    assert catalog.model(MODEL.weights_id) == signed
