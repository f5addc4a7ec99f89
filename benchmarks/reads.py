"""A short suffix after a long prefix that another process stored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import backprompt_db as bp
from backprompt_db.prompt.ids import address
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from benchmarks import plain
from benchmarks.plain import Prefix, Reader
from benchmarks.report import Measurement
from benchmarks.timing import Run, Times, alternate, timed
from benchmarks.workload import REPETITIONS, TOKEN_NBYTES, digits, gpt2, in_fresh_process, language_model
from tests.conftest import train_tokenizer

PREFIX_TOKENS = 1000
SUFFIX_TOKENS = 8
NUM_PROMPTS = 100
TOLERANCE = 1e-4

Answer = tuple[torch.Tensor, torch.Tensor]
"""Log-probabilities of the suffix's tokens [T], and the logits after it [vocab_size]."""


def store_prefix(directory: Path) -> None:
    """Run the prefix in this process, to be called in one of its own; save a transformers cache of it as files too."""
    with bp.open(directory / "db") as db:
        lm = bp.LanguageModel.from_pretrained(str(directory / "model"), db=db, progress=False)
        lm(digits(PREFIX_TOKENS))
        plain.save_tensors(_prefix(lm.model).cache, _file(directory))


def fresh_processes(directory: Path) -> list[Measurement]:
    """The first hit of the stored prefix in a process, against what a user could do by hand in that process."""
    rows = [in_fresh_process(partial(_first_hit, number=number), directory) for number in range(REPETITIONS)]
    times = Times.collect(rows)
    ram = times.fastest(["StaticCache", "in place"])
    file = times.fastest(list(plain.READERS))
    hit = f"{PREFIX_TOKENS:,}-token prefix from disk, {SUFFIX_TOKENS}-token suffix, first hit of a process"

    def what(baseline: str, name: str) -> str:
        return f"{hit}, against {baseline} ({times.ms('ours')} / {times.ms(name)})"

    everything = (
        f"{hit}, against computing everything for the last logits ({times.ms('everything')} / {times.ms('ours')})"
    )
    return [
        Measurement("hit against RAM", what(f"a preallocated cache in memory, {ram}", ram), times.ratio("ours", ram),
                    "x", 1.25, is_lower_better=True, goal=1.15),
        Measurement("hit against computing", everything, times.ratio("everything", "ours"), "x", 10, goal=12),
        Measurement("hit against a file", what(f"a cache in a mapped file, {file}", file), times.ratio("ours", file),
                    "x", 0.75, is_lower_better=True),
        Measurement("hit against a copy", what("a deepcopy of a DynamicCache in memory", "deepcopy"),
                    times.ratio("ours", "deepcopy"), "x", 1.0, is_lower_better=True),
    ]  # fmt: skip


def one_process(directory: Path) -> list[Measurement]:
    """Many prompts after one prefix: it is read once."""
    model = gpt2()
    prefix = _prefix(model)
    cache = plain.in_place(prefix.cache, capacity=PREFIX_TOKENS + SUFFIX_TOKENS)
    with bp.open(directory / "db") as db, patch.object(db.store, "scan", wraps=db.store.scan) as scan:
        lm = language_model(model, db)

        def hit(repetition: int) -> Answer:
            return _hit(lm, digits(SUFFIX_TOKENS, seed=2000 + repetition))

        def in_ram(repetition: int) -> Answer:
            plain.keep(cache, PREFIX_TOKENS)
            ids = _ids(lm.tokenizer, digits(SUFFIX_TOKENS, seed=2000 + repetition))
            return plain.continue_prefix(model, Prefix(cache, prefix.logits), ids)

        with patch.object(db.store, "get", wraps=db.store.get) as get:
            times = alternate({"ours": hit, "RAM": in_ram}, repetitions=NUM_PROMPTS - 1)
        reads = [call.args[0] for call in (*scan.call_args_list, *get.call_args_list)]
    for ours, theirs in zip(times.results["ours"], times.results["RAM"], strict=True):
        _assert_close(ours, theirs)
    num_reads = sum(key.part is Part.KV for key in reads)
    what = f"the same prefix in a loop, against a preallocated cache in memory ({times.ms('ours')} / {times.ms('RAM')})"
    return [
        Measurement("loop against RAM", what, times.ratio("ours", "RAM"), "x"),
        _all_logits(model, train_tokenizer()),
        Measurement("reads of the prefix", f"its kv part out of the store, for {NUM_PROMPTS} prompts", num_reads,
                    "times", 1, is_lower_better=True),
    ]  # fmt: skip


