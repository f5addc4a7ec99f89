"""Recomputing: a wrong value with a right digest is found, and what only rounds differently is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.codec.blob import decode, decode_origin, encode
from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.compute.answers import Recomputer
from backprompt_db.compute.inference.loading import GivenModel
from backprompt_db.database.lineage import Lineage, origin_of
from backprompt_db.errors import ModelMismatch
from backprompt_db.operations.inspection import Kind
from backprompt_db.operations.recompute import Recomputation, error, recompute, tolerance
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.ids import Address
from backprompt_db.prompt.representation import OWN_PARTS, Array, Arrays, Part
from backprompt_db.store.contract import Blob, Key
from tests.conftest import tiny_gpt2

CONTEXT = "Pick the endpoint for the request.\n"
REQUESTS = ["Request: show me everyone", "Request: create an order", "The quick brown fox jumps"]


def run_prompts(lm: bp.LanguageModel) -> None:
    """Chains, branches, an explicit start, completions: 11 segments."""
    context = lm.text(CONTEXT)
    lm([context + request for request in REQUESTS], keep="all")
    lm(context + bp.parallel("Document one. ", "Document two. ") + "Question: which?")
    lm(context + lm.text("A module.", start=40) + " And on.")
    lm.score(context + REQUESTS[0], ["\nGET /users", "\nPOST /orders"])
    lm.db.flush()


def recomputed(lm: bp.LanguageModel, **options: Any) -> Recomputation:
    model = Recomputer(GivenModel(lm.model, lm.tokenizer))
    return recompute(lm.db, model, **{"share": 1.0, "seed": 0} | options)


def key_of(db: bp.Database, text: str, part: Part) -> Key:
    addresses = {key.address for key, _ in db.store.keys()}
    origins = {address: origin_of(db.store, address) for address in addresses}
    (found,) = [address for address, origin in origins.items() if origin and origin.text == text]
    return Key(found, part)


def poison(db: bp.Database, key: Key, change: Callable[[Arrays], Arrays]) -> None:
    """Replace a part by another one of the same form, with the digests that belong to it."""
    blob = db.store.get(key)
    assert blob is not None
    part, origin = decode_origin(blob)
    forged = encode(part, change(decode(part, blob)), origin)
    assert db.store.delete([key]) == 1
    assert db.store.put([Blob(key, forged)]) == [key]
    db.memory.clear()


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, name: Array.from_numpy(change(arrays[name].numpy().copy()))}


def one_token_of_one_head(keys: Any) -> Any:
    keys[1, 2, 0] = keys[1, 2, 1]
    return keys


def one_score(logprobs: Any) -> Any:
    logprobs[-1] -= 0.5
    return logprobs


def likelier_token(logits: Any) -> Any:
    logits[7] = logits.max() + 1
    return logits


class TestFinding:
    def test_what_was_computed_by_the_model_is_found_right(self, lm: bp.LanguageModel) -> None:
        run_prompts(lm)
        found = recomputed(lm)
        num_parts = sum(1 for _ in lm.db.store.keys())
        assert (found.num_representations, found.num_parts, found.num_left_out) == (11, num_parts, 0)
        assert found.problems == ()
        assert found.max_errors.keys() == set(OWN_PARTS)
        assert all(largest <= found.tolerance / 10 for largest in found.max_errors.values())

    @pytest.mark.parametrize(
        ("part", "name", "change"),
        [
            (Part.KV, "keys", one_token_of_one_head),
            (Part.KV, "values", lambda values: values[:, :, ::-1]),
            (Part.SCORES, "token_logprobs", one_score),
            (Part.SCORES, "input_ids", lambda ids: ids[::-1]),
            (Part.LOGITS, "logits", likelier_token),
            (Part.LOGITS, "logits", lambda logits: np.full_like(logits, np.nan)),
        ],
    )
    def test_a_plausible_wrong_value_passes_every_digest_and_is_found(
        self, lm: bp.LanguageModel, part: Part, name: str, change: Callable[[Any], Any]
    ) -> None:
        run_prompts(lm)
        key = key_of(lm.db, REQUESTS[1], part)
        poison(lm.db, key, changed(name, change))
        assert verify(lm.db).is_clean
        found = recomputed(lm)
        assert [(p.address, p.part, p.kind) for p in found.problems] == [(*key, Kind.DIFFERENT)]
        assert lm.db.has(key), "recomputing changes nothing"
        lm.db.discard(key)
        lm(lm.text(CONTEXT) + REQUESTS[1]).past_key_values  # noqa: B018 - computes what is missing
        lm.db.flush()
        assert recomputed(lm).problems == ()

    def test_what_was_computed_from_a_poisoned_value_is_found_too(self, lm: bp.LanguageModel) -> None:
        lm(CONTEXT)
        lm.db.flush()
        poison(lm.db, key_of(lm.db, CONTEXT, Part.KV), changed("values", lambda values: values[:, ::-1]))
        lm(lm.text(CONTEXT) + REQUESTS[0])
        lm.db.flush()
        texts = {origin.text for p in recomputed(lm).problems if p.address and (origin := _origin(lm.db, p.address))}
        assert texts == {CONTEXT, REQUESTS[0]}

    @pytest.mark.exhaustive
    def test_a_chain_of_many_segments_needs_no_recursion(self, make_lm: Callable[..., bp.LanguageModel]) -> None:
        lm = make_lm(tiny_gpt2(n_positions=2048))
        text = lm.text("a", seams="keep")
        for _ in range(1200):
            text += "b"
        lm(text)
        lm.db.flush()
        found = recomputed(lm, share=0.002)
        assert (found.num_representations, found.problems) == (3, ())

    def test_a_value_whose_ancestor_is_gone_is_left_out_and_counted(self, lm: bp.LanguageModel) -> None:
        run_prompts(lm)
        lm.db.store.delete([key_of(lm.db, CONTEXT, part) for part in OWN_PARTS])
        found = recomputed(lm)
        assert (found.num_representations, found.num_left_out) == (0, 10)

    def test_namespaces_are_recomputed_in_their_own(
        self, make_lm: Callable[..., bp.LanguageModel], open_db: Callable[..., bp.Database]
    ) -> None:
        lm = make_lm(db=open_db(namespace="tenant's"))
        run_prompts(lm)
        found = recomputed(lm)
        assert (found.num_representations, found.problems) == (11, ())


def _origin(db: bp.Database, address: Address) -> Any:
    return origin_of(db.store, address)


class TestChoosing:
    def test_a_share_is_chosen_by_the_seed_and_never_empty(self, lm: bp.LanguageModel) -> None:
        run_prompts(lm)
        assert recomputed(lm, share=1e-9).num_representations == 1
        assert recomputed(lm, share=0.5).num_representations == 6
        poison(lm.db, key_of(lm.db, REQUESTS[1], Part.SCORES), changed("token_logprobs", one_score))
        by_seed = [len(recomputed(lm, share=0.3, seed=seed).problems) for seed in range(5)]
        assert set(by_seed) == {0, 1}
        assert by_seed == [len(recomputed(lm, share=0.3, seed=seed).problems) for seed in range(5)]

    def test_another_model_is_told_what_the_database_has(
        self, lm: bp.LanguageModel, make_lm: Callable[..., bp.LanguageModel]
    ) -> None:
        run_prompts(lm)
        other = make_lm(tiny_gpt2(seed=1), db=lm.db)
        with pytest.raises(ModelMismatch, match=other.weights_id.hex()[:12]) as caught:
            recomputed(other)
        assert f"GPT2LMHeadModel ({lm.weights_id.hex()[:12]})" in caught.value.hint
        other(CONTEXT)
        lm.db.flush()
        assert recomputed(other).num_representations == 1
        assert recomputed(lm).num_representations == 11

    def test_nothing_that_is_stored_enters_the_computation(self, lm: bp.LanguageModel) -> None:
        run_prompts(lm)
        num_calls = lm.counters.num_model_calls
        before = lm.db.counters
        recomputed(lm)
        assert lm.counters.num_model_calls == num_calls, "it runs the model, not this LanguageModel"
        assert lm.db.counters == before, "reading to compare is neither a hit nor a miss"

    def test_a_given_tolerance_takes_the_place_of_the_default(self, lm: bp.LanguageModel) -> None:
        run_prompts(lm)
        found = recomputed(lm, max_error=0.0)
        assert found.tolerance == 0
        assert found.problems


class TestTolerance:
    @pytest.mark.parametrize("fidelity", ["bfloat16", "int8"])
    def test_a_lossy_database_passes_until_a_value_is_wrong(
        self, make_lm: Callable[..., bp.LanguageModel], open_db: Callable[..., bp.Database], fidelity: str
    ) -> None:
        lm = make_lm(db=open_db(fidelity=fidelity))
        lm(CONTEXT)
        lm.db.flush()
        lm.db.memory.clear()  # what follows is computed from the rounded values
        run_prompts(lm)
        found = recomputed(lm)
        assert found.problems == ()
        assert found.tolerance == tolerance("F32", Fidelity(fidelity)) > tolerance("F32", Fidelity.EXACT)
        assert found.max_errors[Part.KV] > tolerance("F32", Fidelity.EXACT)
        key = key_of(lm.db, REQUESTS[1], Part.SCORES)
        poison(lm.db, key, changed("token_logprobs", lambda logprobs: logprobs - 10))
        assert [(p.address, p.part) for p in recomputed(lm).problems] == [key]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_rounds_within_its_tolerance(
        self, make_lm: Callable[..., bp.LanguageModel], dtype: torch.dtype
    ) -> None:
        lm = make_lm(tiny_gpt2().to(dtype))
        run_prompts(lm)
        found = recomputed(lm)
        assert found.problems == ()
        assert found.tolerance > tolerance("F32", Fidelity.EXACT)

    def test_deterministic_passes_and_packs_agree_within_the_tolerance(
        self, make_lm: Callable[..., bp.LanguageModel]
    ) -> None:
        lm = make_lm(deterministic=True)
        run_prompts(lm)
        assert recomputed(lm).problems == ()

    def test_other_shapes_and_numbers_that_are_none_are_infinitely_wrong(self) -> None:
        def scores(ids: list[int], logprobs: list[float]) -> Arrays:
            return {
                "input_ids": Array.from_numpy(np.array(ids, dtype=np.int32)),
                "token_logprobs": Array.from_numpy(np.array(logprobs, dtype=np.float32)),
            }

        def distance(stored: Arrays, again: Arrays) -> float:
            return error(Part.SCORES, stored, again, logits=Array.from_numpy(np.arange(9, dtype=np.float32)))

        right = scores([1, 2], [math.nan, -1])
        assert distance(right, right) == 0
        for wrong in (
            scores([1], [math.nan]), scores([1, 3], [math.nan, -1]), scores([1, 2], [0, -1]),
            scores([1, 2], [math.nan, math.nan]), scores([1, 2], [math.nan, -math.inf]),
        ):  # fmt: skip
            assert distance(wrong, right) == math.inf
        assert 0 < distance(scores([1, 2], [math.nan, -2]), right) < 1, "a nat is less than these logits spread"

    @given(st.floats(1e-20, 1e20), st.integers(0, 2**32 - 1))
    def test_errors_of_keys_and_values_do_not_depend_on_their_scale(self, scale: float, seed: int) -> None:
        random = np.random.default_rng(seed)
        right = random.normal(size=(2, 3, 4, 5))
        other = random.normal(size=(2, 3, 4, 5))

        def distance(stored: Any) -> float:
            arrays = {name: Array.from_torch(torch.from_numpy(stored)) for name in ("keys", "values")}
            again = {name: Array.from_torch(torch.from_numpy(right * scale)) for name in ("keys", "values")}
            return error(Part.KV, arrays, again, logits=Array.from_numpy(np.zeros(2, dtype=np.float32)))

        assert distance(right * scale) == 0
        assert distance(other * scale) > 0.5
        assert 5e-4 < distance(right * scale * 1.001) < 5e-3


class TestLineage:
    def test_segments_are_rebuilt_as_they_were(self, lm: bp.LanguageModel) -> None:
        run_prompts(lm)
        text = lm.text(CONTEXT) + bp.parallel("Document one. ", "Document two. ") + "Question: which?"
        origin = origin_of(lm.db.store, key_of(lm.db, "Question: which?", Part.KV).address)
        assert origin is not None
        lineage = Lineage(lm.db.store, (lm.weights_id, lm.tokenizer_id))
        assert lineage.segment(origin) == text.tips()[0]
        assert {segment.string for segment in lineage.num_tokens} == {segment.string for segment in text.segments()}

    def test_a_namespace_that_a_part_only_claims_has_no_effect(self, lm: bp.LanguageModel) -> None:
        lm(CONTEXT)
        lm.db.flush()
        key = key_of(lm.db, CONTEXT, Part.SCORES)
        blob = lm.db.store.get(key)
        assert blob is not None
        _, origin = decode_origin(blob)
        lm.db.store.delete([Key(key.address, part) for part in OWN_PARTS])
        lm.db.store.put([Blob(key, encode(Part.SCORES, decode(Part.SCORES, blob), replace(origin, namespace="x")))])
        found = recomputed(lm)
        assert (found.num_representations, found.problems) == (1, ())


def test_a_sample_reads_what_it_needs_and_writes_nothing(lm: bp.LanguageModel) -> None:
    run_prompts(lm)
    before = {key: bytes(lm.db.store.get(key) or b"") for key, _ in lm.db.store.keys()}
    recomputed(lm, share=0.2)
    assert {key: bytes(lm.db.store.get(key) or b"") for key, _ in lm.db.store.keys()} == before
