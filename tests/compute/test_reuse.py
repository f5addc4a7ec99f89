"""What is computed, what is found again, what is kept: nothing twice, nothing stale."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import backprompt_db as bp
from backprompt_db.prompt.representation import OWN_PARTS, Part
from backprompt_db.store.contract import Blob
from tests.conftest import plain_logprobs, tiny_gpt2
from tests.support.stored import key_of, parts_of

MakeLM = Callable[..., bp.LanguageModel]


def num_tokens(lm: bp.LanguageModel, *strings: str) -> int:
    return sum(len(lm.tokenizer(string)["input_ids"]) for string in strings)


def test_a_second_run_computes_nothing_and_returns_the_same_bits(lm: bp.LanguageModel) -> None:
    prompt = lm.text("The quick brown fox") + " jumps"
    first, second = prompt(), prompt()
    assert (first.num_cached_tokens, second.num_computed_tokens) == (0, 0)
    assert first.num_computed_tokens == second.num_cached_tokens == num_tokens(lm, "The quick brown fox", " jumps")
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.token_logprobs[1:], second.token_logprobs[1:])
    assert prompt.model_repr is second


def test_another_database_handle_finds_what_was_stored_bit_for_bit(
    lm: bp.LanguageModel, make_lm: MakeLM, open_db: Callable[..., bp.Database]
) -> None:
    prompt = lm.text("The quick brown fox") + " jumps"
    first = prompt()
    lm.db.close()
    other = make_lm(db=open_db(lm.db.directory))
    again = (other.text("The quick brown fox") + " jumps")()
    assert again.num_computed_tokens == 0
    assert other.counters.num_model_calls == 0
    assert torch.equal(first.logits, again.logits)
    assert torch.equal(first.token_logprobs[1:], again.token_logprobs[1:])


def test_editing_the_middle_recomputes_only_what_follows(lm: bp.LanguageModel) -> None:
    pieces = ["Pick the endpoint.\n", "Request: list users", "\nEndpoint:"]
    lm(lm.text(pieces[0]) + pieces[1] + pieces[2])
    edited = (lm.text(pieces[0]) + "Request: show users" + pieces[2])()
    assert edited.num_cached_tokens == num_tokens(lm, pieces[0])
    assert edited.num_computed_tokens == num_tokens(lm, "Request: show users", pieces[2])


def test_a_part_that_is_asked_for_later_is_computed_and_added_then(lm: bp.LanguageModel) -> None:
    prompt = lm.text("Request: list users") + "\nEndpoint:"
    scored = lm.score(prompt, [" GET /users"])
    result = (prompt + " GET /users")()
    assert result.num_computed_tokens == 0
    assert float(result.token_logprobs[-num_tokens(lm, " GET /users") :].double().sum()) == pytest.approx(scored[0])
    continued = (prompt + " GET /users" + " again")()
    assert continued.num_computed_tokens == num_tokens(lm, "\nEndpoint:", " GET /users", " again")
    assert parts_of(lm, result.text) == [set(OWN_PARTS)] * 3
    assert (prompt + " GET /users" + " at last")().num_computed_tokens == num_tokens(lm, " at last")


def test_scoring_again_reads_only_scores(lm: bp.LanguageModel, make_lm: MakeLM) -> None:
    prompts, completions = ["Request: a\n", "Request: b\n"], [" GET", " POST"]
    first = lm.score(prompts, completions)
    other = make_lm(db=lm.db)
    before = lm.db.counters
    assert np.array_equal(other.score(prompts, completions), first)
    assert lm.db.counters.num_hits - before.num_hits == 4
    assert other.counters.num_model_calls == 0


@pytest.mark.parametrize("part", OWN_PARTS)
def test_an_evicted_part_of_an_ancestor_is_computed_again_and_its_descendants_are_still_hits(
    lm: bp.LanguageModel, part: Part
) -> None:
    prompt = lm.text("Pick the endpoint.\n") + "Request: list users" + "\nEndpoint:"
    first = prompt()
    lm.db.flush()
    lm.db.store.delete([key_of(lm, prompt.segments()[0], part)])
    assert torch.equal(prompt().logits, first.logits)
    continued = (prompt + " GET /users")()
    logprobs, _ = plain_logprobs(lm.model, continued.input_ids)
    assert torch.allclose(continued.token_logprobs, logprobs, atol=1e-4, equal_nan=True)
    assert continued.num_computed_tokens <= num_tokens(lm, " GET /users") + num_tokens(lm, "Pick the endpoint.\n")


def test_everything_evicted_between_two_calls_is_computed_again(lm: bp.LanguageModel) -> None:
    prompt = lm.text("Pick the endpoint.\n") + "Request: list users"
    first = prompt()
    lm.db.flush()
    lm.db.store.delete([key for key, _ in list(lm.db.store.keys())])
    second = prompt()
    assert second.num_cached_tokens == 0
    assert torch.allclose(first.logits, second.logits, atol=1e-5)


def test_damaged_keys_and_values_are_computed_again(lm: bp.LanguageModel) -> None:
    context = lm.text("Pick the endpoint.\n")
    lm(context)
    lm.db.flush()
    key = key_of(lm, context.segments()[0], Part.KV)
    with lm.db.store._open_environment().transaction(write=True) as transaction:  # type: ignore[attr-defined]
        record = bytes([*key.address, *key.part.value, 0, 0, 0, 0])
        damaged = bytearray(transaction.get(record) or b"")
        damaged[len(damaged) // 2] ^= 1
        transaction.put(record, bytes(damaged))
    lm.db.memory.clear()
    result = (context + "Request: list users")()
    logprobs, _ = plain_logprobs(lm.model, result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=1e-4, equal_nan=True)
    assert lm.db.counters.num_quarantined == 1


def test_keys_and_values_of_another_shape_are_computed_again(lm: bp.LanguageModel) -> None:
    context, other = lm.text("Pick the endpoint.\n"), lm.text("x")
    lm([context, other])
    lm.db.flush()
    key, foreign = (key_of(lm, text.segments()[0], Part.KV) for text in (context, other))
    blob = lm.db.store.get(foreign)
    assert blob is not None
    lm.db.store.delete([key])
    lm.db.store.put([Blob(key, bytes(blob))])
    lm.db.memory.clear()
    result = (context + "Request: list users")()
    logprobs, _ = plain_logprobs(lm.model, result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=1e-4, equal_nan=True)
    lm.db.flush()
    assert lm.db.counters.num_quarantined == 1
    assert (context + "another request")().num_computed_tokens == num_tokens(lm, "another request")


def test_a_fine_tuning_step_is_another_key(lm: bp.LanguageModel) -> None:
    before = lm("The quick brown fox")
    optimizer = torch.optim.SGD(lm.model.parameters(), lr=0.1)
    lm.model(before.input_ids[None], labels=before.input_ids[None]).loss.backward()
    optimizer.step()
    after = lm("The quick brown fox")
    assert after.num_cached_tokens == 0
    logprobs, _ = plain_logprobs(lm.model, after.input_ids)
    assert torch.allclose(after.token_logprobs, logprobs, atol=1e-4, equal_nan=True)
    assert not torch.allclose(after.logits, before.logits, atol=1e-2)


def test_an_adapter_and_its_absence_are_different_keys(gpt2: Any, make_lm: MakeLM) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    lm = make_lm(get_peft_model(gpt2, config))
    with_adapter = lm("The quick brown fox")
    with lm.model.disable_adapter():
        without = lm("The quick brown fox")
    again = lm("The quick brown fox")
    assert without.num_cached_tokens == 0
    assert again.num_computed_tokens == 0
    assert torch.equal(again.logits, with_adapter.logits)
    assert not torch.allclose(without.logits, with_adapter.logits, atol=1e-3)


def test_another_dtype_another_seed_and_another_tokenizer_are_other_keys(
    lm: bp.LanguageModel, make_lm: MakeLM, tokenizer_with_bos: Any
) -> None:
    lm("The quick brown fox")
    others = [
        make_lm(tiny_gpt2().to(torch.bfloat16), db=lm.db),
        make_lm(tiny_gpt2(seed=1), db=lm.db),
        bp.LanguageModel(lm.model, tokenizer_with_bos, db=lm.db),
    ]
    assert [other("The quick brown fox").num_cached_tokens for other in others] == [0, 0, 0]


def test_namespaces_share_nothing(make_lm: MakeLM, open_db: Callable[..., bp.Database]) -> None:
    first = make_lm(db=open_db(namespace="one"))
    first("The quick brown fox")
    first.db.close()
    directory = first.db.directory
    assert make_lm(db=open_db(directory, namespace="two"))("The quick brown fox").num_cached_tokens == 0
    assert make_lm(db=open_db(directory, namespace="one"))("The quick brown fox").num_computed_tokens == 0


def test_deterministic_recomputes_bit_for_bit(make_lm: MakeLM) -> None:
    documents = ["doc one is here", "another document", "third"]

    def run(documents: list[str], *, first_alone: bool) -> list[torch.Tensor]:
        lm = make_lm(deterministic=True)
        context = lm.text("Pick the endpoint.\n")
        if first_alone:
            lm([context, context + documents[0]])
        result = (context + bp.parallel(*documents) + " question" + "?")()
        one = (context + documents[1])()
        return [result.logits, one.logits, *(layer.keys for layer in one.past_key_values.layers)]

    packed_at_once = run(documents, first_alone=False)
    piecemeal = run([documents[2], documents[1], documents[0]], first_alone=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(packed_at_once, piecemeal, strict=True))


def test_eager_texts_are_computed_as_they_are_concatenated(lm: bp.LanguageModel) -> None:
    text = lm.text("The quick", eager=True)
    assert text.model_repr is not None
    longer = text + " brown" + " fox"
    assert longer.model_repr is not None
    assert lm.counters.num_model_calls == 3
    assert longer().num_computed_tokens == 0
    assert (lm.text("lazy") + " dog").model_repr is None


def test_the_original_way_of_making_a_text_works(
    gpt2: Any, tokenizer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKPROMPT_DB", str(tmp_path / "default"))
    text = bp.Text("The quick", (gpt2, tokenizer)) + bp.Text(" brown fox", (gpt2, tokenizer))
    result = text()
    assert text.model_repr is result
    logprobs, _ = plain_logprobs(gpt2, result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=1e-4, equal_nan=True)
    assert (tmp_path / "default" / "manifest.json").exists()


def test_a_running_text_with_a_seam_logs_it_once(lm: bp.LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="backprompt_db")
    for _ in range(2):
        (lm.text("the endpo", seams="keep") + "int for the request")()
        (lm.text("the endpo", seams="keep") + "int for the request" + ".")()
    assert [record.levelname for record in caplog.records if "a seam changes" in record.message] == ["INFO"]


def test_branches_whose_tokens_a_seam_changes_are_warned_of_once(
    lm: bp.LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    for ending in ("int for", "int of"):
        (lm.text("the endpo") + bp.parallel(ending, " other"))()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "'the endpo' + 'int for'" in warnings[0]


def test_a_part_computed_again_with_another_one_is_returned_as_it_is_stored(lm: bp.LanguageModel) -> None:
    prompt = lm.text("Request: list users") + "\nEndpoint:"
    first = prompt()
    assert first.logits.isfinite().all()
    lm.db.flush()
    lm.db.store.delete([key_of(lm, segment, part) for segment in prompt.segments() for part in (Part.LOGITS, Part.KV)])
    _, again = lm(["another prompt", prompt])
    assert again.num_computed_tokens == 0
    assert torch.allclose(again.logits, first.logits, atol=1e-4)
    assert lm.counters.num_computed_tokens > first.num_computed_tokens + num_tokens(lm, "another prompt")
    assert torch.equal(again.token_logprobs[1:], first.token_logprobs[1:])


def test_a_damaged_catalog_fails_no_computation(lm: bp.LanguageModel) -> None:
    lm("The quick brown fox")
    lm.db.flush()
    assert lm.db.directory is not None
    (lm.db.directory / "catalog.sqlite").write_bytes(b"garbage" * 1000)
    result = (lm.text("The quick brown fox") + " jumps")()
    assert result.num_computed_tokens > 0
    assert lm.text("The quick brown fox jumps over the lazy dog", split=3).segments()
