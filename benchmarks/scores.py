"""Full hits: stored scores and representations, in a process that never loads the model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import backprompt_db as bp
from benchmarks import plain
from benchmarks.report import Measurement
from benchmarks.timing import Times, alternate, seconds
from benchmarks.workload import REPETITIONS, digits, gpt2, in_fresh_process, leaves
from tests.conftest import train_tokenizer

PREFIX_TOKENS = 1000
NUM_COMPLETIONS = 1000
COMPLETION_TOKENS = 3
NUM_TEXTS = 200
TEXT_TOKENS = 100
NUM_COMPARED = 20


def stored_scores(directory: Path) -> list[Measurement]:
    """Representations per second from one thread, out of the file and out of memory, and the latency of one."""
    in_fresh_process(_store, directory)
    prefix, completions = digits(PREFIX_TOKENS), _completions()
    few = leaves(NUM_TEXTS, COMPLETION_TOKENS)
    ways: dict[str, Callable[[bp.LanguageModel], Any]] = {
        "scores": lambda lm: lm.score(prefix, completions),
        "texts": lambda lm: len(lm(_texts(lm, few))),
        "one score": lambda lm: lm.score(prefix, completions[:1]),
        "one text": lambda lm: lm(prefix).logits,
    }
    opened = Times.collect([_out_of_the_file(directory, ways) for _ in range(REPETITIONS + 1)][1:])
    with bp.open(directory / "scratch") as db:
        lm = _language_model(directory, db)
        kept = alternate({name: partial(_again, partial(way, lm)) for name, way in ways.items()})
        assert not lm.is_loaded
    scored = kept.results["scores"]
    assert all(np.array_equal(each, scored[0]) for each in scored)
    expected = _plain_scores(prefix, completions[:NUM_COMPARED])
    assert np.allclose(scored[0][:NUM_COMPARED], expected, atol=1e-3, rtol=0)
    rates = {name: _per_second(opened, kept, name) for name in ("scores", "texts")}
    return [
        Measurement("stored scores", f"scores of {NUM_COMPLETIONS:,} stored completions of a prompt, out of the file, "
                    f"model not loaded (out of memory: {rates['scores'][1]:,.0f}/s)", rates["scores"][0], "/s",
                    5000),
        Measurement("stored texts", f"{NUM_TEXTS} stored texts run in one call, out of the file, logits read too "
                    f"(out of memory: {rates['texts'][1]:,.0f}/s)", rates["texts"][0], "/s"),
        Measurement("full hit", "score of one stored completion, model not in memory (whole prompt with logits: "
                    f"{kept.median('one text') * 1e6:.0f} us)", kept.median("one score") * 1e6, "us",
                    500, is_lower_better=True),
    ]  # fmt: skip


def _per_second(opened: Times, kept: Times, name: str) -> tuple[float, float]:
    """Return representations per second, the first time after opening and after that."""
    number = {"scores": NUM_COMPLETIONS, "texts": NUM_TEXTS}[name]
    return number / statistics.median(opened.samples[name]), number / kept.median(name)


def _again(run: Callable[[], Any], _: int) -> Any:
    return run()


def _out_of_the_file(directory: Path, ways: dict[str, Callable[[bp.LanguageModel], Any]]) -> dict[str, float]:
    """Time each way once on a database that was just opened, and has nothing in memory."""
    with bp.open(directory / "scratch") as db:
        lm = _language_model(directory, db)
        times = {name: seconds(partial(way, lm)) for name, way in ways.items()}
        assert not lm.is_loaded
        return times


def _store(directory: Path) -> None:
    with bp.open(directory / "scratch") as db:
        lm = _language_model(directory, db)
        lm.score(digits(PREFIX_TOKENS), _completions())
        lm(_texts(lm, leaves(NUM_TEXTS, COMPLETION_TOKENS)))


def _language_model(directory: Path, db: bp.Database) -> bp.LanguageModel:
    return bp.LanguageModel.from_pretrained(str(directory / "model"), db=db, progress=False)


def _completions() -> list[str]:
    return leaves(NUM_COMPLETIONS, COMPLETION_TOKENS)


def _texts(lm: bp.LanguageModel, few: Sequence[str]) -> list[bp.Text]:
    beginning = lm.text(digits(TEXT_TOKENS, seed=1))
    return [beginning + leaf for leaf in few]


def _plain_scores(prefix: str, completions: list[str]) -> list[float]:
    tokenizer = train_tokenizer()
    filled = plain.prefill(gpt2(), tokenizer(prefix)["input_ids"])
    return plain.score_batch(gpt2(), filled, tokenizer(completions)["input_ids"])
