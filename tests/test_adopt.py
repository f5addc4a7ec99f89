"""A cache that the user computed is stored if it is what the model makes of the text, and refused with why if not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

import backprompt_db as bp
from backprompt_db.demo.smollm2 import smollm2_directory
from backprompt_db.errors import (
    BackpromptError,
    ContextLengthExceeded,
    ModelMismatch,
    PromptError,
    StoreReadOnly,
    UnsupportedModel,
)
from backprompt_db.maintenance.verify import verify

from .conftest import plain_logprobs, tiny_gpt2, train_tokenizer
from .families import FAMILIES, REFUSED, SUPPORTED

MakeLM = Callable[..., bp.LanguageModel]

TOLERANCE = 1e-4
PIECES = [
    "Pick the endpoint for the request.\nGET /users lists users. POST /orders creates an order.\n",
    "Request: show me everyone who signed up this week",
    "\nEndpoint:",
]
CHECKS: list[Any] = ["sample", "full"]


def chain(lm: bp.LanguageModel, pieces: Sequence[str] = PIECES) -> bp.Text:
    return sum(map(lm.text, pieces), start=lm.text(""))


def ids_of(tokenizer: Any, pieces: Sequence[str] = PIECES) -> torch.Tensor:
    return torch.tensor([[token for piece in pieces for token in tokenizer(piece)["input_ids"]]])


def plain(model: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
    """What a user does: one pass over a prompt's tokens that fills a cache."""
    with torch.no_grad():
        return model(input_ids, use_cache=True, **{"past_key_values": DynamicCache(), **inputs})


def tensors(cache: Any) -> torch.Tensor:
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])


def num_stored(db: bp.Database) -> int:
    db.flush()
    return db.counters.num_stored


@pytest.mark.parametrize("check", CHECKS)
def test_what_is_adopted_comes_back_bit_for_bit(lm: bp.LanguageModel, check: Any) -> None:
    output = plain(lm.model, ids_of(lm.tokenizer))
    expected = tensors(output.past_key_values).clone()
    adopted = lm.adopt(chain(lm), output.past_key_values, check=check)
    num_tokens = ids_of(lm.tokenizer).shape[1]
    assert adopted.num_tokens == adopted.num_stored_tokens == num_tokens
    calls = lm.counters.num_model_calls
    assert torch.equal(tensors(lm.past_key_values(chain(lm))), expected)
    assert lm.counters.num_model_calls == calls
    lm.db.flush()
    assert verify(lm.db).is_clean


def test_what_follows_an_adopted_text_computes_nothing_of_it(lm: bp.LanguageModel) -> None:
    lm.adopt(chain(lm), plain(lm.model, ids_of(lm.tokenizer)).past_key_values)
    scores = lm.score(chain(lm) + " for", [" GET /users", " POST /orders"])
    assert lm.counters.num_computed_tokens == ids_of(lm.tokenizer, [" for", " GET /users", " POST /orders"]).shape[1]
    own = [ids_of(lm.tokenizer, [*PIECES, " for", label]) for label in (" GET /users", " POST /orders")]
    for score, ids, label in zip(scores, own, (" GET /users", " POST /orders"), strict=True):
        logprobs, _ = plain_logprobs(lm.model, ids[0])
        assert float(logprobs[-ids_of(lm.tokenizer, [label]).shape[1] :].sum()) == pytest.approx(score, abs=TOLERANCE)


def test_generating_after_an_adopted_text_computes_nothing_of_it(lm: bp.LanguageModel) -> None:
    lm.adopt(chain(lm), plain(lm.model, ids_of(lm.tokenizer)).past_key_values)
    reply = lm.generate(chain(lm), max_new_tokens=5)
    assert lm.counters.num_computed_tokens == 0
    ids = ids_of(lm.tokenizer)
    expected = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, pad_token_id=0)
    assert reply.token_ids.tolist() == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("what", ["full check", "logits", "logits of a batch"])
