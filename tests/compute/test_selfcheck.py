"""The self-check finds the way that is right for a model, or refuses it with a reason that a person understands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import backprompt_db as bp
from backprompt_db.compute.inference.kv_cache import CACHE_KEYWORD
from backprompt_db.compute.inference.selfcheck import Verdict, examine
from backprompt_db.errors import UnsupportedModel
from tests.conftest import VOCAB_SIZE, plain_logprobs, tiny_gpt2

SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2_SIZES = {
    "vocab_size": VOCAB_SIZE, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
PROMPT = ("The quick brown fox", " jumps over the lazy dog")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these models do."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **options)).eval()


def seeded(kind: type[GPT2LMHeadModel], **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(GPT2Config(**{**GPT2_SIZES, **options})).eval()


def assert_right(lm: bp.LanguageModel, *, tolerance: float = 1e-4) -> None:
    """Two branches after one beginning, computed together, equal plain passes of the model as it is."""
    texts = [lm.text(PROMPT[0]) + ending for ending in (PROMPT[1], ", and the dog does not mind")]
    for result in lm(texts):
        expected, _ = plain_logprobs(lm.model, result.input_ids)
        np.testing.assert_allclose(result.token_logprobs[1:], expected[1:], rtol=0, atol=tolerance)


def assert_refused(model: Any, reason: str) -> None:
    verdict = examine(model)
    assert verdict.kind == "refused"
    assert reason in str(verdict.reason)


class IgnoresPositions(GPT2LMHeadModel):  # type: ignore[misc]  # transformers is untyped
    def forward(self, input_ids: Any = None, position_ids: Any = None, **others: Any) -> Any:
        return super().forward(input_ids, **others)


class IgnoresMasks(GPT2LMHeadModel):  # type: ignore[misc]
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        return super().forward(input_ids, **others)


class RemembersCalls(GPT2LMHeadModel):  # type: ignore[misc]
    num_calls = 0

    def forward(self, input_ids: Any = None, **others: Any) -> Any:
        self.num_calls += 1
        output = super().forward(input_ids, **others)
        output.logits = output.logits * (1 + 0.01 * self.num_calls)
        return output


class CountsItsCalls(GPT2LMHeadModel):  # type: ignore[misc]
    num_calls = 0

    def forward(self, input_ids: Any = None, **others: Any) -> Any:
        self.num_calls += 1
        return super().forward(input_ids, **others)


class LastLogitsOnly(GPT2LMHeadModel):  # type: ignore[misc]
    def forward(self, input_ids: Any = None, **others: Any) -> Any:
        return super().forward(input_ids, **{**others, "logits_to_keep": 1})


class ReturnsTuples(GPT2LMHeadModel):  # type: ignore[misc]
    def forward(self, input_ids: Any = None, **others: Any) -> Any:
        return super().forward(input_ids, **others).to_tuple()


class SeesTheFuture(GPT2LMHeadModel):  # type: ignore[misc]
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = torch.ones(1, 1, input_ids.shape[1], attention_mask.shape[1], dtype=torch.bool)
        return super().forward(input_ids, attention_mask=attention_mask, **others)


class CountsTokens(GPT2LMHeadModel):  # type: ignore[misc]
    """Every number depends on how many tokens there are in all."""

    def forward(self, input_ids: Any = None, **others: Any) -> Any:
        num_tokens = input_ids.shape[1] + others[CACHE_KEYWORD].get_seq_length()
        output = super().forward(input_ids, **others)
        output.logits = output.logits * (1 + 0.01 * num_tokens)
        return output


def test_a_model_that_ignores_position_ids_runs_chains_only() -> None:
    assert examine(seeded(IgnoresPositions)).kind == "chains"


def test_a_model_that_ignores_masks_runs_chains_only() -> None:
    verdict = examine(seeded(IgnoresMasks))
    assert verdict.kind == "chains"
    assert "packs are wrong: boolean mask: off by" in str(verdict.reason)


def test_a_model_that_remembers_other_calls_is_refused() -> None:
    assert_refused(seeded(RemembersCalls), "off by")


def test_a_model_that_is_another_after_each_call_is_refused(make_lm: Callable[..., bp.LanguageModel]) -> None:
    lm = make_lm(seeded(CountsItsCalls))
    with pytest.raises(UnsupportedModel, match="running it changes its weights, its buffers or its attributes"):
        lm(lm.text(PROMPT[0]))
    assert lm.db.counters.num_stored == 0


def test_a_model_whose_tokens_see_later_ones_is_refused() -> None:
    assert_refused(seeded(SeesTheFuture), "off by")


def test_a_model_whose_numbers_depend_on_the_total_length_is_refused() -> None:
    assert_refused(seeded(CountsTokens), "off by")


def test_a_model_that_gives_only_its_last_logits_is_refused() -> None:
    assert_refused(seeded(LastLogitsOnly), "its logits are not one row per token")


def test_a_configuration_that_transformers_cannot_cache_is_refused() -> None:
    model = llama()
    model.config.layer_types = ["telepathy", "telepathy"]
    assert_refused(model, "transformers knows no cache for its configuration")


def test_a_model_that_reacts_to_nothing_proves_nothing() -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_refused(model, "which proves nothing")


def test_a_model_with_numbers_that_are_none_is_refused() -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    assert_refused(model, "some of its numbers are not finite")


@pytest.mark.parametrize("build", [tiny_gpt2, llama])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("attention", "form"), [("sdpa", "boolean"), ("eager", "additive")])
def test_each_precision_finds_the_mask_form_of_its_attention(
    build: Callable[[], Any], dtype: torch.dtype, attention: str, form: str
) -> None:
    model = build().to(dtype)
    model.set_attn_implementation(attention)
    verdict = examine(model)
    assert verdict.form is not None
    assert verdict.form.name == form


def test_another_attention_is_checked_again_although_the_weights_are_the_same(
    make_lm: Callable[..., bp.LanguageModel],
) -> None:
    lm = make_lm(llama())
    assert_right(lm)
    before = lm.weights_id
    lm.model.set_attn_implementation("eager")
    assert lm.weights_id == before
    again = make_lm(lm.model, db=lm.db)
    for model in (lm, again):
        result = model(model.text(PROMPT[0]) + " and more" + PROMPT[1])
        expected, _ = plain_logprobs(model.model, result.input_ids)
        np.testing.assert_allclose(result.token_logprobs[1:], expected[1:], rtol=0, atol=1e-4)


def test_training_mode_and_dropout_change_nothing_and_come_back(make_lm: Callable[..., bp.LanguageModel]) -> None:
    lm = make_lm(tiny_gpt2().train())
    texts = [lm.text(PROMPT[0]) + PROMPT[1]]
    (result,) = lm(texts)
    assert all(module.training for module in lm.model.modules())
    expected, _ = plain_logprobs(lm.model.eval(), result.input_ids)
    np.testing.assert_allclose(result.token_logprobs[1:], expected[1:], rtol=0, atol=1e-4)


def test_gradients_inference_mode_and_autocast_around_a_call_change_nothing(
    make_lm: Callable[..., bp.LanguageModel],
) -> None:
    lm = make_lm(tiny_gpt2())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        lm(lm.text(PROMPT[0]))
    assert_right(lm)


@pytest.mark.parametrize("num_positions", [6, 17, 24])
def test_models_with_few_positions_are_checked_within_them(num_positions: int) -> None:
    assert examine(seeded(GPT2LMHeadModel, n_positions=num_positions)).kind == "packs"


@pytest.mark.parametrize("options", [{"n_layer": 1}, {"vocab_size": 3}, {"tie_word_embeddings": False}])
def test_small_and_untied_models_are_checked(options: dict[str, Any]) -> None:
    assert examine(seeded(GPT2LMHeadModel, **options)).kind == "packs"


def test_rotary_scaling_that_changes_with_the_length_is_refused_in_any_layer_type() -> None:
    model = llama()
    model.config.rope_parameters = {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}
    assert_refused(model, "dynamic rotary scaling changes with the total length")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks for it
@pytest.mark.parametrize(
    "adapter",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["prompt", "prefix"],
)
def test_adapters_with_tokens_of_their_own_are_refused(adapter: Any) -> None:
    assert_refused(get_peft_model(tiny_gpt2(), adapter), "puts tokens of its own before every prompt")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks for it
def test_each_adapter_of_a_model_has_its_own_representations(make_lm: Callable[..., bp.LanguageModel]) -> None:
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True
    )
    model = get_peft_model(tiny_gpt2(), lora, adapter_name="one").eval()
    model.add_adapter("two", lora)
    lm = make_lm(model)
    seen = set()
    for name in ("one", "two"):
        model.set_adapter(name)
        assert_right(lm)
        seen.add(lm.weights_id)
    with model.disable_adapter():
        assert_right(lm)
        seen.add(lm.weights_id)
    assert len(seen) == 3


def test_a_model_may_return_tuples(make_lm: Callable[..., bp.LanguageModel]) -> None:
    lm = make_lm(seeded(ReturnsTuples))
    result = lm(lm.text(PROMPT[0]) + PROMPT[1])
    expected, _ = plain_logprobs(seeded(GPT2LMHeadModel), result.input_ids)
    np.testing.assert_allclose(result.token_logprobs[1:], expected[1:], rtol=0, atol=1e-4)


def test_the_verdict_is_recorded_with_its_form_and_its_error(lm: bp.LanguageModel) -> None:
    lm(lm.text(PROMPT[0]))
    assert lm.db.catalog is not None
    record = lm.db.catalog.model(lm.weights_id)
    assert record is not None
    assert (record.verdict, record.mask_form, record.reason) == ("packs", "boolean", None)
    assert record.max_error is not None
    assert 0 <= record.max_error < 1e-4


def test_kinds_of_verdicts_have_names() -> None:
    assert Verdict(None, None, "why").kind == "refused"
