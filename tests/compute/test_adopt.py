"""A cache that the user computed is stored if it is what the model makes of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import StaticCache

import backprompt_db as bp
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from backprompt_db.compute.inference.kv_cache import CACHE_KEYWORD
from backprompt_db.errors import ModelMismatch, StoreReadOnly
from backprompt_db.operations.verify import verify
from tests.conftest import cases, plain_logprobs, tiny_gpt2, train_tokenizer
from tests.support.adopt import CHECKS, PIECES, TOLERANCE, MakeLM, chain, ids_of, plain, tensors
from tests.support.families import REPRESENTED, family_cases


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
    lm.adopt(chain(lm), plain(lm.model, ids_of(lm.tokenizer), **{CACHE_KEYWORD: cache}).past_key_values)
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


def test_another_process_finds_what_was_adopted(
    lm: bp.LanguageModel, make_lm: MakeLM, open_db: Callable[..., bp.Database]
) -> None:
    output = plain(lm.model, ids_of(lm.tokenizer))
    lm.adopt(chain(lm), output.past_key_values, logits=output.logits)
    lm.db.close()
    other = make_lm(db=open_db(lm.db.directory))
    assert chain(other)().num_computed_tokens == 0
    assert other.counters.num_model_calls == 0


@pytest.mark.parametrize("family", family_cases(REPRESENTED))
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


@given(pieces=st.lists(st.text(alphabet="ab c\n", min_size=1, max_size=20), min_size=1, max_size=6))
def test_any_chain_is_adopted_and_runs_like_a_plain_pass(shared: bp.LanguageModel, pieces: list[str]) -> None:
    ids = ids_of(shared.tokenizer, ["".join(pieces)])
    output = plain(shared.model, ids)
    shared.adopt(chain(shared, pieces), output.past_key_values, logits=output.logits)
    result = chain(shared, pieces)()
    assert result.num_computed_tokens == 0
    assert torch.equal(result.input_ids, ids[0])
    assert torch.allclose(
        result.token_logprobs, plain_logprobs(shared.model, ids[0])[0], atol=TOLERANCE, equal_nan=True
    )


@pytest.mark.parametrize("dtype", cases([torch.float32, torch.bfloat16], by_default=[torch.float32]), ids=str)
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
