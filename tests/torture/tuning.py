"""A model that is trained, patched and moved to another dtype between runs: never is an answer that of another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import backprompt_db as bp
from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.errors import ModelMismatch, UnsupportedModel
from tests.conftest import plain_logprobs, tiny_gpt2, train_tokenizer
from tests.support.patches import PATCHES, by_compiling
from tests.torture.worker import Worker

Change = Callable[[Any, pytest.MonkeyPatch], object]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROMPTS = [
    ("Pick the endpoint for the request.\n", "Request: show me everyone"),
    ("Pick the endpoint for the request.\n", "Request: create an order"),
    ("The quick brown fox", " jumps over the lazy dog"),
]
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
_TOLERANCES_OF_FIDELITIES = {Fidelity.EXACT: 0.0, Fidelity.BFLOAT16: 0.2, Fidelity.INT8: 0.4}
"""How far log-probabilities may be off: another model's are off by more."""


def tune(worker: Worker) -> None:
    """Run prompts, change the model, and run them again with the language model that there was and with a new one."""
    tokenizer = train_tokenizer()
    while True:
        model = tiny_gpt2()
        _train(model, num_steps=worker.dice.randrange(3))
        model.to(worker.dice.choice(_DTYPES))
        lm = bp.LanguageModel(model, tokenizer, db=worker.db, progress=False)
        before = _run(worker, lm)
        with pytest.MonkeyPatch.context() as patcher:
            name, change = worker.dice.choice(list(CHANGES.items()))
            change(model, patcher)
            for each in (lm, bp.LanguageModel(model, tokenizer, db=lm.db, progress=False)):
                after = _run(worker, each)
                if after is not None and after == before:
                    worker.journal.problem("the id of a model stayed after", name)
        worker.journal.counts["changed_models"] += 1
        worker.journal.beat()


def _run(worker: Worker, lm: bp.LanguageModel) -> bytes | None:
    """Run a prompt and compare it with a plain pass; return the model's id, None for a model that is refused."""
    first, second = worker.dice.choice(_PROMPTS)
    try:
        result = (lm.text(first) + second)()
    except (ModelMismatch, UnsupportedModel):
        worker.journal.counts["refused_models"] += 1
        return None
    expected, _ = plain_logprobs(lm.model, result.input_ids)
    tolerance = _TOLERANCES[lm.model.dtype] + _TOLERANCES_OF_FIDELITIES[lm.db.fidelity]
    worker.journal.counts["checked"] += 1
    if not torch.allclose(result.token_logprobs.float(), expected, atol=tolerance, equal_nan=True):
        worker.journal.counts["wrong"] += 1
        error = (result.token_logprobs.float() - expected).abs().nan_to_num().max().item()
        worker.journal.problem("wrong scores, off by", error, lm.model.dtype, lm.db.fidelity)
    return lm.weights_id


def _train(model: Any, *, num_steps: int) -> None:
    """Take steps of training, which are always the same ones."""
    with torch.no_grad():
        for step in range(num_steps):
            dice = torch.Generator().manual_seed(step)
            for weights in model.parameters():
                noise = torch.randn(weights.shape, generator=dice).to(weights.dtype)
                weights.add_(0.05 * noise)


def _train_once(model: Any, _: pytest.MonkeyPatch) -> None:
    _train(model, num_steps=1)


def _train_one_weight(model: Any, _: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0].mul_(1.5)


def _cast(model: Any, _: pytest.MonkeyPatch) -> None:
    model.to(next(dtype for dtype in _DTYPES if dtype != model.dtype))


CHANGES: dict[str, Change] = {
    "a step of training": _train_once,
    "a changed weight": _train_one_weight,
    "another dtype": _cast,
    # Compiling is no other model, and takes long.
    **{patch.__name__: patch for patch in PATCHES if patch is not by_compiling},
}
