"""What passes leave as they found it, and what they must not share with anybody."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import backprompt_db as bp
from backprompt_db.compute.inference.kv_cache import cache_argument
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Blob
from tests.conftest import VOCAB_SIZE, plain_logprobs, tiny_gpt2

assert sys.platform != "win32"


def error(lm: bp.LanguageModel, result: bp.ModelRepr) -> float:
    logprobs, _ = plain_logprobs(lm.model, result.input_ids)
    return float((result.token_logprobs - logprobs)[1:].abs().max())


def forget(lm: bp.LanguageModel, *parts: Part) -> None:
    """Remove parts of all segments from the database, and everything from memory."""
    lm.db.flush()
    lm.db.store.delete([key for key, _ in list(lm.db.store.keys()) if key.part in parts])
    lm.db.memory.clear()


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_keys_and_values_of_one_pass_are_no_view_of_the_buffer_of_the_next(
    make_lm: Callable[..., bp.LanguageModel],
) -> None:
    model = tiny_gpt2()
    model = GPT2LMHeadModel(GPT2Config(**{**model.config.to_dict(), "n_layer": 1, "n_head": 1})).eval()
    text = bp.Text("Pick one.\n") + bp.parallel("The quick brown fox", "Request: show users") + " jumps over"
    one_by_one, together = make_lm(model, deterministic=True)(text), make_lm(model)(text)
    assert torch.allclose(one_by_one.token_logprobs, together.token_logprobs, atol=1e-4, equal_nan=True)
    assert torch.allclose(one_by_one.logits, together.logits, atol=1e-4)


def test_an_adapter_with_dropout_in_the_head_is_computed_in_evaluation_mode(
    make_lm: Callable[..., bp.LanguageModel],
) -> None:
    adapter = LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    lm = make_lm(get_peft_model(tiny_llama(), adapter))
    lm("Say hello.")
    lm.model.train()
    result = lm("Pick the endpoint for the request.\n")
    assert all(module.training for module in lm.model.modules())
    lm.model.eval()
    assert error(lm, result) < 1e-4


@pytest.mark.parametrize("completion", ["Request: show me", " jumps over the lazy dog, and the dog", "b c"])
@pytest.mark.parametrize("parts", [[Part.SCORES], [Part.SCORES, Part.LOGITS]])
def test_deterministic_scores_do_not_depend_on_what_else_is_wanted(
    make_lm: Callable[..., bp.LanguageModel], completion: str, parts: list[Part]
) -> None:
    torch.manual_seed(0)
    # Large enough that products of other numbers of rows differ in the last bits.
    model = GPT2LMHeadModel(GPT2Config(n_embd=256, n_head=4, n_layer=2, vocab_size=5000)).eval()
    lm = make_lm(model, deterministic=True)
    prompt = lm.text("Pick the endpoint for the request.\n")
    whole = (prompt + completion)()
    forget(lm, *parts)
    lm.score(prompt, [completion])
    again = (prompt + completion)()
    assert torch.equal(again.token_logprobs[1:], whole.token_logprobs[1:])
    assert torch.equal(again.logits, whole.logits)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_in_the_middle_of_a_pass_has_the_model_as_it_was(
    lm: bp.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = lm.model.train()
    lm("Say hello.")
    is_inside, may_end = threading.Event(), threading.Event()

    def pausing(*arguments: Any) -> Any:  # called when the model is
        is_inside.set()
        may_end.wait(20)
        return cache_argument(*arguments)

    monkeypatch.setattr("backprompt_db.compute.inference.forward.cache_argument", pausing)
    thread = threading.Thread(target=lambda: lm("Pick the endpoint."), daemon=True)
    thread.start()
    assert is_inside.wait(20)
    child = os.fork()
    if not child:
        may_end.set()
        os._exit(0 if model.training and not model.lm_head._forward_pre_hooks else 1)
    may_end.set()
    thread.join(20)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert model.training


def test_a_model_that_changes_its_dtype_and_back_gets_caches_of_its_own(
    make_lm: Callable[..., bp.LanguageModel], open_db: Any
) -> None:
    lm = make_lm(db=open_db(fidelity="bfloat16"))
    context = lm.text("Pick the endpoint.\n")
    context()
    lm.model.to(torch.bfloat16)
    context()
    lm.model.to(torch.float32)
    forget(lm)
    assert context().past_key_values.layers[0].keys.dtype == torch.float32


def test_a_head_replaced_by_an_equal_one_is_used(lm: bp.LanguageModel) -> None:
    lm("Say hello.")
    head = torch.nn.Linear(lm.model.config.n_embd, VOCAB_SIZE, bias=False)
    head.weight = lm.model.lm_head.weight
    lm.model.lm_head = head
    assert error(lm, lm("Pick the endpoint.\n")) < 1e-4


def test_a_hit_of_another_shape_is_computed_again(lm: bp.LanguageModel) -> None:
    context = lm.text("Pick the endpoint.\n")
    context()
    lm.db.flush()
    (kv,) = [key for key, _ in lm.db.store.keys() if key.part is Part.KV]
    other = bp.LanguageModel(tiny_gpt2(seed=1), lm.tokenizer, db=lm.db)
    other.model.transformer.h = other.model.transformer.h[:2]
    other.model.config.n_layer = 2
    shorter = other.text("Pick the endpoint.\n")
    shorter()
    lm.db.flush()
    (foreign,) = [key for key, _ in lm.db.store.keys() if key.part is Part.KV and key != kv]
    blob = lm.db.store.get(foreign)
    assert blob is not None
    lm.db.store.delete([kv])
    lm.db.store.put([Blob(kv, bytes(blob))])
    assert len(context().past_key_values.layers) == 3
    assert lm.db.counters.num_quarantined == 1