def kv_on_disk(directory: Path) -> list[Measurement]:
    """Bytes of a stored kv part, against those of its tensors."""
    with bp.open(directory / "db") as db:
        lm = bp.LanguageModel.from_pretrained(str(directory / "model"), db=db)
        segment = lm.text(digits(PREFIX_TOKENS)).segments()[0]
        kv = Key(address(segment.id, lm.weights_id, lm.tokenizer_id), Part.KV)
        nbytes = next(nbytes for key, nbytes in db.store.keys() if key == kv)
    what = f"bytes of the part over bytes of the tensors ({nbytes:,})"
    ratio = nbytes / (PREFIX_TOKENS * TOKEN_NBYTES)
    return [Measurement("kv part on disk", what, ratio, "x", 1.01, is_lower_better=True)]


def _all_logits(model: Any, tokenizer: Any) -> Measurement:
    """Show which way to compute everything is the faster one, that hits are compared with."""
    whole = torch.tensor([_ids(tokenizer, digits(PREFIX_TOKENS + SUFFIX_TOKENS))])
    ways: dict[str, Run] = {
        "all": lambda _: plain.run(model, whole, use_cache=False).logits.shape,
        "last": lambda _: plain.run(model, whole, use_cache=False, logits_to_keep=1).logits.shape,
    }
    times = alternate(ways, repetitions=1)
    what = (
        f"all logits of {whole.shape[1]:,} tokens, over the last alone, once ({times.ms('all')} / {times.ms('last')})"
    )
    return Measurement("computing everything", what, times.ratio("all", "last"), "x")


def _first_hit(directory: Path, *, number: int) -> dict[str, float]:
    """Time one hit of the stored prefix, the first in this process; then each other way, after one warm-up."""
    suffix = digits(SUFFIX_TOKENS, seed=1000 + number)
    with bp.open(directory / "db") as db:
        lm = bp.LanguageModel.from_pretrained(str(directory / "model"), db=db, progress=False)
        unrelated = digits(16, seed=3000 + number)
        lm(unrelated)
        model = lm.model
        plain.run(model, torch.tensor([_ids(lm.tokenizer, unrelated)]))
        db.flush()
        own_seconds, ours = timed(lambda: _hit(lm, suffix))
        db.flush()
    ids = _ids(lm.tokenizer, suffix)
    times = {"ours": own_seconds}
    for name, way in _other_ways(model, directory, ids).items():
        way()
        times[name], theirs = timed(way)
        _assert_close(ours, theirs)
    return times


def _other_ways(model: Any, directory: Path, ids: list[int]) -> Mapping[str, Callable[[], Answer]]:
    prefix = _prefix(model)
    whole = torch.tensor([_ids(train_tokenizer(), digits(PREFIX_TOKENS)) + ids])
    capacity = PREFIX_TOKENS + len(ids)
    kept = {
        "StaticCache": plain.static(model, prefix.cache, capacity=capacity),
        "in place": plain.in_place(prefix.cache, capacity=capacity),
    }

    def after(cache: Any) -> Answer:
        return plain.continue_prefix(model, Prefix(cache, prefix.logits), ids)

    def after_kept(name: str) -> Answer:
        return after(plain.keep(kept[name], PREFIX_TOKENS))

    def after_reading(read: Reader) -> Answer:
        return after(plain.read_cache(_file(directory), read))

    def everything() -> Answer:
        logits = plain.run(model, whole, logits_to_keep=1, use_cache=False).logits[0]
        return torch.empty(0), logits[-1]

    return {
        **{name: partial(after_kept, name) for name in kept},
        **{name: partial(after_reading, read) for name, read in plain.READERS.items()},
        "deepcopy": lambda: after(copy.deepcopy(prefix.cache)),
        "everything": everything,
    }


def _hit(lm: bp.LanguageModel, suffix: str) -> Answer:
    result = (lm.text(digits(PREFIX_TOKENS)) + suffix)()
    assert result.num_computed_tokens == SUFFIX_TOKENS
    return result.token_logprobs[-SUFFIX_TOKENS:], result.logits


def _assert_close(ours: Answer, theirs: Answer) -> None:
    """Compare the last logits, and the suffix's log-probabilities where the other way gives them."""
    if len(theirs[0]):
        assert torch.allclose(ours[0], theirs[0], atol=TOLERANCE, rtol=0)
    assert torch.allclose(ours[1].log_softmax(-1), theirs[1].log_softmax(-1), atol=TOLERANCE, rtol=0)


def _prefix(model: Any) -> Prefix:
    return plain.prefill(model, _ids(train_tokenizer(), digits(PREFIX_TOKENS)))


def _ids(tokenizer: Any, string: str) -> list[int]:
    return list(tokenizer(string)["input_ids"])


def _file(directory: Path) -> Path:
    return directory / "prefix.safetensors"
