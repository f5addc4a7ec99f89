"""Half precision: packs are as near to the truth as plain passes of the same dtype are."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import backprompt_db as bp
from backprompt_db import Text
from backprompt_db.compute.inference.selfcheck import examine
from tests.support.families import CONTEXT, LABELS, REQUEST, by_name, family_cases

NAMES = ["gpt2", "llama", "qwen2", "mistral-window", "gemma2", "gemma3_text", "cohere2", "modernbert-decoder"]
MAX_RATIO = 1.25
"""Largest root mean square error of ours, in units of the plain pass's own: both are rounding, in another order."""


def logprobs(model: Any, input_ids: torch.Tensor) -> npt.NDArray[np.float64]:
    """Log-probabilities of all tokens but the first, from one plain pass."""
    with torch.no_grad():
        logits = model(input_ids[None], use_cache=False).logits[0, :-1].double()
    result: npt.NDArray[np.float64] = logits.log_softmax(-1).gather(1, input_ids[1:, None])[:, 0].numpy()
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", family_cases(map(by_name, NAMES)))
def test_packs_err_no_more_than_plain_passes(
    family: Any, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, db: bp.Database
) -> None:
    model = family.build().to(dtype)
    exact = copy.deepcopy(model).double()
    lm = bp.LanguageModel(model, tokenizer, db=db)
    assert examine(model).kind == "packs"
    errors = []
    for result in lm([Text(CONTEXT) + request + label for request in (REQUEST, CONTEXT) for label in LABELS]):
        truth = logprobs(exact, result.input_ids)
        errors.append((result.token_logprobs[1:].double().numpy() - truth, logprobs(model, result.input_ids) - truth))
    ours, plain = (np.sqrt(np.mean(np.square(np.concatenate(each)))) for each in zip(*errors, strict=True))
    assert 0 < ours <= MAX_RATIO * plain
