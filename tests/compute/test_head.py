"""The head applied apart from the model: the log-probabilities and logits of a plain pass, whatever the head is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CohereConfig, Gemma2Config, GPT2Config, LlamaConfig, PhiConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import backprompt_db as bp
from backprompt_db.compute.inference.fingerprint import weights_id
from backprompt_db.compute.inference.head import HiddenStates, LogitsQuery, Predictions, WholeLogits
from backprompt_db.compute.inference.selfcheck import proven_head
from tests.conftest import plain_logprobs
from tests.support.generation import assert_equals_plain

MakeLM = Callable[..., bp.LanguageModel]

ROWS = st.lists(st.integers(0, 11), max_size=30)


@given(ROWS, ROWS, st.integers(1, 5000), st.integers(0, 1), st.integers(0, 5))
def test_each_way_of_reading_agrees_with_a_plain_log_softmax(
    rows: list[int], ends: list[int], vocab_size: int, bias: int, seed: int
) -> None:
    torch.manual_seed(seed)
    head, hidden = nn.Linear(8, vocab_size, bias=bool(bias)), torch.randn(12, 8)
    targets = np.random.default_rng(seed).integers(0, vocab_size, len(rows))
    with torch.no_grad():
        logits = head(hidden)
    expected = logits.double().log_softmax(1)[rows, targets]
    ways: list[Predictions] = [
        HiddenStates(hidden, head),
        HiddenStates(hidden, nn.Sequential(head)),
        WholeLogits(logits),
    ]
    for way in ways:
        logprobs, last = way.read(LogitsQuery(np.array(rows, np.int64), targets, np.array(ends, np.int64)))
        assert np.allclose(logprobs, expected, atol=1e-5)
        assert len(last) == len(ends)
        assert not ends or torch.allclose(last, logits[ends], atol=1e-5)


def model_of(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99),
    "llama": lambda: LlamaConfig(**SMALL, vocab_size=99),
    "phi, with a bias": lambda: PhiConfig(**SMALL, vocab_size=99),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_linear_head_is_applied_apart(name: str) -> None:
    model = model_of(CONFIGS[name]())
    assert proven_head(model) is model.get_output_embeddings()


def test_a_soft_cap_keeps_the_head_in_the_model() -> None:
    config = Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16, vocab_size=99, final_logit_softcapping=30.0)
    assert proven_head(model_of(config)) is None


def test_scaled_logits_keep_the_head_in_the_model() -> None:
    assert proven_head(model_of(CohereConfig(**SMALL, vocab_size=99, logit_scale=0.25))) is None


def test_no_hook_stays_behind() -> None:
    model = model_of(CONFIGS["gpt2"]())
    head = proven_head(model)
    assert head is not None
    assert not head._forward_pre_hooks
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 99)


def with_adapter(model: Any, **chosen: Any) -> Any:
    """A model with an adapter that changes its numbers."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **chosen))
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.normal_()
    return adapted


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft warns of tied weights
@pytest.mark.parametrize(
    "chosen",
    [
        {"target_modules": ["wte"]},
        {"target_modules": ["wte", "lm_head"]},
        {"target_modules": ["c_proj"], "fan_in_fan_out": True, "trainable_token_indices": list(range(50, 450))},
        {
            "target_modules": ["c_proj"],
            "fan_in_fan_out": True,
            "trainable_token_indices": {"wte": list(range(50, 450)), "lm_head": [3, 4, 5]},
        },
        {"target_modules": ["c_proj"], "fan_in_fan_out": True, "modules_to_save": ["wte", "lm_head"]},
    ],
    ids=str,
)
def test_adapters_of_embeddings_and_heads_give_what_a_plain_pass_gives(
    gpt2: Any, make_lm: MakeLM, chosen: dict[str, Any]
) -> None:
    lm = make_lm(with_adapter(gpt2, **chosen))
    string = "the quick brown fox"
    assert lm.plan([string]).num_missing_tokens > 0
    results, ids = [lm(string)], [lm.weights_id]
    with lm.model.disable_adapter():
        results.append(lm(string))
        ids.append(lm.weights_id)
        logprobs, _ = plain_logprobs(lm.model, results[1].input_ids)
        assert torch.allclose(results[1].token_logprobs, logprobs, atol=1e-5, equal_nan=True)
    logprobs, logits = plain_logprobs(lm.model, results[0].input_ids)
    assert torch.allclose(results[0].token_logprobs, logprobs, atol=1e-5, equal_nan=True)
    assert torch.allclose(results[0].logits, logits, atol=1e-4)
    assert not torch.allclose(results[0].token_logprobs, results[1].token_logprobs, atol=1e-2, equal_nan=True)
    assert ids[0] != ids[1]
    assert_equals_plain(lm, lm.generate(string, max_new_tokens=4), max_new_tokens=4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trained_tokens_are_a_part_of_the_id(gpt2: Any) -> None:
    adapted = with_adapter(gpt2, target_modules=["c_proj"], fan_in_fan_out=True, trainable_token_indices=[3])
    before = weights_id(adapted)
    (delta,) = (each for name, each in adapted.named_parameters() if "trainable_tokens_delta" in name)
    delta.data += 1
    assert weights_id(adapted) != before