def test_with_logits_or_a_full_check_running_the_text_computes_nothing(lm: bp.LanguageModel, what: str) -> None:
    output = plain(lm.model, ids_of(lm.tokenizer))
    told: dict[str, Any] = {"logits": output.logits if what == "logits of a batch" else output.logits[0]}
    lm.adopt(chain(lm), output.past_key_values, **({"check": "full"} if what == "full check" else told))
    result = chain(lm)()
    assert result.num_computed_tokens == 0
    logprobs, logits = plain_logprobs(lm.model, ids_of(lm.tokenizer)[0])
    assert torch.allclose(result.token_logprobs, logprobs, atol=TOLERANCE, equal_nan=True)
    assert torch.allclose(result.logits, logits, atol=TOLERANCE)


def test_without_logits_scores_are_computed_when_they_are_asked_for(lm: bp.LanguageModel) -> None:
    lm.adopt(chain(lm), plain(lm.model, ids_of(lm.tokenizer)).past_key_values)
    result = chain(lm)()
    logprobs, _ = plain_logprobs(lm.model, ids_of(lm.tokenizer)[0])
    assert result.num_computed_tokens == ids_of(lm.tokenizer).shape[1]
    assert torch.allclose(result.token_logprobs, logprobs, atol=TOLERANCE, equal_nan=True)


def test_what_is_stored_already_stays_as_it_is(lm: bp.LanguageModel) -> None:
    chain(lm, PIECES[:2])()
    before = tensors(lm.past_key_values(chain(lm, PIECES[:2]))).clone()
    adopted = lm.adopt(chain(lm), plain(lm.model, ids_of(lm.tokenizer)).past_key_values)
    assert adopted.num_stored_tokens == ids_of(lm.tokenizer, PIECES[2:]).shape[1]
    assert torch.equal(tensors(lm.past_key_values(chain(lm, PIECES[:2]))), before)
    assert lm.adopt(chain(lm), lm.past_key_values(chain(lm))).num_stored_tokens == 0


def test_a_cache_may_be_extended_after_it_was_adopted(lm: bp.LanguageModel) -> None:
    cache = plain(lm.model, ids_of(lm.tokenizer)).past_key_values
    expected = tensors(cache).clone()
    lm.adopt(chain(lm), cache)
    for layer in cache.layers:
        layer.keys.zero_()
        layer.values.zero_()
    assert torch.equal(tensors(lm.past_key_values(chain(lm))), expected)


def test_a_sample_costs_less_than_computing(lm: bp.LanguageModel) -> None:
    text, ids = lm.text(PIECES[0] * 6), ids_of(lm.tokenizer, [PIECES[0] * 6])
    adopted = lm.adopt(text, plain(lm.model, ids).past_key_values)
    assert adopted.num_checked_tokens <= ids.shape[1] // 16 + 2
    assert lm.adopt(text, lm.past_key_values(text), check="full").num_checked_tokens == ids.shape[1]


def test_a_static_cache_is_taken_as_far_as_it_is_filled(lm: bp.LanguageModel) -> None:
    cache = StaticCache(lm.model.config, max_cache_len=128)
    lm.adopt(chain(lm), plain(lm.model, ids_of(lm.tokenizer), past_key_values=cache).past_key_values)
    assert tensors(lm.past_key_values(chain(lm))).shape[-2] == ids_of(lm.tokenizer).shape[1]


