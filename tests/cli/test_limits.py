"""`init`, `config`, `evict`, `compact`, `pin` and `label`, as people and programs use them."""

from __future__ import annotations

import grp
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import backprompt_db as bp
from backprompt_db.database.config import Config, read_config
from backprompt_db.database.manifest import read_manifest
from backprompt_db.errors import StoreError, StoreFull
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.representation import OWN_PARTS
from backprompt_db.store.contract import Key
from tests.support.cli import run, run_json
from tests.support.faults import dangling, keys_of, prompt, put_prompts
from tests.support.limits import assert_whole, live, make_limited, open_limited, stored

assert sys.platform != "win32"

GROUP = grp.getgrgid(os.getegid()).gr_name
MODES = {
    "private": (0o700, 0o600, 0o600),
    "group": (0o2770, 0o660, 0o660),
    "readers": (0o2750, 0o640, 0o660),
    f"group:{GROUP}": (0o2770, 0o660, 0o660),
    f"readers:{os.getegid()}": (0o2750, 0o640, 0o660),
}


def modes(place: Path) -> tuple[int, int, int]:
    names = ("", "manifest.json", "store/lock.mdb")
    directory, file, lock = ((place / name).stat().st_mode & 0o7777 for name in names)
    return directory, file, lock


class TestInit:
    @pytest.mark.parametrize("shared", MODES)
    def test_makes_a_database_for_those_who_shall_share_it(self, tmp_path: Path, shared: str) -> None:
        before = os.umask(0o077)
        try:
            result = run("init", tmp_path / "db", "--shared", shared)
        finally:
            os.umask(before)
        assert result.exit_code == 0, result.output
        assert f"Made {tmp_path / 'db'}: {shared.partition(':')[0]}." in result.stdout
        assert modes(tmp_path / "db") == MODES[shared]
        with bp.open(tmp_path / "db") as db:
            put_prompts(db, [0])
            assert_whole(db, prompt(0))
        assert (tmp_path / "db" / "catalog.sqlite").stat().st_mode & 0o777 == MODES[shared][1]

    def test_takes_limits_and_fidelity(self, tmp_path: Path) -> None:
        options = ("--max-size", "5GB", "--ttl", "30d", "--fidelity", "int8")
        assert run("init", tmp_path / "db", *options).exit_code == 0
        found = read_config(tmp_path / "db")
        assert (found.max_nbytes, found.ttl_seconds) == (5 * 10**9, 30 * 86400.0)
        manifest = read_manifest(tmp_path / "db")
        assert manifest is not None
        assert manifest.fidelity == "int8"

    def test_has_the_default_limit_and_none_where_it_shall_have_none(self, tmp_path: Path) -> None:
        assert run("init", tmp_path / "one").exit_code == 0
        assert run("init", tmp_path / "other", "--max-size", "none", "--ttl", "none").exit_code == 0
        limits = [read_config(tmp_path / name).max_nbytes for name in ("one", "other")]
        assert limits[0] is not None
        assert (0 < limits[0] <= 50 * 10**9, limits[1]) == (True, None)

    def test_refuses_an_existing_database_and_changes_nothing(self, tmp_path: Path) -> None:
        make_limited(tmp_path / "db")
        before = (tmp_path / "db" / "config.json").read_bytes()
        result = run("init", tmp_path / "db", "--max-size", "1GB")
        assert result.exit_code == 2
        assert "there is a database in" in result.stderr
        assert (tmp_path / "db" / "config.json").read_bytes() == before

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--shared", "everybody"], "is not private, group"),
            (["--shared", "private:root"], "is not private, group"),
            (["--shared", "group:no-such-group"], "there is no group 'no-such-group'"),
            (["--max-size", "much"], "is not a size"),
            (["--max-size", "-5GB"], "is not a size"),
            (["--ttl", "5"], "is not a length of time"),
            (["--fidelity", "float8"], "there is no fidelity 'float8'"),
        ],
    )
    def test_refuses_what_makes_no_sense_and_makes_nothing(
        self, tmp_path: Path, options: list[str], message: str
    ) -> None:
        result = run("init", tmp_path / "db", *options, columns=300)
        assert result.exit_code == 2
        assert message in result.stderr
        assert not (tmp_path / "db" / "manifest.json").exists()

    def test_refuses_an_empty_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for arguments in (["init", ""], ["stats", "--db", ""], ["merge", "", "--db", "there"]):
            result = run(*arguments)
            assert result.exit_code == 2
            assert "an empty name is no directory" in result.stderr
        assert list(tmp_path.iterdir()) == []
        assert run("init", ".").exit_code == 0

    def test_refuses_a_directory_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        result = run("init", tmp_path)
        assert result.exit_code == 2
        assert "holds files" in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


