"""Searching the stored texts, with an index and without one: what is found is the same."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from hypothesis import given
from hypothesis import strategies as st

from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import Order, Selection
from backprompt_db.catalog.search import folded, occurrences
from backprompt_db.errors import CatalogError, InvalidText
from backprompt_db.prompt.representation import Part
from tests.support.catalogs import HOSTILE, OTHER_WEIGHTS, new_catalog, origin_of, stored, texts

MIGRATIONS = Path(__file__).parents[2] / "migrations"
LETTERS = "abAB \u0130i\u03a3\u03c3\u03c2\u00df\u1e9e\u017f\u212a\"'\0\U0001f344"
"""Letters that are one, none or several when their case changes, and what means something to FTS5."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    with new_catalog(path) as opened:
        yield opened


def record(catalog: Catalog, *strings: str) -> None:
    catalog.record([stored(origin_of(string)) for string in strings], at=1.0)


def index(catalog: Catalog) -> None:
    assert list(catalog.index_texts())[-1] == 0


def found(catalog: Catalog, string: str) -> list[str]:
    """The texts that contain a string; they are the same ones wherever they are looked for."""
    selection = Selection(text_matches=string)
    rows = sorted(texts(catalog.rows(selection=selection)))
    assert sorted(texts(catalog.select(selection))) == rows
    return rows


def in_files(path: Path, string: bytes) -> bool:
    return any(string in file.read_bytes() for file in path.parent.iterdir())


def query(path: Path, statement: str) -> list[object]:
    with closing(sqlite3.connect(path)) as file, file:
        return [row[0] for row in file.execute(statement)]


class TestFolding:
    @given(before=st.text(LETTERS) | st.text(), after=st.text(LETTERS) | st.text())
    def test_it_goes_character_by_character(self, before: str, after: str) -> None:
        assert folded(before + after) == folded(before) + folded(after)
        assert len(folded(before)) == len(before)

    @given(before=st.text(), inside=st.text(LETTERS, min_size=1), after=st.text())
    def test_what_is_in_a_text_is_found_in_it(self, before: str, inside: str, after: str) -> None:
        text = before + inside + after
        places = {text[begin:end] for begin, end in occurrences(text, folded(inside))}
        assert {folded(place) for place in places} == {folded(inside)}

    def test_places_do_not_overlap_and_an_empty_string_has_none(self) -> None:
        assert list(occurrences("AAaaa", "aa")) == [(0, 2), (2, 4)]
        assert list(occurrences("text", "")) == []


@pytest.fixture(params=["without an index", "with an index", "with half an index"])
def filled(request: pytest.FixtureRequest, catalog: Catalog) -> Callable[..., Catalog]:
    """Enter texts, all or some of them in the index."""

    def fill(*strings: str) -> Catalog:
        record(catalog, *strings[::2])
        if request.param != "without an index":
            index(catalog)
        record(catalog, *strings[1::2])
        if request.param == "with an index":
            index(catalog)
        return catalog

    return fill


