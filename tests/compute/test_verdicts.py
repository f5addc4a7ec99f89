"""A model is checked once on a machine, whatever the number of databases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import backprompt_db as bp
from backprompt_db.compute.inference.selfcheck import examine
from backprompt_db.errors import UnsupportedModel
from tests.conftest import plain_logprobs, tiny_gpt2
from tests.support.families import by_name

Examined = list[Any]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BACKPROMPT_DB_VERDICTS", str(tmp_path / "verdicts"))
    return tmp_path / "verdicts"


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> Examined:
    """The models that were examined, one after the other."""
    seen: Examined = []

    def noted(model: Any) -> Any:
        seen.append(model)
        return examine(model)

    monkeypatch.setattr("backprompt_db.compute.inference.runner.examine", noted)
    return seen


def verdicts(place: Path) -> list[Path]:
    """The files of verdicts; those of canaries lie beside them."""
    return [file for file in place.iterdir() if "canary" not in file.name]


def run(model: Any, tokenizer: Any) -> bp.ModelRepr:
    with bp.open(":memory:") as db:
        return bp.LanguageModel(model, tokenizer, db=db)("The quick brown fox")


def test_a_second_database_needs_no_check(place: Path, examined: Examined, gpt2: Any, tokenizer: Any) -> None:
    first, second = run(gpt2, tokenizer), run(gpt2, tokenizer)
    assert len(examined) == 1
    logprobs, _ = plain_logprobs(gpt2, first.input_ids)
    for result in (first, second):
        assert torch.allclose(result.token_logprobs[1:], logprobs[1:], atol=1e-4)
    assert len(verdicts(place)) == 1
    assert place.stat().st_mode & 0o777 == 0o700


def test_a_database_lists_the_verdict_that_it_took_over(
    place: Path, examined: Examined, gpt2: Any, tokenizer: Any, open_db: Callable[..., bp.Database]
) -> None:
    run(gpt2, tokenizer)
    db = open_db()
    bp.LanguageModel(gpt2, tokenizer, db=db)("The quick")
    assert db.catalog is not None
    (record,) = db.catalog.models()
    assert (record.verdict, record.name) == ("packs", "GPT2LMHeadModel")
    assert len(examined) == 1
    assert len(verdicts(place)) == 1


def test_other_weights_are_checked(place: Path, examined: Examined, gpt2: Any, tokenizer: Any) -> None:
    run(gpt2, tokenizer)
    run(tiny_gpt2(seed=1), tokenizer)
    assert len(examined) == 2
    assert len(verdicts(place)) == 2


def test_a_refusal_is_remembered_too(place: Path, examined: Examined, tokenizer: Any) -> None:
    model = by_name("mamba").build()
    for _ in range(2):
        with pytest.raises(UnsupportedModel):
            run(model, tokenizer)
    assert len(examined) == 1
    assert len(verdicts(place)) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"verdict": 3}', b"null"])
def test_a_file_that_says_nothing_is_replaced(
    place: Path, examined: Examined, gpt2: Any, tokenizer: Any, content: bytes
) -> None:
    run(gpt2, tokenizer)
    (file,) = verdicts(place)
    whole = file.read_bytes()
    file.write_bytes(content)
    run(gpt2, tokenizer)
    assert len(examined) == 2
    assert file.read_bytes() == whole


def test_what_another_version_found_is_checked_again(
    place: Path, examined: Examined, gpt2: Any, tokenizer: Any
) -> None:
    run(gpt2, tokenizer)
    (file,) = verdicts(place)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"checked_with": "check 1, torch 1.0"}))
    run(gpt2, tokenizer)
    assert len(examined) == 2


def test_a_directory_that_cannot_be_written_costs_a_check(
    place: Path, examined: Examined, gpt2: Any, tokenizer: Any
) -> None:
    place.write_text("no directory")
    run(gpt2, tokenizer)
    run(gpt2, tokenizer)
    assert len(examined) == 2


def test_an_empty_variable_means_nowhere(
    place: Path, examined: Examined, gpt2: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKPROMPT_DB_VERDICTS", "")
    run(gpt2, tokenizer)
    run(gpt2, tokenizer)
    assert len(examined) == 2
    assert not place.exists()
