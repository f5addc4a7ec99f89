"""What storing costs: the caller who waits for a result, and the disk."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Sequence
from functools import partial
from io import FileIO
from pathlib import Path

import torch

import backprompt_db as bp
from backprompt_db.database.writer import NewPart
from backprompt_db.prompt.ids import TokenizerId, WeightsId
from backprompt_db.prompt.representation import Array, Origin, Part
from backprompt_db.store.contract import Key
from benchmarks import plain
from benchmarks.report import Measurement
from benchmarks.timing import Times, seconds, timed
from benchmarks.workload import REPETITIONS, TOKEN_NBYTES, digits, gpt2, language_model
from tests.conftest import train_tokenizer

NUM_PROMPTS = 8
PROMPT_TOKENS = 500
NUM_ROUNDS = 3
TOLERANCE = 1e-4

PARTS_TOKENS = (300, 500, 700, 950, 400, 850, 600, 900, 250)
"""Tokens of the kv parts of one round: 18 to 70 MB each, 402 MB together."""

Answer = tuple[torch.Tensor, torch.Tensor]


def cold_runs(directory: Path) -> list[Measurement]:
    """Prompts in sequence that are computed and stored, against the same computation without storing.

    The ways alternate by whole sequences, so that what is still being written slows the one that wrote it.
    """
    model, tokenizer = gpt2(), train_tokenizer()
    answers: list[tuple[Answer, Answer]] = []
    waits, rows = list[float](), list[dict[str, float]]()
    with bp.open(directory / "scratch") as db:
        lm = language_model(model, db)

        def stored(prompt: str) -> Answer:
            result = lm(prompt)
            return result.token_logprobs[1:], result.logits

        def computed(prompt: str) -> Answer:
            ids = torch.tensor(tokenizer(prompt)["input_ids"])
            output = plain.run(model, ids[None], use_cache=True)
            return plain.chosen(output.logits[0, :-1], ids[1:]), output.logits[0, -1].clone()

        for number in range(NUM_ROUNDS):
            prompts = [digits(PROMPT_TOKENS, seed=100 * number + index) for index in range(NUM_PROMPTS)]
            theirs = [timed(partial(computed, prompt)) for prompt in prompts]
            ours = [timed(partial(stored, prompt)) for prompt in prompts]
            waits.append(seconds(db.flush))
            rows += [{"ours": a, "plain": b} for (a, _), (b, _) in zip(ours, theirs, strict=True)]
            answers += [(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True)]
    for (logprobs, logits), (plain_logprobs, plain_logits) in answers:
        assert torch.allclose(logprobs, plain_logprobs, atol=TOLERANCE, rtol=0)
        assert torch.allclose(logits.log_softmax(-1), plain_logits.log_softmax(-1), atol=TOLERANCE, rtol=0)
    return _cold_figures(Times.collect(rows), waits)


def throughput(directory: Path) -> list[Measurement]:
    """Storing large kv parts until they are on disk, against writing and syncing one file of the same bytes."""
    scratch = directory / "scratch"
    scratch.mkdir()
    parts = _parts()
    nbytes = sum(PARTS_TOKENS) * TOKEN_NBYTES
    times = Times.collect([_write_both(scratch, parts) for _ in range(REPETITIONS + 1)][1:])
    what = (
        f"{len(parts)} kv parts, {nbytes / 1e6:.0f} MB, until flush returns, against one synced file of their bytes "
        f"({nbytes / times.median('ours') / 1e6:,.0f} / {nbytes / times.median('file') / 1e6:,.0f} MB/s)"
    )
    return [Measurement("store throughput", what, times.ratio("file", "ours"), "x", 0.6)]


def _cold_figures(times: Times, waits: Sequence[float]) -> list[Measurement]:
    totals = {name: sum(samples) for name, samples in times.samples.items()}
    what = (
        f"{PROMPT_TOKENS}-token prompts, {NUM_PROMPTS} in sequence, computed and stored, until the caller has the "
        f"result, against computing alone ({times.ms('ours')} / {times.ms('plain')}; their sums {totals['ours']:.1f} / "
        f"{totals['plain']:.1f} s)"
    )
    wait = (
        f"until flush() returns after such a sequence, {NUM_PROMPTS * PROMPT_TOKENS * TOKEN_NBYTES / 1e6:.0f} MB of kv"
    )
    return [
        Measurement("cold run", what, times.ratio("ours", "plain"), "x", 1.05, is_lower_better=True),
        Measurement("flush", wait, statistics.median(waits), "s"),
    ]


def _write_both(scratch: Path, parts: Sequence[NewPart]) -> dict[str, float]:
    """Time both ways on new files, which are removed; nothing of one is left to be written during the other."""
    with bp.open(scratch / "db", strict=True) as db:
        db.put([_part("first", torch.zeros(1, 1, 1, 1))])  # makes the catalog
        db.flush()
        times = {"ours": seconds(partial(_store, db, parts))}
        assert db.counters.num_stored == 1 + len(parts)
    shutil.rmtree(scratch / "db")
    times["file"] = seconds(lambda: _write_file(scratch / "file", parts))
    (scratch / "file").unlink()
    return times


def _store(db: bp.Database, parts: Sequence[NewPart]) -> None:
    db.put(parts)
    db.flush()


def _write_file(path: Path, parts: Sequence[NewPart]) -> None:
    with path.open("wb", buffering=0) as file:
        for part in parts:
            for array in part.arrays.values():
                _write_whole(file, array.data)
        os.fsync(file.fileno())


def _write_whole(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _parts() -> list[NewPart]:
    torch.manual_seed(0)
    tensors = [torch.randn(12, 12, num_tokens, 64) for num_tokens in PARTS_TOKENS]
    return [_part(f"part {number}", tensor) for number, tensor in enumerate(tensors)]


def _part(text: str, tensor: torch.Tensor) -> NewPart:
    origin = Origin(
        text=text,
        parents=(),
        start=None,
        weights_id=WeightsId(bytes(32)),
        tokenizer_id=TokenizerId(bytes(32)),
        num_tokens=tensor.shape[2],
        compute_seconds=1.0,
    )
    array = Array.from_torch(tensor)
    return NewPart(Key(origin.address, Part.KV), {"keys": array, "values": array}, origin)
