"""Verifying: which sort of problem each kind of damage is, and what it costs to find it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backprompt_db as bp
from backprompt_db.catalog.connection import catalog_flaws
from backprompt_db.cli.verify import share
from backprompt_db.codec.blob import decode, decode_origin, encode
from backprompt_db.database.opening import open_existing
from backprompt_db.operations.inspection import Inspection, Kind
from backprompt_db.operations.verify import Checks, Found, Verification, sample, verify
from backprompt_db.prompt.representation import Array, Part
from backprompt_db.store.check import flaws
from backprompt_db.store.contract import Key
from backprompt_db.store.records import CHUNK_NBYTES
from tests.support.cli import run
from tests.support.database_files import copies_after
from tests.support.databases import new_part
from tests.support.operations import (
    back_door,
    catalog_of,
    flip_a_bit,
    put_blob,
    read_blob,
    remove_blob,
    remove_row,
    run_prompts,
    stored_keys,
)

STRUCTURE = Checks(structure=True, share=0)
DATA = Checks(structure=False)

original, directory = copies_after(run_prompts)


def verified(directory: Path, checks: Checks | None = None) -> Verification:
    with open_existing(directory) as db:
        return verify(db, checks=checks)


def kinds(found: Verification) -> list[Kind]:
    return [problem.kind for problem in found.problems]


@pytest.fixture
def large(open_db: Callable[..., bp.Database]) -> tuple[Path, Key]:
    """A closed database with one part of three chunks beside small ones, and that part's key."""
    db = open_db()
    part = new_part("large", num_values=3 * CHUNK_NBYTES // 4 - 1000)
    db.put([new_part("small"), part, new_part("other")])
    db.close()
    assert db.directory is not None
    return db.directory, part.key


def chunk(key: Key, number: int) -> bytes:
    return key.address + key.part.value + number.to_bytes(4)


class TestStructure:
    def test_a_sound_store_has_no_flaws(self, directory: Path, large: tuple[Path, Key]) -> None:
        assert list(flaws(directory / "store")) == []
        assert list(flaws(large[0] / "store")) == []
        assert verified(large[0], STRUCTURE).is_clean

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_a_chunk_that_is_missing_short_or_too_many_is_found_and_the_part_removed(
        self, large: tuple[Path, Key], number: int
    ) -> None:
        directory, key = large
        with back_door(directory) as transaction:
            value = transaction.get(chunk(key, number))
            if number == 1:
                assert transaction.delete(chunk(key, number))
            elif number == 2:
                transaction.put(chunk(key, number), value[:-1])
            else:
                transaction.put(chunk(key, number + 1), value)
        found = verified(directory, STRUCTURE)
        assert [(p.address, p.part, p.kind) for p in found.problems] == [(*key, Kind.INCOMPLETE)]
        assert found.found == Found.STRUCTURE
        assert key not in stored_keys(directory)
        assert verified(directory, STRUCTURE).found == Found.CATALOG, "the row is still there"

    def test_chunks_without_a_head_are_found_and_removed(self, large: tuple[Path, Key]) -> None:
        directory, key = large
        with back_door(directory) as transaction:
            assert transaction.delete(chunk(key, 0))
        remove_row(directory, key)
        assert kinds(verified(directory)) == [Kind.ORPHANED]
        with back_door(directory) as transaction:
            assert transaction.stat()["entries"] == 2
        assert verified(directory).is_clean

    @pytest.mark.parametrize(
        "head",
        [
            b"",
            b"short",
            (0).to_bytes(4) + (9).to_bytes(8) + bytes(16),
            (2**32 - 1).to_bytes(4) + (2**64 - 1).to_bytes(8) + bytes(64),
            (3).to_bytes(4) + (100).to_bytes(8) + bytes(64),
        ],
    )
    def test_a_head_that_contradicts_itself_is_found(self, directory: Path, head: bytes) -> None:
        key = stored_keys(directory)[0]
        with back_door(directory) as transaction:
            transaction.put(chunk(key, 0), head)
        found = verified(directory, STRUCTURE)
        assert kinds(found) == [Kind.INCOMPLETE]
        with back_door(directory) as transaction:
            assert transaction.get(chunk(key, 0)) is None

    @pytest.mark.parametrize("record", [b"x", b"y" * 37, b"z" * 511])
    def test_a_record_that_is_not_ours_is_reported_and_left_alone(self, directory: Path, record: bytes) -> None:
        with back_door(directory) as transaction:
            transaction.put(record, b"somebody's")
        found = verified(directory)
        [problem] = found.problems
        assert (problem.address, problem.part, problem.kind) == (None, None, Kind.FOREIGN)
        assert found.found == Found.STRUCTURE
        with back_door(directory) as transaction:
            assert transaction.get(record) == b"somebody's"

    def test_it_reads_no_data(self, directory: Path) -> None:
        flip_a_bit(directory, stored_keys(directory)[0])
        found = verified(directory, STRUCTURE)
        assert (found.num_parts, found.nbytes, found.is_clean) == (0, 0, True)

    def test_many_records_are_walked_through_in_several_transactions(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        foreign = [b"%03d" % number for number in range(50)] + [bytes([255]) * 511]
        with back_door(directory) as transaction:
            for record in foreign:
                transaction.put(record, b"")
        monkeypatch.setattr("backprompt_db.store.check._RECORDS_PER_TRANSACTION", 7)
        assert sum(flaw.key is None for flaw in flaws(directory / "store")) == len(foreign)

    def test_a_part_with_two_problems_is_reported_once(self, directory: Path) -> None:
        key = stored_keys(directory)[0]
        with back_door(directory) as transaction:
            transaction.put(chunk(key, 0), b"no head")
        directory.chmod(0o500)
        with bp.open(directory, mode="r") as db:
            assert kinds(verify(db)) == [Kind.INCOMPLETE]
            assert db.counters.num_quarantined > 0
        directory.chmod(0o700)
        with back_door(directory) as transaction:
            assert transaction.get(chunk(key, 0)) == b"no head"


class TestCatalog:
    def damage(self, directory: Path, statement: str) -> None:
        with closing(sqlite3.connect(catalog_of(directory))) as connection:
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute(statement)
            connection.commit()

    def test_a_row_that_refers_to_nothing_is_found(self, directory: Path) -> None:
        assert catalog_flaws(catalog_of(directory)) == []
        self.damage(directory, "DELETE FROM models")
        [*flaws] = catalog_flaws(catalog_of(directory))
        assert "representations refers to a row of models" in flaws[0]
        found = verified(directory, STRUCTURE)
        assert found.found == Found.CATALOG
        assert "models" in (found.catalog_problem or "")

    def test_an_index_that_lacks_a_row_is_found(self, directory: Path) -> None:
        self.damage(
            directory,
            "UPDATE sqlite_master SET sql = replace(sql, 'created_at)', 'num_tokens)') "
            "WHERE type = 'index' AND name = 'ix_representations_created_at'",
        )
        found = verified(directory, STRUCTURE)
        assert found.found == Found.CATALOG

    def test_garbage_and_nothing_are_flaws_too(self, tmp_path: Path) -> None:
        (tmp_path / "garbage").write_bytes(b"garbage" * 999)
        for name in ("garbage", "nothing"):
            [flaw] = catalog_flaws(tmp_path / name)
            assert "cannot be read" in flaw
        assert not (tmp_path / "nothing").exists()


class TestSample:
    def test_a_share_of_the_parts_is_read(self, directory: Path) -> None:
        for wanted, expected in ((1e-9, 1), (0.25, 3), (0.26, 4), (1.0, 12)):
            assert verified(directory, Checks(structure=False, share=wanted)).num_parts == expected

    def test_the_seed_says_which(self, directory: Path) -> None:
        def chosen(seed: int) -> list[Key]:
            seen = list[Key]()

            def watch(inspections: Iterator[Inspection]) -> Iterator[Inspection]:
                for inspection in inspections:
                    seen.append(inspection.key)
                    yield inspection

            with open_existing(directory) as db:
                verify(db, checks=Checks(structure=False, share=0.3, seed=seed), progress=watch)
            return seen

        assert chosen(1) == chosen(1)
        assert len({tuple(chosen(seed)) for seed in range(8)}) > 4
        assert len({Checks().seed for _ in range(8)}) == 8

    def test_every_part_has_the_same_chance(self) -> None:
        counts = np.zeros(50)
        for seed in range(2000):
            counts[list(sample(50, share=0.1, seed=seed))] += 1
        assert counts.sum() == 2000 * 5
        assert counts.min() > 140
        assert counts.max() < 260

    def test_nothing_of_nothing_and_all_of_all(self) -> None:
        assert sample(0, share=0.5, seed=0) == frozenset()
        assert sample(9, share=0, seed=0) == frozenset()
        assert sample(9, share=1, seed=0) == frozenset(range(9))

    @pytest.mark.parametrize(("given", "expected"), [("1%", 0.01), ("0.1%", 0.001), ("100%", 1), ("12.5 %", 0.125)])
    def test_percentages(self, given: str, expected: float) -> None:
        assert share(given) == pytest.approx(expected)

    @pytest.mark.parametrize("given", ["1", "0%", "101%", "-1%", "x%", "%", "1%%", "1e-1%", "nan%", ""])
    def test_what_is_no_percentage_is_refused(self, directory: Path, given: str) -> None:
        result = run("verify", "--db", directory, "--sample", given)
        assert result.exit_code == 2
        assert "percentage" in result.stderr or "requires an argument" in result.stderr


def damage_nothing(directory: Path) -> None:
    """The database stays as it is."""


def damage_data(directory: Path) -> None:
    flip_a_bit(directory, stored_keys(directory)[0])


def damage_structure(directory: Path) -> None:
    with back_door(directory) as transaction:
        transaction.put(b"foreign", b"")


def damage_catalog(directory: Path) -> None:
    remove_row(directory, stored_keys(directory)[3])


def damage_value(directory: Path) -> None:
    key = next(key for key in stored_keys(directory) if key.part is Part.SCORES)
    blob = memoryview(read_blob(directory, key))
    part, origin = decode_origin(blob)
    arrays = decode(part, blob)
    forged = arrays["token_logprobs"].numpy().astype(np.float32)
    forged[-1] -= 1
    remove_blob(directory, key)
    put_blob(directory, key, encode(part, {**arrays, "token_logprobs": Array.from_numpy(forged)}, origin))


class TestCommand:
    """`verify` as it is called: exit codes are sums of what was found."""

    @pytest.fixture
    def model(self, gpt2: Any, tokenizer: Any, tmp_path: Path) -> Path:
        gpt2.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    @pytest.mark.parametrize(
        ("damages", "code"),
        [
            ([damage_nothing], 0),
            ([damage_data], 1),
            ([damage_structure], 4),
            ([damage_catalog], 8),
            ([damage_value], 16),
            ([damage_data, damage_structure], 5),
            ([damage_structure, damage_catalog, damage_value], 28),
        ],
    )
    def test_each_sort_of_problem_has_a_bit(
        self, directory: Path, model: Path, damages: list[Callable[[Path], None]], code: int
    ) -> None:
        for damage in damages:
            damage(directory)
        options = ["--structure", "--data", "--recompute", "100%", "--model", str(model), "--json"]
        result = run("verify", "--db", directory, *options)
        found = json.loads(result.stdout)
        assert (result.exit_code, found["exit_code"]) == (code, code)
        assert list(found) == [
            "num_parts", "nbytes", "problems", "catalog_problem", "store_problem", "changed_rows", "seed",
            "recomputation", "exit_code",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("option", "codes"),
        [(["--structure"], [0, 4, 8, 0]), (["--data"], [1, 0, 0, 0]), (["--sample", "100%"], [1, 0, 0, 0])],
    )
    def test_an_option_finds_its_own_sort_and_no_other(
        self, original: Path, directory: Path, tmp_path: Path, option: list[str], codes: list[int]
    ) -> None:
        for number, damage in enumerate([damage_data, damage_structure, damage_catalog, damage_value]):
            copy = Path(shutil.copytree(original, tmp_path / f"{number}"))
            damage(copy)
            assert run("verify", "--db", copy, *option).exit_code == codes[number], damage

    def test_a_poisoned_value_is_reported_and_goes_only_when_told(self, directory: Path, model: Path) -> None:
        damage_value(directory)
        options = ["verify", "--db", str(directory), "--recompute", "100%", "--model", str(model)]
        reported = run(*options)
        assert reported.exit_code == 16
        assert "different: scores of " in reported.stdout
        assert "--remove" in reported.stdout
        assert len(stored_keys(directory)) == 12
        assert run(*options, "--remove").exit_code == 16
        assert len(stored_keys(directory)) == 11
        assert run(*options).exit_code == 0

    def test_the_seed_that_is_printed_chooses_the_same(self, directory: Path) -> None:
        printed = run("verify", "--db", directory, "--sample", "30%").stdout
        seed = printed.rpartition("--seed ")[2].split(".")[0]
        again = run("verify", "--db", directory, "--sample", "30%", "--seed", seed).stdout
        assert again == printed

    def test_a_model_that_is_not_the_one_is_an_error_that_names_those_there_are(
        self, directory: Path, model: Path, tmp_path: Path
    ) -> None:
        from transformers import GPT2LMHeadModel

        other = GPT2LMHeadModel.from_pretrained(model)
        other.transformer.h[0].mlp.c_fc.bias.data += 1
        other.save_pretrained(tmp_path / "model")
        result = run("verify", "--db", directory, "--recompute", "1%", "--model", model)
        assert result.exit_code == 2
        assert "nothing in the database is of" in result.stderr
        assert "GPT2LMHeadModel (" in result.stderr
        missing = run("verify", "--db", directory, "--recompute", "1%", "--model", tmp_path / "nothing")
        assert (missing.exit_code, missing.stderr.count("\n")) == (2, 2)

    @pytest.mark.parametrize(
        "options", [["--data", "--sample", "1%"], ["--recompute", "1%"], ["--model", "gpt2"], ["--max-error", "-1"]]
    )
    def test_options_that_do_not_go_together_are_refused(self, directory: Path, options: list[str]) -> None:
        assert run("verify", "--db", directory, *options).exit_code == 2
