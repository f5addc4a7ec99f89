"""Many completions of one stored prefix in one pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

import backprompt_db as bp
from benchmarks.report import Measurement
from benchmarks.workload import digits, gpt2, median_seconds
from tests.conftest import train_tokenizer

PREFIX_TOKENS = 900
NUM_COMPLETIONS = 32
COMPLETION_TOKENS = 12


def completions(directory: Path) -> list[Measurement]:
    """Completions of a stored prefix, against a transformers batch that repeats the prefix cache."""
    model, tokenizer = gpt2(), train_tokenizer()
    prefix = digits(PREFIX_TOKENS, seed=1)
    ids = torch.tensor([tokenizer(prefix)["input_ids"]])
    with torch.no_grad():
        filled = model(ids, past_key_values=DynamicCache(), use_cache=True)
    ours: dict[int, npt.NDArray[np.float64]] = {}
    plain: dict[int, npt.NDArray[np.float64]] = {}

    def texts(repetition: int) -> list[str]:
        return [digits(COMPLETION_TOKENS, seed=1000 * (repetition + 2) + n) for n in range(NUM_COMPLETIONS)]

    def repeated(repetition: int) -> None:
        batch = torch.tensor(tokenizer(texts(repetition))["input_ids"])
        cache = DynamicCache()
        for index, layer in enumerate(filled.past_key_values.layers):
            cache.update(layer.keys, layer.values, index)
        cache.batch_repeat_interleave(NUM_COMPLETIONS)
        with torch.no_grad():
            logits = model(batch, past_key_values=cache, use_cache=True).logits
        first = filled.logits[0, -1].log_softmax(-1)[batch[:, 0]]
        rest = logits[:, :-1].log_softmax(-1).gather(2, batch[:, 1:, None])[..., 0].sum(1)
        plain[repetition] = (first + rest).double().numpy()

    with bp.open(directory / "trees") as db:
        lm = bp.LanguageModel(model, tokenizer, db=db)
        lm(prefix)
        db.flush()

        def tree(repetition: int) -> None:
            ours[repetition] = lm.score(prefix, texts(repetition))

        seconds, repeated_seconds = median_seconds(tree), median_seconds(repeated)
        assert lm.counters.num_model_calls == 1 + len(ours)
    for repetition, scores in ours.items():
        assert np.allclose(scores, plain[repetition], atol=1e-3)
    what = (
        f"{NUM_COMPLETIONS} completions x {COMPLETION_TOKENS} tokens on a stored {PREFIX_TOKENS}-token prefix, against "
        f"the prefix cache repeated ({repeated_seconds * 1e3:.0f} ms / {seconds * 1e3:.0f} ms)"
    )
    return [Measurement("prompt tree", what, repeated_seconds / seconds, "x", 4)]
