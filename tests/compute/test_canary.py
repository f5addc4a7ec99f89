"""A fixed pass is compared with what it gave on this machine: what changes passes and has no id stores nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import backprompt_db as bp
from backprompt_db.compute.inference import canary
from backprompt_db.compute.inference.canary import Canary
from backprompt_db.compute.inference.fingerprint import weights_id
from backprompt_db.compute.inference.selfcheck import proven_head
from backprompt_db.errors import ModelMismatch
from tests.conftest import cases, plain_logprobs, tiny_gpt2
from tests.support.families import REPRESENTED, Family

PROMPT = "The quick brown fox"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BACKPROMPT_DB_VERDICTS", str(tmp_path / "verdicts"))
    return tmp_path / "verdicts"


@pytest.fixture
def lm(make_lm: Callable[..., bp.LanguageModel], place: Path) -> bp.LanguageModel:
    """A language model that has left its canary in the place."""
    lm = make_lm()
    lm(PROMPT)
    return lm


def canary_file(place: Path) -> Path:
    (file,) = place.glob("*canary*")
    return file


def num_stored(db: bp.Database) -> int:
    db.flush()
    return db.stats().num_representations


def exchange_compiled_code(patcher: pytest.MonkeyPatch) -> None:
    """Patch what GPT-2's activation calls by other compiled code, which is no more than a name."""
    patcher.setattr(torch, "tanh", torch.sigmoid)


