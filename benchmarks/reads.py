"""Reading what another process stored: a long prefix, and scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import backprompt_db as bp
from backprompt_db.keys import address
from backprompt_db.representation import Part
from backprompt_db.store.contract import Key
from benchmarks.report import Measurement
from benchmarks.workload import digits, gpt2, median_seconds
from tests.conftest import train_tokenizer

PREFIX_TOKENS = 1000
SUFFIX_TOKENS = 8
COMPLETION_TOKENS = 12


def store_prefix(directory: Path) -> None:
    """Run the prefix, and score completions of it, in this process; to be called in one of its own."""
    with bp.open(directory / "db") as db:
        lm = bp.LanguageModel.from_pretrained(str(directory / "model"), db=db)
        lm(digits(PREFIX_TOKENS))
        lm.score(digits(PREFIX_TOKENS), [digits(COMPLETION_TOKENS, seed=99)])


def stored_prefix(directory: Path) -> list[Measurement]:
    """A short suffix of a long stored prefix, against computing everything."""
    model, tokenizer = gpt2(), train_tokenizer()
    with bp.open(directory / "db") as db:
        lm = bp.LanguageModel(model, tokenizer, db=db)
        prefix = lm.text(digits(PREFIX_TOKENS))
        ours: dict[int, torch.Tensor] = {}
        plain: dict[int, torch.Tensor] = {}

        def hit(repetition: int) -> None:
            result = (prefix + digits(SUFFIX_TOKENS, seed=repetition + 1000))()
            assert result.num_computed_tokens == SUFFIX_TOKENS
            ours[repetition] = result.logits

        def cold(repetition: int) -> None:
            text = digits(PREFIX_TOKENS) + digits(SUFFIX_TOKENS, seed=repetition + 1000)
            with torch.no_grad():
                plain[repetition] = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]

        seconds, cold_seconds = median_seconds(hit), median_seconds(cold)
        for repetition, logits in ours.items():
            assert torch.allclose(logits.log_softmax(-1), plain[repetition].log_softmax(-1), atol=1e-4)
        kv = Key(address(prefix.segments()[0].id, lm.weights_id, lm.tokenizer_id), Part.KV)
        nbytes = next(nbytes for key, nbytes in db.store.keys() if key == kv)
    tensors_nbytes = 12 * 2 * 12 * PREFIX_TOKENS * 64 * 4
    what = (
        f"{PREFIX_TOKENS}-token prefix stored by another process, {SUFFIX_TOKENS}-token suffix, against computing all"
    )
    return [
        Measurement("stored prefix", f"{what} ({cold_seconds * 1e3:.0f} ms / {seconds * 1e3:.0f} ms)",
                    cold_seconds / seconds, "x", 8),
        Measurement("kv part on disk", f"bytes of the part over bytes of the tensors ({nbytes:,})",
                    nbytes / tensors_nbytes, "x", 1.01, is_lower_better=True),
    ]  # fmt: skip


def full_hits(directory: Path) -> list[Measurement]:
    """Stored scores, in a process that never loads the model."""
    with bp.open(directory / "db") as db:
        lm = bp.LanguageModel.from_pretrained(str(directory / "model"), db=db)
        prefix, completion = digits(PREFIX_TOKENS), digits(COMPLETION_TOKENS, seed=99)
        scored: list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = []
        seconds = median_seconds(lambda _: scored.append(lm.score(prefix, [completion])))
        result = lm(prefix)
        whole_seconds = median_seconds(lambda _: lm(prefix).logits)
        assert not lm.is_loaded
        assert lm.counters.num_model_calls == 0
        assert all(np.array_equal(each, scored[0]) for each in scored)
        expected = _plain_score(prefix, completion)
    assert abs(scored[0][0] - expected) < 1e-3
    assert result.num_computed_tokens == 0
    what = f"score of a stored completion, model not in memory (whole prompt with logits: {whole_seconds * 1e6:.0f} us)"
    return [Measurement("full hit", what, seconds * 1e6, "us", 500, is_lower_better=True)]


def _plain_score(prefix: str, completion: str) -> float:
    tokenizer = train_tokenizer()
    ids = torch.tensor([tokenizer(prefix)["input_ids"] + tokenizer(completion)["input_ids"]])
    with torch.no_grad():
        logprobs = gpt2()(ids).logits[0].log_softmax(-1)
    return float(logprobs[:-1].gather(1, ids[0, 1:, None])[-COMPLETION_TOKENS:].sum())
