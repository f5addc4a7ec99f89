"""Copies of a database that share its files by hard links, as `cp -al` makes them: neither may be written to."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.operations.doctor import diagnose
from backprompt_db.operations.doctor_checks import Status
from tests.support.cli import run
from tests.support.faults import assert_reads_back, prompt, put_prompts, wanted_of


@pytest.fixture
def copies(tmp_path: Path) -> list[Path]:
    """A database with one prompt, and its copy."""
    with bp.open(tmp_path / "db") as db:
        put_prompts(db, [0])
    shutil.copytree(tmp_path / "db", tmp_path / "copy", copy_function=os.link)
    return [tmp_path / "db", tmp_path / "copy"]


def test_both_are_read_and_neither_is_written_to(copies: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    for place in copies:
        with caplog.at_level(logging.WARNING), bp.open(place) as db:
            assert_reads_back(db, [0])
            put_prompts(db, [1])
            assert not db.fetch(wanted_of(prompt(1)[2:]))
        assert "is a hard link to a file that another directory has too" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("name", ["store/data.mdb", "store/lock.mdb", "catalog.sqlite"])
def test_one_linked_file_is_enough(copies: list[Path], name: str) -> None:
    place, copy = copies
    shutil.rmtree(copy)
    os.link(place / name, place.parent / "linked")
    with bp.open(place) as db:
        assert db.readonly
        assert_reads_back(db, [0])


def test_commands_and_the_doctor_say_what_to_do(copies: list[Path]) -> None:
    done = run("evict", "--to", "0", "--db", copies[0])
    assert done.exit_code == 2
    [check] = [check for check in diagnose(copies[0]) if check.name == "writing"]
    assert check.status is Status.PROBLEM
    assert "hard link" in check.what
    assert "cp -a" in (check.remedy or "")


def test_a_real_copy_mends_it(copies: list[Path]) -> None:
    place, copy = copies
    shutil.copytree(place, place.with_name("own"))
    shutil.rmtree(copy)
    for each in (place, place.with_name("own")):
        with bp.open(each) as db:
            put_prompts(db, [1])
        with bp.open(each) as db:
            assert_reads_back(db, [0, 1])
