"""What `init` and `config` take, and refuse, on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import backprompt_db as bp
from backprompt_db.cli.app import app
from backprompt_db.database.config import read_config
from tests.support.faults import put_prompts


def test_none_is_no_limit_and_for_ever(tmp_path: Path) -> None:
    bp.open(tmp_path / "db").close()
    result = CliRunner().invoke(app, ["config", "--db", str(tmp_path / "db"), "--max-size", "none", "--ttl", "none"])
    assert result.exit_code == 0
    assert read_config(tmp_path / "db").max_nbytes is None
    assert read_config(tmp_path / "db").ttl_seconds is None


@pytest.mark.parametrize("option", [["--max-size", "0"], ["--max-size", "0.4"], ["--ttl", "0s"]])
def test_nothing_does_not_mean_no_limit(tmp_path: Path, option: list[str]) -> None:
    bp.open(tmp_path / "db").close()
    before = read_config(tmp_path / "db")
    result = CliRunner().invoke(app, ["config", "--db", str(tmp_path / "db"), *option])
    assert result.exit_code == 2
    assert "leaves nothing" in result.stderr
    assert read_config(tmp_path / "db") == before


@pytest.mark.parametrize("number", [2**32 - 1, 2**32, 10**20])
def test_a_number_that_no_group_can_have_is_an_unknown_group(tmp_path: Path, number: int) -> None:
    bp.open(tmp_path / "db").close()
    result = CliRunner().invoke(app, ["config", "--db", str(tmp_path / "db"), "--shared", f"group:{number}"])
    assert result.exit_code == 2
    assert f"there is no group '{number}'" in result.stderr


def test_a_process_that_has_the_database_open_follows_a_change_of_sharing(tmp_path: Path) -> None:
    place = tmp_path / "db"
    with bp.open(place) as db:
        put_prompts(db, [0])
        assert CliRunner().invoke(app, ["config", "--db", str(place), "--shared", "group"]).exit_code == 0
        (place / "writing.lock").unlink()
        put_prompts(db, [1])
        assert (place / "writing.lock").stat().st_mode & 0o777 == 0o660
        db.evictor.evict(to_nbytes=0)
        assert (place / "collect.lock").stat().st_mode & 0o777 == 0o660
