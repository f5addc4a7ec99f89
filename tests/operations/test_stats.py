"""`stats`: every number against another way of counting, and JSON that keeps its schema."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import backprompt_db as bp
from backprompt_db.catalog.records import Event
from backprompt_db.database.config import Config, write_config
from backprompt_db.database.counters import NAMES_IN_CATALOG
from backprompt_db.database.opening import open_catalog
from backprompt_db.errors import CatalogError
from backprompt_db.operations.stats import gather
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from backprompt_db.store.lmdb import LmdbStore
from tests.support.cli import run, run_json
from tests.support.database_files import copies_after
from tests.support.databases import new_part
from tests.support.operations import catalog_of, run_prompts

assert sys.platform != "win32"

ROOT = Path(__file__).parents[2]
NULLABLE_INT = (int, None)
SIZES = {"scores": int, "logits": int, "kv": int, "continuations": int}
SCHEMA: dict[str, Any] = {
    "directory": str,
    "namespace": (str, None),
    "format": int,
    "fidelity": str,
    "created_at": str,
    "num_representations": int,
    "num_segments": NULLABLE_INT,
    "num_models": NULLABLE_INT,
    "num_tokens": NULLABLE_INT,
    "nbytes": SIZES,
    "num_hits": NULLABLE_INT,
    "saved_seconds": (float, None),
    "by_model": ([{"weights_id": str, "name": str, "num_representations": int, "nbytes": SIZES}], None),
    "by_namespace": ([{"namespace": str, "num_representations": int, "nbytes": SIZES}], None),
    "live_nbytes": NULLABLE_INT,
    "file_nbytes": int,
    "max_nbytes": NULLABLE_INT,
    "fullness": (float, None),
    "activity": (
        {
            "num_memory_hits": int, "num_disk_hits": int, "num_base_hits": int, "num_part_misses": int,
            "num_computed_tokens": int, "computed_seconds": float, "num_evicted": int, "num_evicted_nbytes": int,
            "num_quarantined": int, "num_read_failures": int, "num_write_failures": int, "num_waits": int,
        },
        None,
    ),
    "incidents": ([{"at": float, "age_seconds": float, "kind": str, "address": (str, None), "detail": str}], None),
    "catalog_problem": (str, None),
    "store_problem": (str, None),
    "config_problem": (str, None),
}  # fmt: skip
"""Names in their order, and types. A tuple has alternatives, None stands for null."""

original, directory = copies_after(run_prompts)


def mismatches(value: Any, schema: Any, place: str = "") -> Iterator[str]:
    if isinstance(schema, tuple):
        if all(list(mismatches(value, each, place)) for each in schema):
            yield place
    elif isinstance(schema, dict):
        if not isinstance(value, dict) or list(value) != list(schema):
            yield place
        else:
            for name, each in schema.items():
                yield from mismatches(value[name], each, f"{place}.{name}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            yield place
        else:
            for number, each in enumerate(value):
                yield from mismatches(each, schema[0], f"{place}[{number}]")
    elif not (value is None if schema is None else type(value) is schema):
        yield place


class TestSchema:
    def test_every_field_has_its_type_and_its_place(self, directory: Path) -> None:
        write_config(directory, Config(max_nbytes=1 << 30))
        with bp.open(directory) as db:
            db.tally.report("quarantine", "a detail", address=stored_keys_of(db)[0].address)
        found = run_json("stats", "--db", directory)
        assert list(mismatches(found, SCHEMA)) == []
        empty = [name for name, value in found.items() if value is None or value == []]
        assert empty == ["namespace", "catalog_problem", "store_problem", "config_problem"]

    def test_it_holds_for_what_cannot_be_known(self, directory: Path) -> None:
        catalog_of(directory).unlink()
        (directory / "config.json").write_text("garbage")
        found = run_json("stats", "--db", directory)
        assert list(mismatches(found, SCHEMA)) == []
        assert found["by_model"] is found["activity"] is found["incidents"] is found["max_nbytes"] is None
        assert "config.json" in found["config_problem"]
        assert "config.json" in run("stats", "--db", directory).stdout

    def test_the_documentation_names_every_field(self) -> None:
        text = (ROOT / "docs" / "operations.md").read_text()
        names = {*SCHEMA, *SCHEMA["activity"][0], *SCHEMA["by_model"][0][0], *SCHEMA["incidents"][0][0]}
        assert {name for name in names if f"`{name}`" not in text} == set()

    def test_the_schema_notices_what_does_not_fit(self) -> None:
        assert list(mismatches({"a": 1}, {"a": int})) == []
        wrong: Any
        for wrong in ({"a": 1.0}, {"a": True}, {"a": None}, {}, {"a": 1, "b": 2}, []):
            assert list(mismatches(wrong, {"a": int})) != []


def stored_keys_of(db: bp.Database) -> list[Key]:
    return [key for key, _ in db.store.keys()]


class TestNumbers:
    def test_models_and_namespaces_sum_up_to_the_whole(
        self, open_db: Callable[..., bp.Database], tmp_path: Path
    ) -> None:
        for namespace, num_parts in (("", 3), ("tenant's", 2), ("'; DROP TABLE sums; --", 1)):
            with open_db(tmp_path / "db", namespace=namespace) as db:
                db.put([new_part(f"{number}", namespace=namespace) for number in range(num_parts)])
        found = gather(tmp_path / "db")
        assert found.by_namespace is not None
        assert found.by_model is not None
        assert [(each.namespace, each.num_representations) for each in found.by_namespace] == [
            ("", 3), ("tenant's", 2), ("'; DROP TABLE sums; --", 1),
        ]  # fmt: skip
        [model] = found.by_model
        assert (model.num_representations, model.nbytes) == (6, found.nbytes)
        for part in Part:
            assert sum(each.nbytes[part] for each in found.by_namespace) == found.nbytes[part]

    def test_one_namespace_is_counted_alone(self, open_db: Callable[..., bp.Database], tmp_path: Path) -> None:
        for namespace in ("", "tenant"):
            with open_db(tmp_path / "db", namespace=namespace) as db:
                db.put([new_part(text, namespace=namespace) for text in ("a", "b", namespace or "c")])
                db.put([new_part("only here")] if not namespace else [])
        assert gather(tmp_path / "db").num_representations == 7
        for namespace, expected in (("", 4), ("tenant", 3), ("nobody", 0)):
            found = run_json("stats", "--db", tmp_path / "db", "--namespace", namespace)
            assert (found["num_representations"], found["namespace"]) == (expected, namespace)
            assert list(mismatches(found, SCHEMA)) == []
            assert found["by_model"] is None
        assert "(default)" in run("stats", "--db", tmp_path / "db", "--namespace", "").stdout

    def test_a_namespace_needs_the_catalog(self, directory: Path) -> None:
        catalog_of(directory).unlink()
        with pytest.raises(CatalogError):
            gather(directory, namespace="")

    def test_live_bytes_are_those_of_the_store_and_full_is_their_share(self, directory: Path) -> None:
        with closing(LmdbStore(directory / "store", readonly=True)) as store:
            live_nbytes = store.usage().live_nbytes
        write_config(directory, Config(max_nbytes=4 * live_nbytes))
        found = gather(directory)
        assert (found.live_nbytes, found.max_nbytes, found.fullness) == (live_nbytes, 4 * live_nbytes, 0.25)
        assert "25.0% full" in run("stats", "--db", directory).stdout

    def test_a_damaged_store_costs_one_number(self, directory: Path) -> None:
        (directory / "store" / "data.mdb").write_bytes(b"")
        found = gather(directory)
        assert found.live_nbytes is found.fullness is None
        assert "data.mdb" in (found.store_problem or "")
        assert found.num_representations == 4

    def test_activity_is_what_was_counted(self, directory: Path) -> None:
        with open_catalog(directory) as catalog:
            counts = catalog.counts()
        activity = gather(directory).activity
        assert activity is not None
        for name, in_catalog in NAMES_IN_CATALOG.items():
            assert getattr(activity, name) == pytest.approx(counts.get(in_catalog, 0)), name
        assert activity.num_computed_tokens > 0

    def test_tables_show_several_models_and_namespaces(
        self, open_db: Callable[..., bp.Database], tmp_path: Path
    ) -> None:
        for number in range(12):
            with open_db(tmp_path / "db", namespace=f"tenant {number}") as db:
                db.put([new_part("a", namespace=f"tenant {number}")])
        text = run("stats", "--db", tmp_path / "db").stdout
        assert re.search(r"tenant \d+ +1 ", text)
        assert "and 2 more" in text


class TestHealing:
    def test_a_flipped_byte_is_quarantined_computed_again_and_a_hit_from_then_on(
        self, directory: Path, make_lm: Callable[..., bp.LanguageModel], open_db: Callable[..., bp.Database]
    ) -> None:
        key = flip_a_byte_of_the_file(directory, "Request: create an order")

        def ask() -> tuple[bp.ModelRepr, bp.Database]:
            db = open_db(directory)
            lm = make_lm(db=db)
            found = (lm.text("Pick the endpoint for the request.\n") + "Request: create an order")()
            _ = found.past_key_values
            db.close()
            return found, db

        with make_lm().db as fresh:
            expected = make_lm(db=fresh)(bp.Text("Pick the endpoint for the request.\n") + "Request: create an order")
        healed, db = ask()
        assert db.counters.num_quarantined == 1
        assert healed.token_logprobs[1:].tolist() == pytest.approx(expected.token_logprobs[1:].tolist(), abs=1e-4)
        again, db = ask()
        assert (db.counters.num_quarantined, again.num_computed_tokens, db.counters.num_misses) == (0, 0, 0)
        assert again.token_logprobs[1:].tolist() == healed.token_logprobs[1:].tolist()
        found = run_json("stats", "--db", directory)
        assert found["activity"]["num_quarantined"] == 1
        assert [(each["kind"], each["address"]) for each in found["incidents"]] == [("quarantine", key.address.hex())]
        text = run("stats", "--db", directory).stdout
        assert re.search(r"quarantined +1 part", text)
        assert f"quarantine {key.address.hex()[:12]}: the {key.part.name.lower()} part does not match" in text
        assert run("verify", "--db", directory).exit_code == 0


def flip_a_byte_of_the_file(directory: Path, text: str) -> Key:
    """Change a byte of `data.mdb` inside the scores part of a text, in old copies of its page too; return its key."""
    with open_catalog(directory) as catalog:
        (row,) = [row for row in catalog.rows() if row.text == text]
    path = directory / "store" / "data.mdb"
    content = bytearray(path.read_bytes())
    for record in re.finditer(re.escape(row.address + Part.SCORES.value), bytes(content)):
        place = content.find(text.encode(), record.end(), record.end() + 1000)
        if place > 0:
            content[place] ^= 1
    path.write_bytes(content)
    return Key(row.address, Part.SCORES)


class TestTime:
    @pytest.mark.parametrize("offset", [-86400.0, 0.0, 86400.0])
    def test_a_clock_that_is_a_day_off_breaks_nothing(self, directory: Path, offset: float) -> None:
        moment = time.time() + offset
        with closing(sqlite3.connect(catalog_of(directory))) as connection:
            connection.execute("UPDATE representations SET created_at = ?, last_used_at = ?", (moment, moment))
            connection.commit()
        with bp.open(directory) as db:
            assert db.catalog is not None
            db.catalog.log([Event(moment, "quarantine", None, "from another day")])
            candidates = db.catalog.eviction_order(1 << 40, at=time.time(), grace_seconds=10)
        assert candidates, "equal times are no reason to evict nothing"
        [incident] = gather(directory).incidents or []
        assert incident.age_seconds == pytest.approx(max(0, -offset), abs=60)
        shown = run("ls", "--db", directory).stdout
        assert ("1 d" if offset < 0 else " 0 s") in shown
        assert re.findall(r"-\d+ (?:s|min|h|d|y)\b", shown) == []
        assert re.search(r"  (1 d|0 s|\d+\.?\d* s) ago: quarantine", run("stats", "--db", directory).stdout)


@contextmanager
def watching(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    command = [sys.executable, "-m", "backprompt_db", "stats", "--watch", "--interval", "0.1", *arguments]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, **options)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


class TestWatch:
    def test_it_prints_a_line_of_json_each_time_and_ends_at_ctrl_c(self, directory: Path) -> None:
        with watching("--json", "--db", str(directory), stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            lines = [json.loads(child.stdout.readline()) for _ in range(3)]
            child.send_signal(signal.SIGINT)
            rest, errors = child.communicate(timeout=300)
        assert (child.returncode, errors) == (0, "")
        for line in (*lines, *map(json.loads, rest.splitlines())):
            assert list(mismatches(line, SCHEMA)) == []

    def test_it_sees_what_changes(self, directory: Path) -> None:
        with watching("--json", "--db", str(directory), stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            before = json.loads(child.stdout.readline())["num_representations"]
            with bp.open(directory) as db:
                db.put([new_part("new")])
            deadline = time.monotonic() + 30
            while (after := json.loads(child.stdout.readline())["num_representations"]) == before:
                assert time.monotonic() < deadline
        assert after == before + 1

    def test_a_terminal_is_refreshed_and_left_clean(self, directory: Path) -> None:
        ours, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "50"}
        with watching("--db", str(directory), stdin=theirs, stdout=theirs, env=environment) as child:
            os.close(theirs)
            shown = b""
            while shown.count(b"representations") < 3:
                assert select.select([ours], [], [], 30)[0]
                shown += os.read(ours, 1 << 16)
            child.send_signal(signal.SIGINT)
            while select.select([ours], [], [], 30)[0]:
                try:
                    more = os.read(ours, 1 << 16)
                except OSError:  # the other end was closed
                    break
                shown += more
            _, errors = child.communicate(timeout=300)
        os.close(ours)
        assert (child.returncode, errors) == (0, b"")
        assert shown.rstrip().endswith(b"\x1b[?25h"), "the cursor is back"

    def test_without_a_terminal_and_json_it_prints_again_and_again(self, directory: Path) -> None:
        with watching("--db", str(directory), stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            seen = ""
            while seen.count("representations") < 2:
                seen += child.stdout.readline()
        assert "\x1b" not in seen

    @pytest.mark.parametrize("options", ["--openmetrics --json", "--openmetrics --watch", "--interval 0"])
    def test_options_that_do_not_go_together_are_refused(self, directory: Path, options: str) -> None:
        assert run("stats", "--db", directory, *options.split()).exit_code == 2
