"""What is loaded from files that have not changed is recognised, on one machine, without reading all of it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import backprompt_db as bp
from backprompt_db.compute import tokens
from backprompt_db.compute.inference import fingerprint
from backprompt_db.compute.inference.runner import ModelRunner
from backprompt_db.errors import ModelMismatch
from tests.conftest import plain_logprobs, tiny_gpt2
from tests.support.patches import by_a_function_of_torch

Digested = list[str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BACKPROMPT_DB_VERDICTS", str(tmp_path / "verdicts"))
    return tmp_path / "verdicts"


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> Digested:
    """What was digested as a whole, one after the other."""
    seen: Digested = []
    whole, definition = fingerprint.weights_id, tokens.definition

    def noted(kind: str, digest: Callable[..., Any]) -> Callable[..., Any]:
        def digest_noted(*arguments: Any) -> Any:
            seen.append(kind)
            return digest(*arguments)

        return digest_noted

    monkeypatch.setattr(fingerprint, "weights_id", noted("weights", whole))
    monkeypatch.setattr(tokens, "definition", noted("tokenizer", definition))
    return seen


Load = Callable[..., bp.LanguageModel]


@pytest.fixture
def directory(tmp_path: Path, tokenizer: Any) -> Path:
    for part in (tiny_gpt2(), tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def load(place: Path, directory: Path, db: bp.Database, digested: Digested) -> Load:
    """Load the model on one database. It has computed there once, and this machine remembers it."""

    def load(**options: Any) -> bp.LanguageModel:
        return bp.LanguageModel.from_pretrained(str(directory), db=db, **options)

    load()("The quick brown fox")
    assert {*digested} == {"weights", "tokenizer"}
    digested.clear()
    return load


def test_a_model_of_unchanged_files_is_not_digested_again(load: Load, digested: Digested) -> None:
    lm = load()
    result = lm("The lazy dog")
    assert digested == []
    logprobs, _ = plain_logprobs(lm.model, result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=1e-4, equal_nan=True)
    assert lm.weights_id == fingerprint.ModelIdentity(lm.model).weights_id()
    assert lm.tokenizer_id == tokens.SegmentTokenizer(lm.tokenizer).id


def test_deterministic_digests_it_again(load: Load, digested: Digested) -> None:
    load(deterministic=True)("The lazy dog")
    assert {*digested} == {"weights", "tokenizer"}


def test_without_a_place_it_is_digested_again(load: Load, digested: Digested, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKPROMPT_DB_VERDICTS", "")
    load()("The lazy dog")
    assert {*digested} == {"weights", "tokenizer"}


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"key": 3}'])
def test_a_file_that_says_nothing_is_replaced(load: Load, digested: Digested, place: Path, content: bytes) -> None:
    (file,) = place.glob("*-files.json")
    whole = file.read_bytes()
    file.write_bytes(content)
    load()("The lazy dog")
    assert {*digested} == {"weights", "tokenizer"}
    assert file.read_bytes() == whole


def test_other_weights_in_the_files_are_another_model(load: Load, directory: Path) -> None:
    before = load().weights_id
    tiny_gpt2(seed=1).save_pretrained(directory)
    assert load().weights_id != before


def test_an_unchanged_model_is_another_one_in_patched_code(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load()
    by_a_function_of_torch(None, monkeypatch)
    with pytest.raises(ModelMismatch):
        lm("The lazy dog")


def test_tensors_that_loading_fills_otherwise_are_another_model(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ModelRunner.load

    def fill(name: str, arguments: dict[str, Any]) -> ModelRunner:
        runner = original(name, arguments)
        with torch.no_grad():
            runner.model.transformer.wpe.weight.add_(torch.rand(1))
        return runner

    monkeypatch.setattr(ModelRunner, "load", fill)
    lm = load()
    with pytest.raises(ModelMismatch):
        lm("The lazy dog")


def test_another_start_of_the_tokenizer_is_another_tokenizer(load: Load, directory: Path) -> None:
    before = load()
    config = directory / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"</s>"', '"<s>"'))
    after = load()
    after("The lazy dog")
    assert (after.weights_id, after.tokenizer_id != before.tokenizer_id) == (before.weights_id, True)
