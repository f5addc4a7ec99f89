"""The ids of models and tokenizers change with everything that changes a number, and with nothing else."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import normalizers
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

import backprompt_db as bp
from backprompt_db.compute.inference.fingerprint import ModelIdentity, weights_id
from backprompt_db.compute.tokens import SegmentTokenizer
from backprompt_db.errors import ModelMismatch, UnsupportedModel
from tests.conftest import tiny_gpt2, train_tokenizer


def take_a_step(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()


def write_past_the_version_counter(model: Any) -> None:
    model.transformer.h[1].mlp.c_fc.weight.data.mul_(1.01)


def replace_data(model: Any) -> None:
    weight = model.transformer.h[1].mlp.c_fc.weight
    weight.data = weight.data * 1.01


def load_another_state(model: Any) -> None:
    model.load_state_dict(tiny_gpt2(seed=1).state_dict())


def assign_another_state(model: Any) -> None:
    model.load_state_dict(tiny_gpt2(seed=1).state_dict(), assign=True)


def change_one_element(model: Any) -> None:
    with torch.no_grad():
        model.transformer.wpe.weight[17, 3] += 1e-3


def change_a_config_field(model: Any) -> None:
    model.config.scale_attn_by_inverse_layer_idx = True


def change_an_attribute(model: Any) -> None:
    model.transformer.h[0].attn.scaling = 0.5


def add_a_logit_scale(model: Any) -> None:
    model.logit_scale = 2.0


def add_a_buffer(model: Any) -> None:
    model.transformer.register_buffer("shift", torch.ones(3))


def hold_a_loose_tensor(model: Any) -> None:
    model.transformer.shift = torch.ones(3)


def change_a_layer_norm(model: Any) -> None:
    model.transformer.ln_f.eps = 1e-3


def replace_an_activation(model: Any) -> None:
    model.transformer.h[0].mlp.act = nn.ReLU()


def replace_a_function(model: Any) -> None:
    model.transformer.h[0].mlp.act = nn.Identity()
    model.transformer.h[0].mlp.activation = torch.tanh


def change_the_precision(model: Any) -> None:
    model.to(torch.float16)


CHANGES = [
    take_a_step, write_past_the_version_counter, replace_data, load_another_state, assign_another_state,
    change_one_element, change_a_config_field, change_an_attribute, add_a_logit_scale, add_a_buffer,
    hold_a_loose_tensor, change_a_layer_norm, replace_an_activation, replace_a_function, change_the_precision,
]  # fmt: skip


def name_of(change: Callable[[Any], None]) -> str:
    return change.__name__


@pytest.mark.parametrize("change", CHANGES, ids=name_of)
def test_what_changes_numbers_changes_the_id_at_once(gpt2: Any, change: Callable[[Any], None]) -> None:
    identity = ModelIdentity(gpt2)
    before = identity.weights_id()
    change(gpt2)
    assert identity.weights_id() == weights_id(gpt2) != before


def train(model: Any) -> None:
    model.train()


def stop_caching(model: Any) -> None:
    model.config.use_cache = False


def set_a_padding_token(model: Any) -> None:
    model.config.pad_token_id = 5


def freeze(model: Any) -> None:
    model.requires_grad_(requires_grad=False)


def choose_eager_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def checkpoint_gradients(model: Any) -> None:
    for module in model.modules():
        module.gradient_checkpointing = True


def ask_for_hidden_states(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)


def backpropagate(model: Any) -> None:
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()


def wait(model: Any) -> None:
    """Do nothing."""


INERT = [
    train, stop_caching, set_a_padding_token, freeze, choose_eager_attention, checkpoint_gradients,
    ask_for_hidden_states, backpropagate, wait,
]  # fmt: skip


@pytest.mark.parametrize("change", INERT, ids=name_of)
def test_what_changes_no_number_keeps_the_id(gpt2: Any, change: Callable[[Any], None]) -> None:
    identity = ModelIdentity(gpt2)
    before = identity.weights_id()
    change(gpt2)
    assert identity.weights_id() == weights_id(gpt2) == before


def test_a_model_that_did_not_change_is_not_hashed_again(gpt2: Any) -> None:
    identity = ModelIdentity(gpt2)
    first = identity.weights_id()
    assert identity.weights_id() is first
    with torch.no_grad():
        gpt2.transformer.wpe.weight[0, 0] += 0.0
    again = identity.weights_id()
    assert again == first
    assert again is not first


def test_a_copy_and_a_reloaded_model_have_the_id_of_the_original(gpt2: Any, tmp_path: Path) -> None:
    gpt2.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert weights_id(copy.deepcopy(gpt2)) == weights_id(loaded) == weights_id(gpt2)


_PROGRAM = """
import sys
from transformers import GPT2LMHeadModel
from backprompt_db.compute.inference.fingerprint import weights_id
print(weights_id(GPT2LMHeadModel.from_pretrained(sys.argv[1])).hex())
"""


@pytest.mark.exhaustive
def test_another_process_finds_the_same_id(gpt2: Any, tmp_path: Path) -> None:
    gpt2.save_pretrained(tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == weights_id(gpt2).hex()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks for it
def test_adapters_their_scalings_and_their_absence_have_ids_of_their_own(gpt2: Any) -> None:
    lora = LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    model = get_peft_model(gpt2, lora, adapter_name="one")
    model.add_adapter("two", lora)
    identity = ModelIdentity(model)
    ids = [identity.weights_id()]
    model.set_adapter("two")
    ids.append(identity.weights_id())
    with model.disable_adapter():
        ids.append(identity.weights_id())
    model.base_model.model.transformer.h[0].attn.c_attn.scaling["two"] = 3.0
    ids.append(identity.weights_id())
    assert len(set(ids)) == 4
    model.set_adapter("one")
    model.base_model.model.transformer.h[0].attn.c_attn.scaling["two"] = 1 / 4 * lora.lora_alpha
    assert identity.weights_id() == weights_id(model)


def add_a_hook(model: Any) -> None:
    model.transformer.h[0].register_forward_hook(lambda module, args, output: output)


def add_an_earlier_hook(model: Any) -> None:
    model.transformer.h[0].register_forward_pre_hook(lambda module, args: args)


def replace_forward(model: Any) -> None:
    model.transformer.h[0].mlp.forward = lambda hidden: hidden


def claim_quantisation(model: Any) -> None:
    model.hf_quantizer = object()


def compile_a_layer(model: Any) -> None:
    model.transformer.h[0] = torch.compile(model.transformer.h[0], backend="eager")


def move_to_meta(model: Any) -> None:
    model.to("meta")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_a_hook, "transformer.h.0 has forward hooks"),
        (add_an_earlier_hook, "transformer.h.0 has forward hooks"),
        (compile_a_layer, "transformer.h.0 was compiled.*its _orig_mod"),
        (replace_forward, "the forward method of transformer.h.0.mlp was replaced"),
        (claim_quantisation, "it is quantised"),
        (move_to_meta, "on meta"),
    ],
)
def test_what_the_id_cannot_see_is_refused_whenever_it_appears(
    gpt2: Any, change: Callable[[Any], None], reason: str
) -> None:
    identity = ModelIdentity(gpt2)
    identity.weights_id()
    change(gpt2)
    for look in (identity.weights_id, lambda: weights_id(gpt2)):
        with pytest.raises(UnsupportedModel, match=reason):
            look()


def test_a_patched_class_is_another_model(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights_id(gpt2)
    monkeypatch.setattr(type(gpt2.transformer.h[0].mlp), "forward", lambda self, hidden: hidden)
    assert weights_id(gpt2) != before


def test_patches_of_a_class_that_differ_in_a_constant_alone_are_two_models(
    gpt2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = type(gpt2.transformer.h[0].mlp)
    monkeypatch.setattr(mlp, "forward", lambda self, hidden: hidden * 2.0)
    twice = weights_id(gpt2)
    monkeypatch.setattr(mlp, "forward", lambda self, hidden: hidden * 3.0)
    assert weights_id(gpt2) != twice


def test_a_model_made_in_inference_mode_is_refused_because_its_changes_have_no_counter() -> None:
    with torch.inference_mode():
        model = tiny_gpt2()
    with pytest.raises(ModelMismatch, match="changes of this model's tensors cannot be seen"):
        ModelIdentity(model).weights_id()


def test_a_trained_model_is_never_answered_with_what_it_said_before(lm: bp.LanguageModel) -> None:
    text = lm.text("The quick brown fox") + " jumps"
    before = lm([text])[0]
    take_a_step(lm.model)
    after = lm([text])[0]
    assert after.num_cached_tokens == 0
    assert not torch.equal(before.logits, after.logits)


def test_padding_and_truncation_in_calls_keep_the_tokenizer_id(tokenizer: PreTrainedTokenizerFast) -> None:
    used = train_tokenizer()
    used.pad_token = used.eos_token
    plain = train_tokenizer()
    plain.pad_token = plain.eos_token
    used(["a", "the quick brown fox"], padding=True, truncation=True, max_length=3)
    assert SegmentTokenizer(used).id == SegmentTokenizer(plain).id
    assert SegmentTokenizer(train_tokenizer()).id == SegmentTokenizer(tokenizer).id


def test_a_reloaded_tokenizer_has_the_id_of_the_original(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert SegmentTokenizer(loaded).id == SegmentTokenizer(tokenizer).id


def test_added_tokens_normalizers_and_start_tokens_change_the_tokenizer_id(
    tokenizer: PreTrainedTokenizerFast, tokenizer_with_bos: PreTrainedTokenizerFast
) -> None:
    larger, lowering = train_tokenizer(), train_tokenizer()
    larger.add_tokens(["endpoint"])
    lowering.backend_tokenizer.normalizer = normalizers.Lowercase()
    ids = {SegmentTokenizer(each).id for each in (tokenizer, tokenizer_with_bos, larger, lowering)}
    assert len(ids) == 4


def test_a_compiled_model_is_refused_by_the_name_of_what_it_was_made_of(
    gpt2: Any, tokenizer: Any, db: bp.Database
) -> None:
    compiled: Any = torch.compile(gpt2, backend="eager")
    with pytest.raises(UnsupportedModel, match="the model was compiled"):
        bp.LanguageModel(compiled, tokenizer, db=db)("the")
    assert bp.LanguageModel(compiled._orig_mod, tokenizer, db=db)("the").num_computed_tokens > 0