def test_the_numbers_of_an_unseen_patch_are_refused_and_nothing_is_stored(
    lm: bp.LanguageModel, make_lm: Callable[..., bp.LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange_compiled_code(monkeypatch)
    other = make_lm(tiny_gpt2())
    assert other.weights_id == lm.weights_id
    for _ in range(2):
        with pytest.raises(ModelMismatch, match="other numbers than it did on this machine"):
            other(PROMPT)
    with pytest.raises(ModelMismatch):
        other.generate(PROMPT, max_new_tokens=2)
    assert num_stored(other.db) == 0


def test_once_the_patch_is_gone_the_same_object_computes(
    lm: bp.LanguageModel, make_lm: Callable[..., bp.LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_lm(tiny_gpt2())
    with monkeypatch.context() as patcher:
        exchange_compiled_code(patcher)
        with pytest.raises(ModelMismatch):
            other(PROMPT)
    assert torch.equal(other(PROMPT).token_logprobs[1:], lm(PROMPT).token_logprobs[1:])


def test_an_unpatched_model_computes_what_plain_passes_do(
    lm: bp.LanguageModel, place: Path, make_lm: Callable[..., bp.LanguageModel]
) -> None:
    before = canary_file(place).read_bytes()
    result = make_lm(tiny_gpt2())(PROMPT)
    logprobs, _ = plain_logprobs(lm.model, result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=1e-4, equal_nan=True)
    assert canary_file(place).read_bytes() == before


PATCHED = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import backprompt_db as bp
database, model, is_patched = sys.argv[1:]
library = torch.library.Library("aten", "IMPL")
if is_patched == "patched":
    library.impl("tanh", lambda x: torch.sinh(x) / torch.cosh(x) * 0.9, "CPU")
with bp.open(database) as db:
    lm = bp.LanguageModel.from_pretrained(model, db=db)
    try:
        lm("The quick brown fox")
    except bp.errors.ModelMismatch as error:
        print(error)
    db.flush()
    print(db.stats().num_representations)
"""


@pytest.mark.exhaustive
def test_a_kernel_that_another_library_registers_is_noticed_in_the_second_process(
    place: Path, tmp_path: Path, tokenizer: Any
) -> None:
    for part in (tiny_gpt2(), tokenizer):
        part.save_pretrained(tmp_path / "model")

    def run(database: str, is_patched: str) -> str:
        command = [sys.executable, "-c", PATCHED, str(tmp_path / database), str(tmp_path / "model"), is_patched]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert run("one", "plain") == "1\n"
    assert "other numbers" in (out := run("two", "patched"))
    assert out.endswith("\n0\n")
    assert run("three", "plain") == "1\n"


def test_a_canary_of_other_versions_is_ignored(
    lm: bp.LanguageModel, place: Path, make_lm: Callable[..., bp.LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    exchange_compiled_code(monkeypatch)
    other = make_lm(tiny_gpt2())
    other(PROMPT)
    assert num_stored(other.db) == 1
    assert len(list(place.glob("*canary*"))) == 2


def test_a_canary_that_says_that_it_is_of_another_processor_is_ignored(
    lm: bp.LanguageModel, place: Path, make_lm: Callable[..., bp.LanguageModel]
) -> None:
    file = canary_file(place)
    whole = file.read_bytes()
    known = json.loads(whole)
    numbers = {name: [0.0] * len(each) for name, each in known["numbers"].items()}
    file.write_text(json.dumps(known | {"conditions": "another processor", "numbers": numbers}))
    make_lm(tiny_gpt2())(PROMPT)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"numbers": 3}', b"null", b"other dtype"])
def test_a_file_that_says_nothing_is_replaced(
    lm: bp.LanguageModel, place: Path, make_lm: Callable[..., bp.LanguageModel], content: bytes
) -> None:
    file = canary_file(place)
    whole = file.read_bytes()
    is_whole = content == b"other dtype"
    file.write_bytes(whole.replace(b'"kv_dtype":"float32"', b'"kv_dtype":"nn"') if is_whole else content)
    make_lm(tiny_gpt2())(PROMPT)
    assert file.read_bytes() == whole


def test_without_a_place_nothing_is_compared(
    lm: bp.LanguageModel, make_lm: Callable[..., bp.LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKPROMPT_DB_VERDICTS", "")
    exchange_compiled_code(monkeypatch)
    other = make_lm(tiny_gpt2())
    other(PROMPT)
    assert num_stored(other.db) == 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_head_is_proven_once_on_a_machine_and_again_with_deterministic(
    lm: bp.LanguageModel,
    make_lm: Callable[..., bp.LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
    *,
    deterministic: bool,
) -> None:
    proofs = []

    def noted(model: Any) -> Any:
        proofs.append(model)
        return proven_head(model)

    monkeypatch.setattr("backprompt_db.compute.inference.runner.proven_head", noted)
    result = make_lm(tiny_gpt2(), deterministic=deterministic)(PROMPT)
    assert len(proofs) == deterministic
    assert torch.equal(result.token_logprobs[1:], lm(PROMPT).token_logprobs[1:])


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", REPRESENTED, ids=str)
def test_every_family_sings_again_what_it_sang(family: Family, place: Path, tokenizer: Any) -> None:
    results: list[torch.Tensor] = []
    for _ in range(2):
        with bp.open(":memory:") as db:
            try:
                results.append(bp.LanguageModel(family.build(), tokenizer, db=db)(PROMPT).token_logprobs)
            except bp.errors.UnsupportedModel:
                return
    first, second = results
    assert torch.allclose(first, second, atol=1e-5, equal_nan=True)
    canary_file(place)


@pytest.mark.parametrize("dtype", cases([torch.float64, torch.float32, torch.bfloat16], by_default=[torch.bfloat16]))
def test_another_number_of_threads_is_no_other_model(
    place: Path, make_lm: Callable[..., bp.LanguageModel], dtype: torch.dtype
) -> None:
    num_threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            make_lm(tiny_gpt2().to(dtype))(PROMPT)
    finally:
        torch.set_num_threads(num_threads)
    canary_file(place)


def canary_of(**numbers: tuple[float, ...]) -> Canary:
    id_ = weights_id(torch.nn.Linear(1, 1))
    return Canary(id_, "here", (1, 1, 1, 1), "float32", has_head=True, numbers=numbers)


@pytest.mark.parametrize(
    ("error", "is_like"), [(0.0, True), (1e-4, True), (1e-3, False), (float("nan"), False), (float("inf"), False)]
)
def test_rounding_is_let_pass_and_nothing_else(error: float, *, is_like: bool) -> None:
    known = canary_of(logits=(1.0, -1.0), keys=(10.0, -10.0))
    assert canary_of(logits=(1.0 + error, -1.0 - error), keys=(10.0, -10.0)).is_like(known) is is_like


def test_another_shape_or_another_number_of_numbers_is_another_canary() -> None:
    known = canary_of(logits=(1.0, -1.0))
    assert not canary_of(logits=(1.0, -1.0, 1.0)).is_like(known)
    assert not canary_of(keys=(1.0, -1.0)).is_like(known)
    assert not replace(known, kv_dtype="float64").is_like(known)
    assert not replace(known, kv_size=(1, 1, 1, 2)).is_like(known)


def test_numbers_that_are_not_finite_are_not_remembered(place: Path) -> None:
    canary.remember(canary_of(logits=(1.0, float("-inf"))))
    assert not place.exists()