def test_a_cache_that_generate_filled_is_taken_with_what_was_generated(lm: bp.LanguageModel) -> None:
    ids = ids_of(lm.tokenizer)
    output = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, pad_token_id=0, return_dict_in_generate=True
    )
    cache = output.past_key_values
    cache.crop(ids.shape[1] - cache.get_seq_length())
    assert lm.adopt(chain(lm), cache).num_stored_tokens == ids.shape[1]


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_of_a_batch_padded_on_the_left_is_taken_without_its_padding(lm: bp.LanguageModel, row: int) -> None:
    rows = [ids_of(lm.tokenizer, pieces)[0] for pieces in (PIECES, PIECES[:1])]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(each, (longest - len(each), 0)) for each in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(each) for each in rows]).long()
    output = plain(lm.model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    text = chain(lm, (PIECES, PIECES[:1])[row])
    lm.adopt(text, output.past_key_values, row=row, logits=output.logits)
    result = text()
    assert result.num_computed_tokens == 0
    assert torch.allclose(result.logits, plain_logprobs(lm.model, rows[row])[1], atol=TOLERANCE)


def test_parallel_branches_and_explicit_starts_are_taken_as_the_library_lays_them_out(
    lm: bp.LanguageModel, make_lm: MakeLM
) -> None:
    def text(lm: bp.LanguageModel) -> bp.Text:
        return lm.text(PIECES[0]) + bp.parallel("Document one. ", "Two. ") + PIECES[1] + lm.text("far", start=200)

    other = make_lm()
    other.adopt(text(other), lm.past_key_values(text(lm)))
    assert torch.equal(tensors(other.past_key_values(text(other))), tensors(lm.past_key_values(text(lm))))
    apart = other.text(PIECES[0]) + "Document one. " + "Two. " + PIECES[1] + other.text("far", start=200)
    with pytest.raises(ModelMismatch):
        other.adopt(apart, lm.past_key_values(text(lm)))


def test_a_text_that_ends_in_branches_is_taken(lm: bp.LanguageModel, make_lm: MakeLM) -> None:
    other = make_lm()
    branches = bp.parallel(" GET /users", " POST /orders")
    adopted = other.adopt(other.text(PIECES[0]) + branches, lm.past_key_values(lm.text(PIECES[0]) + branches))
    assert adopted.num_stored_tokens == ids_of(lm.tokenizer, [PIECES[0], " GET /users", " POST /orders"]).shape[1]


# What is refused


def assert_refused(
    lm: bp.LanguageModel, text: bp.Text, cache: Any, *, error: type[BackpromptError], match: str, **told: Any
) -> None:
    for check in CHECKS:
        with pytest.raises(error, match=match):
            lm.adopt(text, cache, check=check, **told)
    assert num_stored(lm.db) == 0


@pytest.mark.parametrize("place", range(5))
def test_one_other_word_is_refused_wherever_it_is(lm: bp.LanguageModel, place: int) -> None:
    words = [" users"] * 5
    other = [word if number != place else " week" for number, word in enumerate(words)]
    assert ids_of(lm.tokenizer, words).shape == ids_of(lm.tokenizer, other).shape == (1, 5)
    cache = plain(lm.model, ids_of(lm.tokenizer, other)).past_key_values
    assert_refused(lm, chain(lm, words), cache, error=ModelMismatch, match=rf"at token {place}, .*layer 0 is off by")


def test_the_tokens_of_the_joined_string_are_refused_where_a_seam_changes_them(lm: bp.LanguageModel) -> None:
    pieces = ["The quick brown fo", "x jumps"]
    cache = plain(lm.model, ids_of(lm.tokenizer, ["".join(pieces)])).past_key_values
    assert_refused(lm, chain(lm, pieces), cache, error=BackpromptError, match="tokens?")


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
    (mistral,) = [family for family in FAMILIES if family.name == "mistral"]
    lm = make_lm(mistral.build())
    lm.model.config.sliding_window = 8
    lm = make_lm(lm.model)
    ids = ids_of(lm.tokenizer)
    forgets = plain(lm.model, ids, past_key_values=DynamicCache(config=lm.model.config)).past_key_values
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


@pytest.mark.parametrize("fidelity", ["bfloat16", "int8"])
def test_a_lossy_database_says_so_and_takes_nothing_from_a_model_that_demands_exact_values(
    make_lm: MakeLM, open_db: Callable[..., bp.Database], fidelity: str
) -> None:
    db = open_db(fidelity=fidelity)
    lm, exact = make_lm(db=db), make_lm(db=db, exact=True)
    cache = plain(lm.model, ids_of(lm.tokenizer)).past_key_values
    with pytest.raises(StoreReadOnly, match=f"exact values, and the database keeps them as {fidelity}"):
        exact.adopt(chain(exact), cache)
    adopted = lm.adopt(chain(lm), cache)
    assert (adopted.fidelity, adopted.num_stored_tokens) == (fidelity, adopted.num_tokens)
    db.flush()
    assert (tensors(lm.past_key_values(chain(lm))) - tensors(cache)).abs().max() > 0


def test_a_deterministic_model_adopts_nothing(make_lm: MakeLM) -> None:
    lm = make_lm(deterministic=True)
    with pytest.raises(PromptError, match="deterministic"):
        lm.adopt(chain(lm), plain(lm.model, ids_of(lm.tokenizer)).past_key_values)


def test_another_process_finds_what_was_adopted(
    lm: bp.LanguageModel, make_lm: MakeLM, open_db: Callable[..., bp.Database]
) -> None:
    output = plain(lm.model, ids_of(lm.tokenizer))
    lm.adopt(chain(lm), output.past_key_values, logits=output.logits)
    lm.db.close()
    other = make_lm(db=open_db(lm.db.directory))
    assert chain(other)().num_computed_tokens == 0
    assert other.counters.num_model_calls == 0


@pytest.mark.parametrize("family", SUPPORTED[::4], ids=str)
def test_families_adopt_what_plain_passes_compute_and_nothing_else(family: Any, make_lm: MakeLM) -> None:
    lm = make_lm(family.build())
    ids = ids_of(lm.tokenizer)
    wrong = ids.clone()
    wrong[0, 5] += 1
    with pytest.raises(ModelMismatch, match="is off by"):
        lm.adopt(chain(lm), plain(lm.model, wrong).past_key_values)
    output = plain(lm.model, ids)
    lm.adopt(chain(lm), output.past_key_values, logits=output.logits)
    result = chain(lm)()
    assert result.num_computed_tokens == 0
    assert torch.allclose(result.logits, plain_logprobs(lm.model, ids[0])[1], atol=TOLERANCE)


def test_a_model_that_cannot_be_cached_adopts_nothing(make_lm: MakeLM) -> None:
    lm = make_lm(REFUSED[0].build())
    with pytest.raises(UnsupportedModel):
        lm.adopt(chain(lm), DynamicCache())


def test_a_model_whose_mask_has_no_room_for_a_sample_is_checked_in_full(make_lm: MakeLM) -> None:
    lm = make_lm(tiny_gpt2(n_positions=256))
    lm.model.register_buffer("causal", torch.ones(256, 256, dtype=torch.bool))
    text, ids = lm.text("a" * 250), ids_of(lm.tokenizer, ["a" * 250])
    adopted = lm.adopt(text, plain(lm.model, ids).past_key_values)
    assert adopted.num_checked_tokens == ids.shape[1]


@pytest.fixture(scope="module")
def shared() -> Iterator[bp.LanguageModel]:
    """A model for all examples of one test."""
    with bp.open(":memory:") as db:
        yield bp.LanguageModel(tiny_gpt2(), train_tokenizer(), db=db)


@settings(max_examples=30, deadline=None)
@given(pieces=st.lists(st.text(alphabet="ab c\n", min_size=1, max_size=20), min_size=1, max_size=6))
def test_any_chain_is_adopted_and_runs_like_a_plain_pass(shared: bp.LanguageModel, pieces: list[str]) -> None:
    ids = ids_of(shared.tokenizer, pieces)
    output = plain(shared.model, ids)
    shared.adopt(chain(shared, pieces), output.past_key_values, logits=output.logits)
    result = chain(shared, pieces)()
    assert result.num_computed_tokens == 0
    assert torch.equal(result.input_ids, ids[0])
    assert torch.allclose(
        result.token_logprobs, plain_logprobs(shared.model, ids[0])[0], atol=TOLERANCE, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_trained_models_cache_is_adopted_and_one_that_begins_a_position_later_is_not(dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = smollm2_directory()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with bp.open(":memory:") as db:
        lm = bp.LanguageModel(model, AutoTokenizer.from_pretrained(directory), db=db)
        ids = ids_of(lm.tokenizer)
        assert lm.adopt(chain(lm), plain(model, ids).past_key_values).num_stored_tokens == ids.shape[1]
        shifted = plain(model, ids, position_ids=torch.arange(1, ids.shape[1] + 1)[None])
        with pytest.raises(ModelMismatch, match="layer 0 is off by"):
            lm.adopt(chain(lm), shifted.past_key_values)
        mask = (torch.arange(ids.shape[1]) != 1).long()[None]  # a token that is not among those of the sample
        blind = plain(model, ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None])
        with pytest.raises(ModelMismatch, match="is off by"):
            lm.adopt(chain(lm), blind.past_key_values)
