"""`ls --grep`: which texts contain something, and where; by size, age and in any order."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import backprompt_db as bp
from backprompt_db.cli.ls import excerpt, places
from backprompt_db.operations.reindex import keep_up_index
from tests.support.cli import CONTROL, LONG, SQL, run, run_json, run_prompts
from tests.support.database_files import copies_after
from tests.support.databases import new_part

original, directory = copies_after(run_prompts)


def found(directory: Path, *options: str | Path) -> list[str]:
    return [row["text"] for row in run_json("ls", "--db", directory, *options)]


def num_indexed(directory: Path) -> int:
    with closing(sqlite3.connect(directory / "catalog.sqlite")) as file:
        return int(file.execute("SELECT count(*) FROM searchable").fetchone()[0])


class TestGrep:
    def test_the_json_says_where(self, directory: Path) -> None:
        [context, request] = run_json("ls", "--db", directory, "--grep", "REQUEST")[::-1]
        assert [context["text"][begin:end] for begin, end in context["matches"]] == ["request"]
        assert request["matches"] == [[0, 7]]

    def test_people_see_what_lies_around_it(self, directory: Path) -> None:
        lines = run("ls", "--db", directory, "--grep", "LAZY dog. the", columns=160).stdout.splitlines()
        assert len(lines) == 2
        assert "…ver the lazy dog. The quick" in lines[1]

    @pytest.mark.parametrize("columns", [30, 80, 200])
    def test_lines_are_as_wide_as_the_terminal_at_most(self, directory: Path, columns: int) -> None:
        lines = run("ls", "--db", directory, "--grep", "e", columns=columns).stdout.splitlines()
        assert len(lines) == 6
        assert max(map(len, lines)) <= columns

    def test_nothing_that_a_terminal_obeys_is_printed(self, directory: Path) -> None:
        text = run("ls", "--db", directory, "--grep", "\x1b[31mRED\x07", columns=200).stdout
        assert all(character.isprintable() for character in text.replace("\n", ""))
        assert r"a\x1b[31mred\x07 [bold]b" in text

    def test_it_is_a_text_and_no_pattern(self, directory: Path) -> None:
        assert found(directory, "--grep", SQL.upper()) == [SQL]
        assert found(directory, "--grep", "%") == found(directory, "--grep", "_") == [SQL]
        assert found(directory, "--grep", "[BOLD]") == [CONTROL]

    def test_what_is_nowhere_is_no_error(self, directory: Path) -> None:
        assert found(directory, "--grep", "nowhere") == []
        assert run("ls", "--db", directory, "--grep", "nowhere").stdout == "Nothing matches all options.\n"

    def test_it_goes_together_with_models_and_limits(self, directory: Path) -> None:
        everything = found(directory, "--grep", "e")
        assert found(directory, "--grep", "e", "--limit", "2") == everything[:2]
        assert found(directory, "--grep", "e", "--model", (b"w" * 4).hex()) == [LONG]
        assert found(directory, "--grep", "e", "--namespace", "nobody") == []


class TestExcerpts:
    def test_every_place_is_in_colour(self) -> None:
        shown = excerpt("Buy or buy, but do not BUY", "buy")
        assert shown.plain == "Buy or buy, but do not BUY"
        assert [(span.start, span.end) for span in shown.spans] == places(shown.plain, "buy")

    def test_a_long_text_is_shown_around_the_first_place(self) -> None:
        shown = excerpt("before " * 90 + "NEEDLE" + " after" * 90, "needle").plain
        assert shown.startswith("…")
        assert shown.endswith("…")
        assert shown.index("NEEDLE") < 10
        assert len(shown) < 230

    def test_a_place_that_is_longer_than_an_excerpt_is_shown_whole(self) -> None:
        assert excerpt("a" * 500 + "b", "A" * 500).plain == "a" * 500 + "…"

    def test_escapes_do_not_move_the_colour(self) -> None:
        shown = excerpt("\n\nneedle", "needle")
        assert [shown.plain[span.start : span.end] for span in shown.spans] == ["needle"]


class TestTheIndex:
    def test_it_is_made_on_request_and_kept_up(self, directory: Path, open_db: Callable[..., bp.Database]) -> None:
        before = {pattern: found(directory, "--grep", pattern) for pattern in ("request", "the", "%", "nowhere")}
        assert {pattern: found(directory, "--grep", pattern, "--index") for pattern in before} == before
        assert num_indexed(directory) == 5
        with open_db(directory) as db:
            db.put([new_part("another request")])
        assert num_indexed(directory) == 5
        assert found(directory, "--grep", "request") == ["another request", *before["request"]]
        assert num_indexed(directory) == 6

    def test_who_may_not_write_searches_all_the_same(
        self, directory: Path, open_db: Callable[..., bp.Database], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run("ls", "--db", directory, "--index")
        with open_db(directory) as db:
            db.put([new_part("another request")])
        writer = sqlite3.connect(directory / "catalog.sqlite", isolation_level=None)
        monkeypatch.setattr("backprompt_db.system.locks.PATIENCE_SECONDS", 0.05)
        writer.execute("BEGIN IMMEDIATE")  # as root, a test may write to everything; but not while another does
        try:
            assert "another request" in found(directory, "--grep", "REQUEST")
        finally:
            writer.close()
        assert num_indexed(directory) == 5

    def test_asking_for_one_where_none_can_be_made_is_an_error(self, directory: Path) -> None:
        with closing(sqlite3.connect(directory / "catalog.sqlite")) as file:
            file.execute("CREATE TABLE searchable (mine)")
        result = run("ls", "--db", directory, "--index")
        assert result.exit_code == 2
        assert "can make no index" in result.stderr

    def test_none_is_made_in_a_directory_without_a_catalog(self, directory: Path) -> None:
        (directory / "catalog.sqlite").unlink()
        assert run("ls", "--db", directory, "--index").exit_code == 2
        keep_up_index(directory)
        assert not (directory / "catalog.sqlite").exists()

    def test_nothing_of_what_was_purged_stays_in_it(self, directory: Path, open_db: Callable[..., bp.Database]) -> None:
        with open_db(directory) as db:
            db.put([new_part("a 7QZXJV secret")])
        run("ls", "--db", directory, "--index")
        assert b"7qz" in (directory / "catalog.sqlite").read_bytes()
        assert run("purge", "--db", directory, "--contains", "7QZXJV", "--yes").exit_code == 0
        for secret in (b"7qz", b"7QZ"):
            assert not [path for path in directory.rglob("*") if path.is_file() and secret in path.read_bytes()]
        assert found(directory, "--grep", "7qz") == []
        assert len(found(directory, "--grep", "e")) == 5


class TestSelectingAndSorting:
    def test_sizes(self, directory: Path) -> None:
        sizes = {row["text"]: sum(row["nbytes"].values()) for row in run_json("ls", "--db", directory)}
        median = sorted(sizes.values())[2]
        larger = found(directory, "--larger-than", str(median))
        assert set(larger) == {text for text, nbytes in sizes.items() if nbytes > median}
        assert set(found(directory, "--smaller-than", f"{median}B")) == {t for t, n in sizes.items() if n < median}
        assert found(directory, "--larger-than", "1GB") == []

    def test_other_commands_select_by_size_too(self, directory: Path, tmp_path: Path) -> None:
        largest = run_json("ls", "--db", directory, "--sort", "size")[0]
        least = str(sum(largest["nbytes"].values()) - 1)
        out = tmp_path / "out.bundle"
        assert run_json("export", out, "--db", directory, "--larger-than", least)["num_representations"] == 1
        assert run("purge", "--db", directory, "--larger-than", least, "--yes").exit_code == 0
        assert largest["text"] not in found(directory)

    def test_ages(self, directory: Path) -> None:
        assert found(directory, "--older-than", "1h") == []
        assert found(directory, "--used-within", "1h") == found(directory)

    @pytest.mark.parametrize("option", [["--larger-than", "big"], ["--sort", "worst"], ["--older-than", "1"]])
    def test_what_is_no_size_or_order_is_refused(self, directory: Path, option: list[str]) -> None:
        assert run("ls", "--db", directory, *option).exit_code == 2

    @pytest.mark.parametrize(
        ("sort", "key"),
        [
            ("newest", lambda row: row["created_at"]),
            ("size", lambda row: sum(row["nbytes"].values())),
            ("hits", lambda row: row["num_hits"]),
            ("used", lambda row: row["last_used_at"] or row["created_at"]),
            ("seconds", lambda row: row["compute_seconds"]),
        ],
    )
    def test_what_there_is_most_of_comes_first(self, directory: Path, sort: str, key: Callable[[Any], float]) -> None:
        rows = run_json("ls", "--db", directory, "--sort", sort)
        assert [key(row) for row in rows] == sorted(map(key, rows), reverse=True)
        assert len(rows) == 5
