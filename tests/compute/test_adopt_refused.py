"""A cache that is not what the model makes of the text is refused, and why is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import backprompt_db as bp
from backprompt_db.compute.inference.kv_cache import CACHE_KEYWORD
from backprompt_db.errors import (
    BackpromptError,
    ContextLengthExceeded,
    ModelMismatch,
    PromptError,
    StoreReadOnly,
    UnsupportedModel,
)
from tests.conftest import plain_logprobs, tiny_gpt2
from tests.support.adopt import PIECES, TOLERANCE, MakeLM, assert_refused, chain, ids_of, num_stored, plain
from tests.support.families import REFUSED, by_name


@pytest.mark.parametrize("place", range(5))
def test_one_other_word_is_refused_wherever_it_is(lm: bp.LanguageModel, place: int) -> None:
    words = [" users"] * 5
    other = [word if number != place else " week" for number, word in enumerate(words)]
    assert ids_of(lm.tokenizer, words).shape == ids_of(lm.tokenizer, other).shape == (1, 5)
    cache = plain(lm.model, ids_of(lm.tokenizer, other)).past_key_values
    assert_refused(lm, chain(lm, words), cache, error=ModelMismatch, match=rf"at token {place}, .*layer 0 is off by")


def test_the_tokens_of_the_joined_string_are_refused_for_pieces_that_are_kept(lm: bp.LanguageModel) -> None:
    pieces = ["The quick brown fo", "x jumps"]
    cache = plain(lm.model, ids_of(lm.tokenizer, ["".join(pieces)])).past_key_values
    kept = lm.text("", seams="keep") + chain(lm, pieces)
    assert_refused(lm, kept, cache, error=BackpromptError, match="tokens?")


def test_another_models_cache_is_refused(lm: bp.LanguageModel) -> None:
    cache = plain(tiny_gpt2(seed=1), ids_of(lm.tokenizer)).past_key_values
    assert_refused(lm, chain(lm), cache, error=ModelMismatch, match="layer 0 is off by")


def test_a_model_that_was_trained_further_is_refused(lm: bp.LanguageModel) -> None:
    trained = tiny_gpt2()
    with torch.no_grad():
        trained.transformer.h[1].attn.c_proj.weight.mul_(1.05)
    cache = plain(trained, ids_of(lm.tokenizer)).past_key_values
    assert_refused(lm, chain(lm), cache, error=ModelMismatch, match="layer 2 is off by")


@pytest.mark.parametrize("change", ["positions", "mask", "noise", "last layer", "one token", "sixteen tokens"])
def test_wrong_numbers_are_refused_with_where_they_are(lm: bp.LanguageModel, change: str) -> None:
    ids = ids_of(lm.tokenizer)
    told: dict[str, Any] = {}
    if change == "positions":
        told["position_ids"] = torch.arange(1, ids.shape[1] + 1)[None]
    if change == "mask":
        told["attention_mask"] = (torch.arange(ids.shape[1]) != 3).long()[None]
        told["position_ids"] = torch.arange(ids.shape[1])[None]
    cache = plain(lm.model, ids, **told).past_key_values
    layer = cache.layers[-1]
    if change == "noise":
        layer.keys += 0.05 * torch.randn(layer.keys.shape, generator=torch.Generator().manual_seed(0))
    if change == "last layer":
        layer.values *= 1.01
    if change == "one token":  # the last of a piece
        layer.values[:, :, ids_of(lm.tokenizer, PIECES[:1]).shape[1] - 1] *= 1.1
    if change == "sixteen tokens":
        layer.keys[:, :, 5:21] *= 1.01
    assert_refused(lm, chain(lm), cache, error=ModelMismatch, match=r"is off by .*, where rounding stays below 0\.00")


def test_a_single_wrong_token_in_a_deep_layer_is_found_by_the_full_check(lm: bp.LanguageModel) -> None:
    cache = plain(lm.model, ids_of(lm.tokenizer)).past_key_values
    cache.layers[-1].keys[:, :, 5] += 1
    with pytest.raises(ModelMismatch, match=r"at token 5, .*layer 2"):
        lm.adopt(chain(lm), cache, check="full")
    assert num_stored(lm.db) == 0


def test_numbers_that_are_not_finite_are_refused(lm: bp.LanguageModel) -> None:
    cache = plain(lm.model, ids_of(lm.tokenizer)).past_key_values
    cache.layers[1].values[0, 0, 7, 0] = torch.nan
    assert_refused(lm, chain(lm), cache, error=ModelMismatch, match="not finite")


@pytest.mark.parametrize("change", ["scaled", "shifted", "short", "flat"])
def test_other_logits_are_refused(lm: bp.LanguageModel, change: str) -> None:
    output = plain(lm.model, ids_of(lm.tokenizer))
    logits = {
        "scaled": output.logits / 0.7,
        "shifted": output.logits.roll(1, dims=1),
        "short": output.logits[:, 1:],
        "flat": output.logits[0, -1],
    }[change]
    error, match = (ModelMismatch, "the logits after it") if change[-2:] == "ed" else (PromptError, "logits have shape")
    assert_refused(lm, chain(lm), output.past_key_values, error=error, match=match, logits=logits)


def test_logits_that_only_a_full_check_can_doubt_are_not_what_it_stores(lm: bp.LanguageModel) -> None:
    output = plain(lm.model, ids_of(lm.tokenizer))
    ends = [ids_of(lm.tokenizer, PIECES[:number]).shape[1] - 1 for number in (1, 2, 3)]
    made_up = output.logits.roll(1, dims=2)
    made_up[:, ends] = output.logits[:, ends]
    lm.adopt(chain(lm), output.past_key_values, logits=made_up, check="full")
    result = chain(lm)()
    assert result.num_computed_tokens == 0
    logprobs, _ = plain_logprobs(lm.model, ids_of(lm.tokenizer)[0])
    assert torch.allclose(result.token_logprobs, logprobs, atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("change", ["vocabulary", "dtype", "nan", "rows", "numpy"])
def test_what_are_no_logits_of_this_model_is_refused(lm: bp.LanguageModel, change: str) -> None:
    output = plain(lm.model, ids_of(lm.tokenizer).repeat(2, 1))
    logits: Any = {
        "vocabulary": output.logits[..., :-1],
        "dtype": output.logits.double(),
        "nan": output.logits.index_fill(1, torch.tensor([5]), torch.nan),  # not among those that are compared
        "rows": output.logits[:1],
        "numpy": output.logits.numpy(),
    }[change]
    error, match = {
        "vocabulary": (ModelMismatch, "599 numbers in float32 after each token, this model's 600"),
        "dtype": (ModelMismatch, "in float64 after each token, this model's 600 in float32"),
        "nan": (ModelMismatch, "not numbers"),
    }.get(change, (PromptError, "logits have shape"))
    assert_refused(lm, chain(lm), output.past_key_values, error=error, match=match, logits=logits, row=1)


@pytest.mark.parametrize("num_more", [-1, 1])
def test_another_number_of_tokens_is_refused(lm: bp.LanguageModel, num_more: int) -> None:
    ids = ids_of(lm.tokenizer)
    cache = plain(lm.model, ids[:, :num_more] if num_more < 0 else torch.cat([ids, ids[:, :1]], 1)).past_key_values
    match = rf"holds {ids.shape[1] + num_more} tokens, the text has {ids.shape[1]}"
    assert_refused(lm, chain(lm), cache, error=PromptError, match=match)


def test_another_shape_or_dtype_is_refused_with_both(lm: bp.LanguageModel) -> None:
    cache = plain(lm.model, ids_of(lm.tokenizer)).past_key_values
    half = plain(tiny_gpt2().bfloat16(), ids_of(lm.tokenizer)).past_key_values
    fewer = DynamicCache()
    fewer.layers = cache.layers[:2]
    assert_refused(lm, chain(lm), half, error=ModelMismatch, match="bfloat16, this model 4 heads of 16 .* float32")
    assert_refused(lm, chain(lm), fewer, error=ModelMismatch, match="2 layers, this model 3")


@pytest.mark.parametrize("cache", [None, DynamicCache(), (), "a cache"], ids=repr)
def test_what_is_no_filled_cache_is_refused(lm: bp.LanguageModel, cache: Any) -> None:
    assert_refused(lm, chain(lm), cache, error=PromptError, match="not a cache")


@pytest.mark.parametrize(
    "change", ["values in half", "fewer heads", "fewer tokens", "no batch", "quantised", "no values"]
)
def test_a_layer_whose_keys_and_values_do_not_belong_together_is_refused(lm: bp.LanguageModel, change: str) -> None:
    cache = plain(lm.model, ids_of(lm.tokenizer)).past_key_values
    layer = cache.layers[1]
    if change == "values in half":  # rounded by less than the check takes for rounding
        for each in cache.layers:
            each.values = each.values.half()
    elif change == "no batch":
        layer.keys = layer.keys[0]
    elif change == "quantised":  # what such a layer calls keys are the few that are not
        layer.keys = layer.values = torch.tensor([])
    else:
        layer.values = {
            "fewer heads": layer.values[:, :2], "fewer tokens": layer.values[:, :, 1:], "no values": None
        }[change]  # fmt: skip
    assert_refused(lm, chain(lm), cache, error=PromptError, match="not a cache")


def test_layers_of_different_numbers_of_rows_are_refused(lm: bp.LanguageModel) -> None:
    cache = plain(lm.model, ids_of(lm.tokenizer).repeat(2, 1)).past_key_values
    layer = cache.layers[-1]
    layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    assert_refused(lm, chain(lm), cache, error=PromptError, match="no row 1", row=1)


def test_a_batch_is_refused_without_a_row_and_with_one_that_it_lacks(lm: bp.LanguageModel) -> None:
    cache = plain(lm.model, ids_of(lm.tokenizer).repeat(2, 1)).past_key_values
    assert_refused(lm, chain(lm), cache, error=PromptError, match="of 2 prompts")
    assert_refused(lm, chain(lm), cache, error=PromptError, match="no row 2", row=2)
    assert lm.adopt(chain(lm), cache, row=1).num_stored_tokens == ids_of(lm.tokenizer).shape[1]


def test_a_row_padded_on_the_right_or_with_positions_of_its_own_is_refused(lm: bp.LanguageModel) -> None:
    ids = ids_of(lm.tokenizer)
    right = plain(lm.model, torch.cat([ids, ids[:, :3]], 1)).past_key_values
    left = torch.cat([ids[:, :3], ids], 1)
    mask = (torch.arange(left.shape[1]) >= 3).long()[None]
    uncounted = plain(lm.model, left, attention_mask=mask, position_ids=torch.arange(left.shape[1])[None])
    for cache in (right, uncounted.past_key_values):
        assert_refused(lm, chain(lm), cache, error=ModelMismatch, match="layer 0 is off by", row=0)


def test_a_cache_that_forgets_is_refused_and_one_that_does_not_is_taken(make_lm: MakeLM) -> None:
    lm = make_lm(by_name("mistral").build())
    lm.model.config.sliding_window = 8
    lm = make_lm(lm.model)
    ids = ids_of(lm.tokenizer)
    forgets = plain(lm.model, ids, **{CACHE_KEYWORD: DynamicCache(config=lm.model.config)}).past_key_values
    assert_refused(lm, chain(lm), forgets, error=PromptError, match=rf"keeps 7 of {ids.shape[1]} tokens: it forgets")
    assert lm.adopt(chain(lm), plain(lm.model, ids).past_key_values).num_stored_tokens == ids.shape[1]


def test_a_text_that_is_too_long_is_refused(lm: bp.LanguageModel) -> None:
    cache = plain(lm.model, ids_of(lm.tokenizer)).past_key_values
    with pytest.raises(ContextLengthExceeded):
        lm.adopt("a" * 300, cache)


def test_a_check_that_does_not_exist_is_refused(lm: bp.LanguageModel) -> None:
    none: Any = "none"
    with pytest.raises(PromptError, match="check='none'"):
        lm.adopt(chain(lm), plain(lm.model, ids_of(lm.tokenizer)).past_key_values, check=none)


# Databases and models


def test_a_database_that_may_only_be_read_takes_nothing(
    lm: bp.LanguageModel, make_lm: MakeLM, open_db: Callable[..., bp.Database]
) -> None:
    lm("something")
    lm.db.flush()
    reader = make_lm(db=open_db(lm.db.directory, mode="r"))
    with pytest.raises(StoreReadOnly, match="only be read"):
        reader.adopt(chain(reader), plain(lm.model, ids_of(lm.tokenizer)).past_key_values)


def test_a_deterministic_model_adopts_nothing(make_lm: MakeLM) -> None:
    lm = make_lm(deterministic=True)
    with pytest.raises(PromptError, match="deterministic"):
        lm.adopt(chain(lm), plain(lm.model, ids_of(lm.tokenizer)).past_key_values)


def test_a_model_that_cannot_be_cached_adopts_nothing(make_lm: MakeLM) -> None:
    lm = make_lm(REFUSED[0].build())
    with pytest.raises(UnsupportedModel):
        lm.adopt(chain(lm), DynamicCache())
