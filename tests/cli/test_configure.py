"""What `init` and `config` take, and refuse, on the command line."""

from __future__ import annotations

import grp
import os
import pwd
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import backprompt_db as bp
from backprompt_db.cli.app import app
from backprompt_db.database.config import read_config
from tests.support.cli import run, run_json
from tests.support.faults import put_prompts

assert sys.platform != "win32"


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


@pytest.mark.parametrize(
    ("shared", "members", "said"),
    [
        ("private", [], "Only {owner} can read and write it."),
        ("group", [], "{owner} and the members of the group crew (none are listed) can read and write it."),
        ("group", ["ben", "ann"], "{owner} and the members of the group crew (ann, ben) can read and write it."),
        (
            "readers",
            list("abcde"),
            "{owner} can read and write it, and the members of the group crew (a, b, c, d, e) can",
        ),
        ("readers", list("gfedcba"), "the members of the group crew (a, b, c, d, e and 2 more) can read it."),
    ],
)
def test_who_can_use_a_new_database_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str, members: list[str], said: str
) -> None:
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name="crew", gr_mem=members[1:]))
    own = [SimpleNamespace(pw_name=name, pw_gid=os.getegid()) for name in members[:1]]
    monkeypatch.setattr(pwd, "getpwall", lambda: [*own, SimpleNamespace(pw_name="stranger", pw_gid=-1)])
    owner = pwd.getpwuid(os.geteuid()).pw_name
    result = run("init", tmp_path / "db", "--shared", shared)
    assert said.format(owner=owner) in result.stdout
    changed = run("config", "--db", tmp_path / "db", "--shared", shared)
    assert said.format(owner=owner) in changed.stdout
    assert "crew" not in run("config", "--db", tmp_path / "db").stdout
    assert run_json("config", "--db", tmp_path / "db", "--shared", shared)["sharing"] == shared


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
