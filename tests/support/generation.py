"""What tests of generating share: the oracle, and how a model that knows no language is made to write digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import backprompt_db as bp
from tests.conftest import VOCAB_SIZE

TOLERANCE = 1e-4
"""By how much log-probabilities may differ, in float32."""


def plain(model: Any, input_ids: Sequence[int], **arguments: Any) -> tuple[list[int], torch.Tensor]:
    """The oracle: transformers' `generate` from the whole prompt. Returns new tokens and their log-probabilities."""
    ids = torch.tensor([list(input_ids)])
    arguments = {"max_new_tokens": 20, "pad_token_id": 0, **arguments}
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **arguments
    )
    tokens = output.sequences[0, ids.shape[1] :]
    logprobs = [logits[0].log_softmax(-1)[token] for logits, token in zip(output.logits, tokens, strict=True)]
    return tokens.tolist(), torch.stack(logprobs)


def assert_equals_plain(lm: bp.LanguageModel, result: bp.Generated, **arguments: Any) -> None:
    """Compare tokens and log-probabilities with the oracle on the prompt's tokens."""
    tokens, logprobs = plain(lm.model, lm(result.prompt).input_ids.tolist(), **arguments)
    assert result.token_ids.tolist() == tokens
    assert (result.token_logprobs - logprobs).abs().max() < TOLERANCE


def only_digits(tokenizer: Any) -> dict[str, Any]:
    """Return the argument that forbids all tokens but digits: no two of them merge, so any string keeps its tokens."""
    digits = set(tokenizer.convert_tokens_to_ids(list("0123456789")))
    return {"suppress_tokens": [token for token in range(VOCAB_SIZE) if token not in digits]}


def decoded_by_hand(
    model: Any, pieces: Sequence[tuple[Sequence[int], int, set[int]]], num_tokens: int, *, forbidden: Sequence[int]
) -> tuple[list[int], torch.Tensor]:
    """The oracle for graphs: whole passes without a cache, with a mask and position ids written from the definition.

    A piece has its tokens, its first position, and the numbers of the pieces that it sees. The last one is continued.
    """
    places = [(piece, index) for piece, (ids, _, _) in enumerate(pieces) for index in range(len(ids))]
    ids = [pieces[piece][0][index] for piece, index in places]
    positions = [pieces[piece][1] + index for piece, index in places]
    chosen, logprobs = list[int](), list[torch.Tensor]()
    for _ in range(num_tokens):
        mask = torch.full((1, 1, len(places), len(places)), torch.finfo(torch.float32).min)
        for row, (own, index) in enumerate(places):
            for column, (other, before) in enumerate(places):
                if other in pieces[own][2] or (other == own and before <= index):
                    mask[0, 0, row, column] = 0.0
        with torch.no_grad():
            given = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
            after = model(**given, attention_mask=mask, use_cache=False).logits[0, -1].log_softmax(-1)
        allowed = after.index_fill(0, torch.tensor(list(forbidden)), -torch.inf)
        chosen.append(int(allowed.argmax()))
        logprobs.append(after[chosen[-1]])
        ids, positions = [*ids, chosen[-1]], [*positions, positions[-1] + 1]
        places.append((len(pieces) - 1, len(places)))
    return chosen, torch.stack(logprobs)