class TestWhatIsFound:
    def test_parts_of_words_in_any_case(self, filled: Callable[..., Catalog]) -> None:
        catalog = filled("GET /endpoints", "no such thing", "ENDPOINT", "the end", "Point of view")
        assert found(catalog, "endpoint") == ["ENDPOINT", "GET /endpoints"]
        assert found(catalog, "DPOI") == ["ENDPOINT", "GET /endpoints"]
        assert found(catalog, " OF ") == ["Point of view"]
        assert found(catalog, "endpoints of") == []

    def test_one_or_two_characters(self, filled: Callable[..., Catalog]) -> None:
        catalog = filled("a", "B", "ab", "c")
        assert found(catalog, "A") == ["a", "ab"]
        assert found(catalog, "AB") == ["ab"]

    @pytest.mark.parametrize("hostile", HOSTILE)
    def test_it_is_a_text_and_no_pattern(self, filled: Callable[..., Catalog], hostile: str) -> None:
        inside = [hostile, f"before {hostile}", f"{hostile} after", f"\0{hostile}\0"]
        catalog = filled(*inside, "anything else", hostile[:-1], '"', "OR")
        assert found(catalog, hostile) == found(catalog, hostile.upper()) == sorted(inside)

    def test_a_string_of_thousands_of_characters(self, filled: Callable[..., Catalog]) -> None:
        long = "".join(f"{number} and " for number in range(2000))
        catalog = filled(f"so {long}", long[1:], "1 and 2")
        assert found(catalog, long.upper()) == [f"so {long}"]

    def test_every_text_contains_the_empty_one(self, filled: Callable[..., Catalog]) -> None:
        assert found(filled("a", "b"), "") == ["a", "b"]

    def test_a_lone_surrogate_is_refused(self, catalog: Catalog) -> None:
        with pytest.raises(InvalidText):
            catalog.select(Selection(text_matches="\udcff"))

    @given(
        strings=st.lists(st.text(LETTERS, min_size=1, max_size=9), max_size=9, unique=True),
        wanted=st.text(LETTERS, min_size=1, max_size=5),
        num_indexed=st.integers(0, 9),
    )
    def test_an_index_changes_nothing(self, path: Path, strings: list[str], wanted: str, num_indexed: int) -> None:
        expected = sorted(string for string in strings if folded(wanted) in folded(string))
        with new_catalog(path) as catalog:
            record(catalog, *strings[:num_indexed])
            assert found(catalog, wanted) == sorted(set(strings[:num_indexed]) & set(expected))
            index(catalog)
            record(catalog, *strings[num_indexed:])
            assert found(catalog, wanted) == expected
            index(catalog)
            assert found(catalog, wanted) == expected

    def test_it_goes_together_with_all_else(self, catalog: Catalog) -> None:
        context, other = origin_of("A context"), origin_of("another CONTEXT", weights_id=OTHER_WEIGHTS)
        catalog.record([stored(each) for each in (context, other, origin_of("in context", context))], at=1.0)
        catalog.label([other.address], "kept")
        assert found(catalog, "context") == ["A context", "another CONTEXT", "in context"]
        assert texts(catalog.select(Selection(text_matches="CONTEXT", label="kept"))) == ["another CONTEXT"]
        assert sorted(texts(catalog.rows(selection=Selection(text_matches="context", text_prefix="A c")))) == [
            "A context", "in context",
        ]  # fmt: skip
        assert texts(catalog.select(Selection(text_matches="context", text_contains="in "))) == ["in context"]


