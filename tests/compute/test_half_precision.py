"""In half precision every number is rounded; what is computed in pieces is no further from the truth than a plain pass.

The truth is the same model with the same rounded weights, computed in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import backprompt_db as bp
from tests.support.families import SUPPORTED, family_cases

MakeLM = Callable[..., bp.LanguageModel]

PIECES = [
    "Pick the endpoint for the request.", "\nGET /users lists users.", " POST /orders creates an order.",
    "\nRequest: show me everyone", " who signed up", " this week", "\nEndpoint:", " GET /users", "\nRequest: I want",
    " to buy", " two of these.", "\nEndpoint:", " POST /orders",
]  # fmt: skip

MAX_RATIO = 1.35
"""How much larger the error may be than a plain pass's own, as root mean square over some hundred tokens."""


def errors(model: Any, truth: Any, results: list[bp.ModelRepr]) -> tuple[float, float]:
    """Return the errors of a plain pass and of results, as root mean squares over their tokens, in nats."""
    plain, own = list[torch.Tensor](), list[torch.Tensor]()
    for result in results:
        ids = result.input_ids
        with torch.no_grad():
            expected = truth(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            computed = model(ids[None]).logits[0, :-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        plain.append(computed.double() - expected)
        own.append(result.token_logprobs[1:].double() - expected)
    return tuple(float(torch.cat(each).square().mean().sqrt()) for each in (plain, own))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", family_cases(SUPPORTED))
def test_pieces_are_no_further_from_the_truth_than_a_plain_pass(
    family: Any, dtype: torch.dtype, make_lm: MakeLM
) -> None:
    model = family.build().to(dtype)
    truth = copy.deepcopy(model).double()
    lm = make_lm(model)
    results = []
    for begin in range(len(PIECES)):
        text = lm.text("")
        for piece in PIECES[begin:]:
            text += piece
            last = text()
        results.append(last)
    plain, own = errors(model, truth, results)
    assert np.isfinite(own)
    assert own <= MAX_RATIO * plain
