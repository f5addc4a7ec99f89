"""Attention windows: proven at the cost of a few tokens, masked by position ids, and left alone in the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

import backprompt_db as bp
from backprompt_db import Text, parallel
from backprompt_db.compute.inference.fingerprint import weights_id
from backprompt_db.compute.inference.selfcheck import Verdict, examine
from backprompt_db.errors import ContextLengthExceeded
from tests.conftest import VOCAB_SIZE, plain_logprobs
from tests.support.families import (
    CONTEXT,
    REQUEST,
    TOLERANCE,
    Family,
    by_name,
    family_cases,
    graphs,
    logprobs_as_defined,
)

WINDOW = 16
WINDOWED = {
    "mistral-window": "windowed boolean", "mistral-window-unsaid": "windowed boolean",
    "mixtral-window": "windowed boolean", "phi3-window": "windowed boolean", "starcoder2-window": "windowed boolean",
    "ministral": "layered boolean", "qwen2-window": "layered boolean", "qwen3-window": "layered boolean",
    "gemma2": "layered additive", "gemma3_text": "layered boolean", "olmo3": "layered boolean",
    "cohere2": "layered boolean", "exaone4": "layered boolean", "gpt_oss": "layered additive",
    "modernbert-decoder": "layered boolean",
}  # fmt: skip
"""Families whose windows are masked, and how."""

SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 4096,
}  # fmt: skip

MakeLm = Callable[..., bp.LanguageModel]


def mistral(kind: Any = MistralForCausalLM, *, window: int = WINDOW, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(MistralConfig(**{**SIZES, **options}, sliding_window=window)).eval()


def assert_as_defined(lm: bp.LanguageModel, text: Text) -> None:
    """Every log-probability equals that of one plain pass with masks and position ids from the definition."""
    segments = text.segments()
    ids = {each: lm.tokenizer(each.string, add_special_tokens=False)["input_ids"] for each in segments}
    expected = np.concatenate(logprobs_as_defined(lm.model, segments, ids))
    np.testing.assert_allclose(lm(text).token_logprobs.numpy(), expected, rtol=0, atol=TOLERANCE)


def assert_plain(lm: bp.LanguageModel, text: Text) -> None:
    """Every log-probability equals that of one pass of the model as any user calls it, with its own masks."""
    result = lm(text)
    expected, _ = plain_logprobs(lm.model, result.input_ids)
    np.testing.assert_allclose(result.token_logprobs[1:], expected[1:], rtol=0, atol=TOLERANCE)


class AnotherWindow(MistralForCausalLM):  # type: ignore[misc]  # transformers is untyped
    """Called as any user does, it hides what is `reach` tokens before, whatever its configuration says."""

    reach = WINDOW

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 2:
            num_columns = attention_mask.shape[1]
            causal = torch.ones(num_columns, num_columns, dtype=torch.bool).tril()
            attention_mask = (causal & ~causal.tril(-self.reach))[None, None, -input_ids.shape[1] :]
        return super().forward(input_ids, attention_mask=attention_mask, **others)


class OneTokenMore(AnotherWindow):
    """Its window is one token longer than its configuration says."""

    @property
    def reach(self) -> int:  # type: ignore[override]
        return int(self.config.sliding_window) + 1


class TakesNoMasks(MistralForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("only masks of padding")
        return super().forward(input_ids, attention_mask=attention_mask, **others)


class ShowsItsWindow(MistralForCausalLM):  # type: ignore[misc]
    seen: list[tuple[int, int]] = []  # noqa: RUF012 - shared by the model and what is made of it

    def forward(self, *positional: Any, **others: Any) -> Any:
        self.seen.append((id(self), self.config.sliding_window))
        return super().forward(*positional, **others)


@pytest.mark.parametrize("family", family_cases(map(by_name, WINDOWED)))
def test_families_with_windows_take_masks_that_have_them(family: Family) -> None:
    verdict = examine(family.build())
    assert verdict.form is not None
    assert (verdict.kind, verdict.form.name, verdict.reason) == ("packs", WINDOWED[family.name], None)


@pytest.mark.parametrize("family", family_cases(map(by_name, WINDOWED)))
def test_branches_many_windows_long_are_plain_passes(family: Family, make_lm: MakeLm) -> None:
    lm = make_lm(family.build())
    beginning = Text(CONTEXT) + REQUEST + CONTEXT
    texts = [beginning + branch + REQUEST for branch in (CONTEXT, REQUEST, "\n" + CONTEXT + CONTEXT)]
    assert min(len(result.input_ids) for result in lm(texts)) > 4 * WINDOW
    for text in texts:
        assert_plain(lm, text)


@pytest.mark.parametrize("name", ["mistral-window", "gemma3_text", "gpt_oss"])
def test_windows_go_by_position_ids(name: str, make_lm: MakeLm) -> None:
    lm = make_lm(by_name(name).build())
    assert_as_defined(lm, Text(CONTEXT) + parallel(REQUEST, CONTEXT, "\n") + REQUEST + "\n")
    for start in (0, 20, 200):
        assert_as_defined(lm, Text(CONTEXT) + Text(REQUEST, start=start) + "\n" + REQUEST)


@pytest.fixture(scope="module")
def windowed_lms(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[bp.LanguageModel]]:
    models = [mistral(window=3), by_name("gemma3_text").build()]
    with bp.open(tmp_path_factory.mktemp("windows")) as db:
        yield [bp.LanguageModel(model, tokenizer, db=db) for model in models]


@given(graphs(alphabet="ab ", max_leaves=8))
def test_windows_are_right_in_texts_of_any_shape(windowed_lms: list[bp.LanguageModel], text: Text) -> None:
    for lm in windowed_lms:
        assert_as_defined(lm, lm.text("", seams="keep") + text)


def test_a_window_of_thousands_of_tokens_ends_no_prompt(make_lm: MakeLm) -> None:
    lm = make_lm(mistral(window=1100))
    beginning = Text("fox " * 600) + "dog " * 600
    for ending in ("\nfox", " dog" + "\n" * 30):
        assert len(lm(beginning + ending).input_ids) > 1150
        assert_plain(lm, beginning + ending)


def test_what_was_proven_is_remembered_without_its_window(make_lm: MakeLm) -> None:
    lm = make_lm(by_name("gemma3_text").build())
    lm(CONTEXT)
    lm.db.flush()
    assert_plain(make_lm(lm.model, db=lm.db), Text(CONTEXT) + REQUEST + CONTEXT)


def test_a_window_that_is_off_by_one_is_found() -> None:
    verdict = examine(mistral(OneTokenMore))
    assert verdict.kind == "chains"
    assert "windowed boolean mask: off by" in str(verdict.reason)


def test_a_window_that_is_not_the_one_in_the_configuration_proves_nothing() -> None:
    verdict = examine(mistral(AnotherWindow))
    assert verdict.kind == "chains"
    assert "packs are wrong: its attention window of 16 tokens; windowed boolean mask: its output" in str(
        verdict.reason
    )
    assert "hardly depends on its window" in str(verdict.reason)


def test_a_long_window_that_cannot_be_proven_ends_the_prompt_before_it_forgets(make_lm: MakeLm) -> None:
    lm = make_lm(mistral(type("Baked", (AnotherWindow,), {"reach": 1100}), window=1100))
    assert_plain(lm, Text(CONTEXT) + REQUEST)
    with pytest.raises(ContextLengthExceeded, match="1,100"):
        lm(lm.text("fox " * 1200))


def test_a_window_as_long_as_the_longest_prompt_is_none() -> None:
    verdict = examine(mistral(window=128, max_position_embeddings=128))
    assert verdict.form is not None
    assert verdict.form.name == "boolean"


def test_a_window_that_only_a_module_knows_is_seen() -> None:
    model = mistral(window=1100, max_position_embeddings=1000)
    model.model.layers[1].self_attn.attention_window = 16
    verdict = examine(model)
    assert verdict.kind == "chains"
    assert verdict.reason == "packs are wrong: its attention window of 16 tokens"


def test_a_second_window_that_nothing_reads_forbids_nothing(make_lm: MakeLm) -> None:
    model = mistral()
    model.model.layers[1].self_attn.attention_window = 40
    assert_plain(make_lm(model), Text(CONTEXT) + REQUEST + CONTEXT)
    assert examine(model).kind == "packs"


@pytest.mark.parametrize("kind", [MistralForCausalLM, TakesNoMasks])
def test_the_check_leaves_no_trace(kind: Any) -> None:
    model = mistral(kind)
    before, configuration = weights_id(model), copy.deepcopy(vars(model.config))
    assert examine(model).kind == ("packs" if kind is MistralForCausalLM else "chains")
    assert weights_id(model) == before
    assert vars(model.config) == configuration


def test_a_check_that_breaks_off_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mistral()
    before = weights_id(model)
    monkeypatch.setattr("backprompt_db.compute.inference.selfcheck.compute_pack", interrupt)
    with pytest.raises(KeyboardInterrupt):
        examine(model)
    assert weights_id(model) == before


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_nobody_sees_the_model_with_another_window() -> None:
    model = mistral(ShowsItsWindow)
    ShowsItsWindow.seen.clear()
    assert examine(model) == Verdict(examine(model).form, examine(model).max_error, None)
    assert {window for owner, window in ShowsItsWindow.seen if owner == id(model)} == {WINDOW}
    assert {window for _, window in ShowsItsWindow.seen} > {WINDOW}


def test_a_causal_mask_inside_the_model_bounds_its_passes(make_lm: MakeLm) -> None:
    options = {"attention_types": [[["global"], 3]], "max_position_embeddings": 64}
    lm = make_lm(Family("", "packs", "gpt_neo", options).build())
    texts = [Text(REQUEST) + f"\nEndpoint: GET /users/{number}" for number in range(20)]
    lm(texts)
    for text in texts:
        assert_plain(lm, text)
    with pytest.raises(ContextLengthExceeded, match="tokens at once, the causal mask inside this model has 64"):
        lm(Text("a") + parallel(*(REQUEST + mark for mark in "?!.,;:+-")) + "b")
