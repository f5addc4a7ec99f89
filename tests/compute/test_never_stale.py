"""Ways in which a cache goes wrong unnoticed: each is another key, is refused, or is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import AttentionInterface, GPT2LMHeadModel

import backprompt_db as bp
from backprompt_db.compute.inference.kv_cache import CACHE_KEYWORD
from backprompt_db.errors import ModelMismatch, PromptError, UnsupportedModel
from tests.conftest import plain_logprobs, tiny_gpt2

MakeLM = Callable[..., bp.LanguageModel]


def assert_right(lm: bp.LanguageModel, result: bp.ModelRepr) -> None:
    logprobs, _ = plain_logprobs(lm.model.eval(), result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=1e-4, equal_nan=True)


def test_past_key_values_can_be_used_twice(lm: bp.LanguageModel) -> None:
    result = lm("The quick brown fox")
    more = torch.tensor([lm.tokenizer(" jumps")["input_ids"]])
    with torch.no_grad():
        first, second = (lm.model(more, **{CACHE_KEYWORD: result.past_key_values}).logits for _ in range(2))
    assert torch.equal(first, second)


def test_past_key_values_of_a_model_that_has_changed_since_are_refused(lm: bp.LanguageModel) -> None:
    result = lm("The quick brown fox")
    with torch.no_grad():
        lm.model.transformer.wte.weight.mul_(2)
    with pytest.raises(ModelMismatch, match="changed"):
        _ = result.past_key_values


def test_threads_that_share_a_model_in_training_mode_do_not_disturb_each_other(lm: bp.LanguageModel) -> None:
    lm("warm up")
    lm.model.train()
    results: list[bp.ModelRepr] = []
    threads = [
        threading.Thread(target=lambda n=n: results.extend(lm(f"prompt {n} {i} the fox") for i in range(8)))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lm.model.training
    assert len(results) == 32
    for result in results:
        assert_right(lm, result)


def test_a_model_whose_dtype_is_changed_in_place_goes_on(lm: bp.LanguageModel) -> None:
    lm("The quick brown fox")
    lm.model.to(torch.float64)
    result = (lm.text("The quick brown fox") + " jumps")()
    assert result.num_cached_tokens == 0
    assert result.logits.dtype == torch.float64


@pytest.fixture
def own_attention() -> Iterator[str]:
    AttentionInterface.register("mine", lambda *arguments, **options: arguments)
    yield "mine"
    AttentionInterface._global_mapping.pop("mine")


def test_an_attention_function_of_the_users_own_is_refused(lm: bp.LanguageModel, own_attention: str) -> None:
    lm("The quick brown fox")
    lm.model.config._attn_implementation = own_attention
    with pytest.raises(UnsupportedModel, match="registered function"):
        lm("The quick brown fox")


def test_global_hooks_are_refused(lm: bp.LanguageModel) -> None:
    lm("The quick brown fox")
    hook = register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(UnsupportedModel, match="global forward hooks"):
            lm("The quick brown fox")
    finally:
        hook.remove()


def test_two_classes_of_one_name_and_different_code_are_different_models(make_lm: MakeLM) -> None:
    def model_with(*, is_doubled: bool) -> Any:
        class Mine(GPT2LMHeadModel):  # type: ignore[misc]  # transformers is untyped
            pass

        def doubled(self: Any, *arguments: Any, **options: Any) -> Any:
            output = GPT2LMHeadModel.forward(self, *arguments, **options)
            output.logits = output.logits * 2.0
            return output

        def plain(self: Any, *arguments: Any, **options: Any) -> Any:
            return GPT2LMHeadModel.forward(self, *arguments, **options)

        forward = doubled if is_doubled else plain
        forward.__qualname__ = f"{Mine.__qualname__}.forward"
        Mine.forward = forward
        model = Mine(tiny_gpt2().config)
        model.load_state_dict(tiny_gpt2().state_dict())
        return model.eval()

    first = make_lm(model_with(is_doubled=True))
    second = make_lm(model_with(is_doubled=False), db=first.db)
    assert first.weights_id != second.weights_id
    first("The quick brown fox")
    assert_right(second, second("The quick brown fox"))


def test_a_tokenizer_changed_before_the_model_is_loaded_is_another_key(
    open_db: Callable[..., bp.Database], tmp_path: Path, tokenizer: Any
) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    db = open_db()
    bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db)("The quick brown fox")
    lm = bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db)
    before = lm.tokenizer_id
    lm.tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    assert lm.tokenizer_id != before
    assert lm("THE QUICK").input_ids.tolist() == tokenizer("the quick")["input_ids"]


def test_a_tokenizer_with_other_merges_is_another_key(gpt2: Any, tokenizer: Any, db: bp.Database) -> None:
    from tokenizers import models

    lm = bp.LanguageModel(gpt2, deepcopy(tokenizer), db=db)
    before = lm("The quick brown fox")
    backend = lm.tokenizer.backend_tokenizer
    backend.model = models.BPE(vocab=tokenizer.get_vocab(), merges=[])
    after = lm("The quick brown fox")
    assert after.num_cached_tokens == 0
    assert len(after.input_ids) > len(before.input_ids)


def test_an_eager_completion_is_not_run_as_a_prompt(lm: bp.LanguageModel) -> None:
    lm("The quick")
    calls = lm.counters.num_model_calls
    lm.score("The quick", [bp.Text(" brown fox jumps over", eager=True)])
    assert lm.counters.num_model_calls == calls + 1


def test_scores_take_any_iterable(lm: bp.LanguageModel) -> None:
    scores = lm.score((f"The {word}" for word in ("quick", "lazy")), (f" {word}" for word in ("fox", "dog", "end")))
    assert scores.shape == (2, 3)
    assert lm.score("The", []).shape == (0,)
    assert lm([]) == []


def test_an_unpredictable_completion_is_refused_before_anything_is_computed(lm: bp.LanguageModel) -> None:
    with pytest.raises(PromptError, match="empty"):
        lm.score("The quick", [" brown", ""])
    assert lm.counters.num_model_calls == 0


def test_a_model_without_its_tokenizer_is_told_at_once(gpt2: Any) -> None:
    with pytest.raises(PromptError, match="tokenizer"):
        bp.Text("a", gpt2)


def test_more_tokens_than_are_remembered_are_encoded_all_the_same(
    lm: bp.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backprompt_db.compute.tokens._MAX_REMEMBERED_TOKENS", 10)
    for _ in range(3):
        result = (lm.text("The quick brown fox") + " jumps over" + " the lazy dog" + " again and again")()
        assert result.token_logprobs[1:].isfinite().all()
        lm.db.flush()
        lm.db.store.delete([key for key, _ in lm.db.store.keys()])