class TestTheIndex:
    def test_recording_marks_what_is_new_and_no_more(self, catalog: Catalog, path: Path) -> None:
        record(catalog, "first")
        index(catalog)
        before = query(path, "SELECT count(*) FROM search_data"), query(path, "SELECT number FROM searchable")
        record(catalog, "second", "third")
        assert (query(path, "SELECT count(*) FROM search_data"), query(path, "SELECT number FROM searchable")) == before
        assert list(catalog.index_texts()) == [2, 0]

    def test_who_gives_up_goes_on_where_it_was(self, catalog: Catalog) -> None:
        record(catalog, *(f"text number {number}" for number in range(1200)))
        assert list(itertools.islice(catalog.index_texts(), 2)) == [1200, 700]
        assert catalog.has_index()
        assert found(catalog, "NUMBER 119") == sorted(["text number 119", *(f"text number 119{n}" for n in range(10))])
        assert next(catalog.index_texts()) == 700

    def test_nobody_makes_one_unasked(self, catalog: Catalog) -> None:
        record(catalog, "first")
        found(catalog, "first")
        assert not catalog.has_index()

    def test_texts_that_are_gone_are_not_found_and_those_that_come_back_are(self, catalog: Catalog) -> None:
        record(catalog, "first text", "second text")
        index(catalog)
        catalog.forget([(origin_of("first text").address, Part.KV)])
        assert found(catalog, "text") == ["second text"]
        record(catalog, "first text")
        assert found(catalog, "text") == ["first text", "second text"]

    def test_texts_may_go_and_come_back_before_they_are_in_it(self, catalog: Catalog) -> None:
        index(catalog)
        record(catalog, "first text", "second text")
        catalog.forget([(origin_of("first text").address, Part.KV)])
        assert found(catalog, "text") == ["second text"]
        index(catalog)
        record(catalog, "first text")
        index(catalog)
        catalog.forget([(origin_of("first text").address, Part.KV)])
        record(catalog, "first text")
        index(catalog)
        assert found(catalog, "text") == ["first text", "second text"]

    def test_who_may_only_read_searches_with_it_and_without(self, catalog: Catalog, path: Path) -> None:
        record(catalog, "first text")
        with Catalog.open(path, readonly=True) as readonly:
            assert found(readonly, "TEXT") == ["first text"]
            with pytest.raises(CatalogError, match="readonly"):
                next(readonly.index_texts())
            index(catalog)
            record(catalog, "second text")
            assert found(readonly, "TEXT") == ["first text", "second text"]

    def test_nothing_of_what_was_erased_stays_in_it(self, catalog: Catalog, path: Path) -> None:
        record(catalog, *(f"harmless {number}" for number in range(300)), "a QZXJV secret")
        index(catalog)
        assert in_files(path, b"qzx")
        catalog.erase([(origin_of("a QZXJV secret").address, Part.KV)])
        assert not in_files(path, b"qzx")
        assert not in_files(path, b"QZX")
        assert len(found(catalog, "harmless")) == 300
        assert next(catalog.index_texts()) == 300

    def test_nothing_of_what_was_forgotten_stays_when_the_file_is_rewritten(self, catalog: Catalog, path: Path) -> None:
        record(catalog, "harmless", "a QZXJV secret")
        index(catalog)
        catalog.vacuum()
        assert next(catalog.index_texts()) == 0
        catalog.forget([(origin_of("a QZXJV secret").address, Part.KV)])
        catalog.vacuum()
        assert not in_files(path, b"qzx")
        assert found(catalog, "HARM") == ["harmless"]

    def test_where_none_can_be_made_that_is_said(self, catalog: Catalog, path: Path) -> None:
        query(path, "CREATE TABLE searchable (mine)")
        with pytest.raises(CatalogError, match="can make no index") as caught:
            next(catalog.index_texts())
        assert "without" in caught.value.hint

    def test_it_goes_when_the_revision_is_taken_back(self, catalog: Catalog, path: Path) -> None:
        record(catalog, "first text")
        index(catalog)
        config = Config(MIGRATIONS / "alembic.ini")
        config.set_main_option("sqlalchemy.url", f"sqlite:///{path}".replace("%", "%%"))
        command.downgrade(config, "0002")
        assert query(path, "SELECT name FROM sqlite_master WHERE name LIKE 'search%'") == []
        with Catalog.open(path) as upgraded:
            assert found(upgraded, "TEXT") == ["first text"]


class TestOrder:
    @pytest.fixture
    def three(self, catalog: Catalog) -> Catalog:
        small, large = origin_of("small", compute_seconds=0.3), origin_of("large", compute_seconds=0.1)
        middle = origin_of("middle", compute_seconds=0.2)
        catalog.record(
            [stored(small, Part.SCORES, 1), stored(large, Part.KV, 9), stored(large, Part.LOGITS, 9)], at=1.0
        )
        catalog.record([stored(middle, Part.KV, 10)], at=2.0)
        catalog.touch({small.address: 2, middle.address: 5}, at=0.0)
        catalog.touch({large.address: 3}, at=9.0)
        return catalog

    @pytest.mark.parametrize(
        ("order", "expected"),
        [
            (Order.NEWEST, ["middle", "large", "small"]),
            (Order.OLDEST, ["small", "large", "middle"]),
            (Order.SIZE, ["large", "middle", "small"]),
            (Order.HITS, ["middle", "large", "small"]),
            (Order.USED, ["large", "middle", "small"]),
            (Order.SECONDS, ["small", "middle", "large"]),
        ],
    )
    def test_what_there_is_most_of_comes_first(self, three: Catalog, order: Order, expected: list[str]) -> None:
        assert texts(three.rows(order=order)) == expected
        assert texts(three.rows(order=order, limit=2)) == expected[:2]

    def test_the_newest_of_equals_comes_first(self, catalog: Catalog) -> None:
        record(catalog, "a", "b", "c")
        assert texts(catalog.rows(order=Order.HITS)) == ["c", "b", "a"]

    def test_sizes_are_those_of_all_parts(self, three: Catalog) -> None:
        assert sorted(texts(three.select(Selection(larger_than=9)))) == ["large", "middle"]
        assert texts(three.rows(selection=Selection(larger_than=10))) == ["large"]
        assert texts(three.rows(selection=Selection(smaller_than=18, larger_than=1))) == ["middle"]
        assert texts(three.rows(selection=Selection(smaller_than=1))) == []