class TestConfig:
    def test_shows_and_changes_what_may_be_changed(self, tmp_path: Path) -> None:
        place = make_limited(tmp_path / "db")
        options = ["--max-size", "2GiB", "--ttl", "7d", "--grace", "1min", "--high-water", "0.8", "--low-water", "0.5"]
        assert run_json("config", "--db", place, *options) == {
            "sharing": "private", "max_nbytes": 2 << 30, "high_water": 0.8, "low_water": 0.5,
            "ttl_seconds": 604800.0, "grace_seconds": 60.0,
        }  # fmt: skip
        assert run_json("config", "--db", place) == json.loads((place / "config.json").read_text())
        shown = run("config", "--db", place).stdout
        assert all(words in shown for words in ("private", "above 80% of it, until 50%", "7 d")), shown
        assert run_json("config", "--db", place, "--max-size", "none", "--ttl", "none")["max_nbytes"] is None
        assert read_config(place).grace_seconds == 60.0

    @pytest.mark.parametrize(
        "options", [["--high-water", "1.5"], ["--high-water", "0.5"], ["--low-water", "0"], ["--low-water", "nan"]]
    )
    def test_refuses_what_makes_no_sense_and_keeps_what_was(self, tmp_path: Path, options: list[str]) -> None:
        place = make_limited(tmp_path / "db")
        before = (place / "config.json").read_bytes()
        result = run("config", "--db", place, *options)
        assert result.exit_code == 2
        assert "this is no configuration" in result.stderr
        assert (place / "config.json").read_bytes() == before

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"max_nbytes": -1}', b'{"sharing": "all"}', b"\xff"])
    def test_a_broken_file_is_said_so_and_mended_by_a_limit(self, tmp_path: Path, content: bytes) -> None:
        place = make_limited(tmp_path / "db")
        (place / "config.json").write_bytes(content)
        result = run("config", "--db", place)
        assert result.exit_code == 2
        assert "config.json cannot be read" in result.stderr
        assert "config --max-size" in result.stderr
        assert run_json("config", "--db", place, "--max-size", "1GB")["max_nbytes"] == 10**9
        assert (place / "config.json").stat().st_mode & 0o777 == 0o600
        assert run("config", "--db", place).exit_code == 0

    def test_shares_what_was_private_with_a_group(self, tmp_path: Path) -> None:
        place = make_limited(tmp_path / "db")
        with bp.open(place) as db:
            put_prompts(db, [0])
        assert run_json("config", "--db", place, "--shared", f"group:{GROUP}")["sharing"] == "group"
        assert modes(place) == MODES["group"]
        assert (place / "pending").stat().st_mode & 0o7777 == 0o2770
        with bp.open(place) as db:
            put_prompts(db, [1])

    def test_there_must_be_a_database(self, tmp_path: Path) -> None:
        result = run("config", "--db", tmp_path / "nowhere", "--max-size", "1GB")
        assert result.exit_code == 2
        assert "there is no database in" in result.stderr
        assert not (tmp_path / "nowhere").exists()

    def test_fields_of_a_later_version_are_no_obstacle(self, tmp_path: Path) -> None:
        place = make_limited(tmp_path / "db")
        fields = json.loads((place / "config.json").read_text()) | {"new": [1, 2]}
        (place / "config.json").write_text(json.dumps(fields))
        assert read_config(place) == Config(max_nbytes=4_000_000, grace_seconds=0.0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A database of large parts, of which nothing is too young to go."""
    with open_limited(tmp_path / "db", max_nbytes=100_000_000) as db:
        put_prompts(db, range(12))
    return tmp_path / "db"


def keys_in(place: Path) -> set[Key]:
    with bp.open(place, mode="r") as db:
        return stored(db)


def as_keys(candidates: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(candidate["address"], candidate["part"]) for candidate in candidates]


def gone(before: set[Key], after: set[Key]) -> set[tuple[str, str]]:
    return {(key.address.hex(), key.part.name.lower()) for key in before - after}


class TestEvict:
    @pytest.mark.parametrize(
        "options",
        [["--to", "1MB"], ["--to", "2.5MB"], ["--to", "0"], ["--text-prefix", "Context 1"], ["--contains", "Section 3"],
         ["--text-prefix", "Context 0", "--to", "3MB"], ["--older-than", "0s"]],
    )  # fmt: skip
    def test_removes_what_its_rehearsal_has_shown(self, place: Path, options: list[str]) -> None:
        before = keys_in(place)
        rehearsed = run_json("evict", "--db", place, *options, "--dry-run")
        assert keys_in(place) == before
        done = run_json("evict", "--db", place, *options)
        assert gone(before, keys_in(place)) == set(as_keys(rehearsed))
        assert len(rehearsed) == done["num_parts"] > 0
        assert sum(candidate["nbytes"] for candidate in rehearsed) == done["nbytes"]
        with bp.open(place, mode="r") as db:
            assert dangling(db) == []
            assert done["live_nbytes"] == live(db)

    def test_goes_down_to_the_size_that_is_given(self, place: Path) -> None:
        assert run_json("evict", "--db", place, "--to", "2MB")["live_nbytes"] <= 2_000_000
        assert run_json("evict", "--db", place, "--to", "2MB")["num_parts"] == 0

    def test_without_anything_goes_down_to_the_low_water_mark(self, place: Path) -> None:
        assert run_json("evict", "--db", place)["num_parts"] == 0
        assert run("config", "--db", place, "--max-size", "2MB", "--force").exit_code == 0
        assert run_json("evict", "--db", place)["live_nbytes"] <= 0.85 * 2_000_000

    def test_a_limit_needs_no_secret(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BACKPROMPT_DB_SECRET", "of the owner, long enough")
        place = make_limited(tmp_path / "secret", max_nbytes=None)
        monkeypatch.delenv("BACKPROMPT_DB_SECRET")
        assert run_json("config", "--db", place, "--max-size", "1GB")["max_nbytes"] == 10**9

    def test_a_limit_must_be_forced_where_nobody_knows_what_is_in_use(self, place: Path) -> None:
        (place / "store" / "data.mdb").write_bytes(b"damaged")
        result = run("config", "--db", place, "--max-size", "1GB")
        assert result.exit_code == 2
        assert re.search(r"it cannot be told whether .*data\.mdb.* Give --force", " ".join(result.stderr.split()))
        assert run("config", "--db", place, "--max-size", "1GB", "--force").exit_code == 0

    def test_a_limit_below_what_is_in_use_must_be_forced(self, place: Path) -> None:
        before = run_json("config", "--db", place)
        result = run("config", "--db", place, "--max-size", "2MB")
        assert result.exit_code == 2
        assert re.search(r"MiB are in use, and the next writer would remove .*--force", " ".join(result.stderr.split()))
        assert run_json("config", "--db", place) == before
        assert run_json("config", "--db", place, "--max-size", "50MB")["max_nbytes"] == 50_000_000
        assert run_json("config", "--db", place, "--ttl", "1d")["ttl_seconds"] == 86_400

    def test_prints_the_same_fields_always(self, place: Path) -> None:
        candidates = run_json("evict", "--db", place, "--to", "0", "--dry-run")
        fields = ["address", "part", "nbytes", "seconds", "used_at", "reason"]
        assert {tuple(candidate) for candidate in candidates} == {tuple(fields)}
        assert {candidate["reason"] for candidate in candidates} == {"value"}
        assert list(run_json("evict", "--db", place, "--to", "0")) == ["num_parts", "nbytes", "live_nbytes"]

    @pytest.mark.parametrize(
        ("options", "reason", "why"),
        [
            (["--contains", "Section 3"], "selected", "selected"),
            (["--contains", "Section 3", "--to", "0"], "value", "worth least"),
            (["--to", "0"], "value", "worth least"),
        ],
    )
    def test_gives_the_reason_for_which_each_part_goes(
        self, place: Path, options: list[str], reason: str, why: str
    ) -> None:
        assert {each["reason"] for each in run_json("evict", "--db", place, *options, "--dry-run")} == {reason}
        _, *lines = run("evict", "--db", place, *options, "--dry-run", columns=120).stdout.splitlines()
        assert {line.rpartition("ago  ")[2] for line in lines if " ago  " in line} == {why}

    def test_what_is_selected_and_expired_goes_because_it_is_expired(self, place: Path) -> None:
        assert run("config", "--db", place, "--ttl", "0.001s").exit_code == 0
        found = run_json("evict", "--db", place, "--contains", "Section 3", "--dry-run")
        assert {each["reason"] for each in found} == {"expired"}

    def test_what_was_just_used_goes_because_nothing_older_is_left(self, place: Path) -> None:
        assert run("config", "--db", place, "--grace", "1h").exit_code == 0
        assert {each["reason"] for each in run_json("evict", "--db", place, "--to", "0", "--dry-run")} == {"room"}
        assert "nothing older is left" in run("evict", "--db", place, "--to", "0", "--dry-run", columns=120).stdout

    def test_tells_people_what_would_go_and_why(self, place: Path) -> None:
        shown = run("evict", "--db", place, "--to", "0", "--dry-run", columns=120).stdout
        assert "worth least" in shown
        assert "parts would go" in shown
        assert "parts evicted" in run("evict", "--db", place, "--to", "0").stdout
        assert "Nothing would go." in run("evict", "--db", place, "--to", "0", "--dry-run").stdout

    def test_removes_what_is_expired_although_there_is_room(self, place: Path) -> None:
        assert run("config", "--db", place, "--ttl", "0.001s").exit_code == 0
        candidates = run_json("evict", "--db", place, "--to", "1GB", "--dry-run")
        assert {candidate["reason"] for candidate in candidates} == {"expired"}
        assert run_json("evict", "--db", place, "--to", "1GB")["num_parts"] == len(candidates)
        assert keys_in(place) == set()

    def test_an_unknown_model_is_said_so(self, place: Path) -> None:
        before = keys_in(place)
        result = run("evict", "--db", place, "--model", "nobody/knows")
        assert result.exit_code == 2
        assert keys_in(place) == before


class TestCompact:
    def test_gives_back_the_room_of_what_is_gone(self, place: Path) -> None:
        assert run("evict", "--db", place, "--to", "300KB").exit_code == 0
        with bp.open(place, memory_nbytes=0) as db:
            kept = stored(db)
            done = run_json("compact", "--db", place)
            assert done["file_nbytes"] < done["file_nbytes_before"] / 3
            assert (place / "store" / "data.mdb").stat().st_size == done["file_nbytes"]
            assert stored(db) == kept
            assert verify(db).is_clean
            put_prompts(db, [1])
            assert_whole(db, prompt(1))
        assert " became " in run("compact", "--db", place).stdout


class TestPinAndLabel:
    def test_what_is_pinned_stays_with_all_that_it_follows_until_it_is_unpinned(self, place: Path) -> None:
        chain = prompt(4)
        assert run_json("pin", "--db", place, "--contains", "Request 4 ") == {"num_representations": 3}
        assert run("evict", "--db", place, "--to", "0").exit_code == 0
        assert keys_in(place) == set(keys_of(chain))
        with bp.open(place, memory_nbytes=0) as db:
            assert_whole(db, chain)
        assert run("pin", "--db", place, "--contains", "Request 4 ", "--remove").stdout.startswith("3 ")
        assert run_json("evict", "--db", place, "--to", "0")["num_parts"] == 9
        assert keys_in(place) == set()

    def test_a_label_selects_and_can_be_removed(self, place: Path) -> None:
        assert run_json("label", "mine", "--db", place, "--text-prefix", "Context 1.") == {"num_representations": 9}
        listed = run_json("ls", "--db", place, "--label", "mine")
        assert {row["label"] for row in listed} == {"mine"}
        assert run_json("label", "mine", "--db", place, "--contains", "Context", "--remove") == {
            "num_representations": 1
        }
        done = run_json("evict", "--db", place, "--label", "mine")
        assert done["num_parts"] == 3 * 8
        assert run("evict", "--db", place, "--label", "mine", "--dry-run").stdout == "Nothing would go.\n"

    @pytest.mark.parametrize("command", [["pin"], ["label", "name"]])
    def test_where_nothing_is_selected_that_is_said(self, place: Path, command: list[str]) -> None:
        result = run(*command, "--db", place, "--contains", "no such text")
        assert result.exit_code == 2
        assert "nothing is selected" in result.stderr

    def test_a_model_pins_a_text_with_all_parts_and_lets_it_go(self, tmp_path: Path, make_lm: Any) -> None:
        with open_limited(tmp_path / "db", max_nbytes=10_000_000) as db:
            lm = make_lm(db=db)
            text = lm.text("Pick the endpoint.\n") + "Request: list users"
            lm.pin(text, label="endpoints")
            lm("Something else")
            db.flush()
            run("evict", "--db", tmp_path / "db", "--to", "0")
            assert {key.part for key in stored(db)} == set(OWN_PARTS)
            assert len(stored(db)) == 6
            assert [row["label"] for row in run_json("ls", "--db", tmp_path / "db")] == ["endpoints"] * 2
            calls = lm.counters.num_model_calls
            assert lm(text).num_computed_tokens == 0
            lm.unpin(text)
            run("evict", "--db", tmp_path / "db", "--to", "0")
            assert stored(db) == set()
            assert lm.counters.num_model_calls == calls

    def test_a_model_says_so_when_there_is_no_room_for_what_it_pins(self, tmp_path: Path, make_lm: Any) -> None:
        with open_limited(tmp_path / "db", max_nbytes=30_000) as db:
            lm = make_lm(db=db)
            text = lm.text("The quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n")
            with pytest.raises(StoreError) as caught:
                lm.pin(text + "Request: show me everyone who signed up this week\n")
            assert isinstance(caught.value, StoreFull)
