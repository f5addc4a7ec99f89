"""Bytes on disk and in memory by the number of tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

import backprompt_db as bp
from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.system.platform import room_nbytes
from benchmarks import plain
from benchmarks.plots.curves import Curve, Figure
from benchmarks.workload import TOKEN_NBYTES, digits, gpt2, in_fresh_process, language_model
from tests.conftest import train_tokenizer

NUMS_TOKENS = (128, 256, 512, 1024, 2048, 4096)
SUFFIX_TOKENS = 8
NUM_POSITIONS = max(NUMS_TOKENS) + SUFFIX_TOKENS
MIB = 1 << 20


def memory_and_disk(directory: Path) -> Figure:
    """Store prompts of each length in a database of each fidelity; then use each in a process of its own."""
    disk = {each: in_fresh_process(partial(_disk, fidelity=each), directory) for each in Fidelity}
    hits = [in_fresh_process(partial(_peak_of_hit, num_tokens=num), directory) for num in NUMS_TOKENS]
    colds = [in_fresh_process(partial(_peak_of_computing, num_tokens=num), directory) for num in NUMS_TOKENS]
    tensors = [num * TOKEN_NBYTES / MIB for num in NUMS_TOKENS]
    return Figure(
        name="bytes-by-tokens",
        title="Bytes of one prompt",
        what=(
            "GPT-2 124M, seeded; disk: what all files of a database take up, over an empty one; memory: the peak over"
            " what the process had with the model loaded, with the pages of the mapped file, each point in a process of"
            " its own"
        ),
        size_label="tokens",
        value_label="MiB",
        curves=[
            *(Curve(f"disk, {fidelity.value}", NUMS_TOKENS, disk[fidelity]) for fidelity in Fidelity),
            Curve(f"memory, a hit and {SUFFIX_TOKENS} new tokens", NUMS_TOKENS, hits),
            Curve("memory, everything computed by transformers", NUMS_TOKENS, colds),
            Curve("keys and values alone", NUMS_TOKENS, tensors, is_bound=True),
        ],
    )


def _disk(directory: Path, *, fidelity: Fidelity) -> list[float]:
    model = gpt2(num_positions=NUM_POSITIONS)
    return [
        _disk_of(model, _place(directory, num_tokens, fidelity), num_tokens, fidelity) for num_tokens in NUMS_TOKENS
    ]


def _disk_of(model: Any, path: Path, num_tokens: int, fidelity: Fidelity) -> float:
    with bp.open(path, fidelity=fidelity.value) as db:
        lm = language_model(model, db)
        empty = _allocated(path)
        lm(digits(num_tokens))
        db.flush()
        return (_allocated(path) - empty) / MIB


def _peak_of_hit(directory: Path, *, num_tokens: int) -> float:
    with bp.open(_place(directory, num_tokens, Fidelity.EXACT)) as db:
        lm = language_model(gpt2(num_positions=NUM_POSITIONS), db)
        text = lm.text(digits(num_tokens)) + digits(SUFFIX_TOKENS, seed=1)
        with _Peak() as peak:
            result = text()
        assert result.num_computed_tokens == SUFFIX_TOKENS
    return peak.mib


def _peak_of_computing(directory: Path, *, num_tokens: int) -> float:  # noqa: ARG001  # as the others take it
    model = gpt2(num_positions=NUM_POSITIONS)
    ids = train_tokenizer()(digits(num_tokens) + digits(SUFFIX_TOKENS, seed=1))["input_ids"]
    plain.run(model, torch.tensor([ids[:SUFFIX_TOKENS]]))
    with _Peak() as peak:
        plain.prefill(model, ids)
    return peak.mib


class _Peak:
    """The peak of a process's memory within a block, over what it had before: Linux counts it anew when told to."""

    mib: float

    def __enter__(self) -> _Peak:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.mib = (_status("VmHWM") - self._before) / 1024


def _status(name: str) -> int:
    """Return a figure of this process's memory in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _place(directory: Path, num_tokens: int, fidelity: Fidelity) -> Path:
    return directory / f"{fidelity.value}-{num_tokens}"


def _allocated(path: Path) -> int:
    return sum(room_nbytes(file.stat()) for file in path.rglob("*") if file.is_file())
