"""The command line in this process, and prompts for a database to ask it about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

import backprompt_db as bp
from backprompt_db.cli.app import app
from backprompt_db.database.writer import NewPart
from backprompt_db.prompt.ids import TokenizerId, WeightsId
from backprompt_db.prompt.representation import Array, Origin, Part
from backprompt_db.store.contract import Key

CONTROL = "a\x1b[31mred\x07 [bold]b[/bold] :smile: \u202ereversed\ttab"
SQL = "'; DROP TABLE segments; -- % _ \\"
LONG = "The quick brown fox jumps over the lazy dog. " * 5000


def run_prompts(lm: bp.LanguageModel) -> None:
    """Five segments with difficult texts, under two models."""
    context = lm.text("Pick the endpoint for the request.\n")
    for request in ("Request: show me everyone", CONTROL, SQL):
        lm(context + request, keep="all")
    lm.db.put([scores_of(LONG)])


def scores_of(text: str) -> NewPart:
    arrays = {
        "input_ids": Array.from_numpy(np.ones(2, dtype=np.int32)),
        "token_logprobs": Array.from_numpy(np.array([np.nan, -1.5], dtype=np.float32)),
    }
    origin = Origin(text, (), None, WeightsId(b"w" * 32), TokenizerId(b"t" * 32), 2, 0.5)
    return NewPart(Key(origin.address, Part.SCORES), arrays, origin)


def run(*arguments: str | Path, columns: int = 100) -> Result:
    runner = CliRunner(env={"COLUMNS": str(columns), "TERM": "xterm"})
    return runner.invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: str | Path) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)
