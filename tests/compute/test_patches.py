"""Patches of the code that a model runs: each is another key, or is refused. Nothing stale is ever answered."""

from __future__ import annotations

import itertools
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

import backprompt_db as bp
from backprompt_db.compute.inference.fingerprint import ModelIdentity, weights_id
from backprompt_db.compute.inference.patches import is_patched
from backprompt_db.compute.inference.reach import Reach
from backprompt_db.errors import BackpromptError, UnsupportedModel
from tests.conftest import plain_logprobs, tiny_gpt2
from tests.support import patches
from tests.support.families import FAMILIES, TOLERANCE, Family, by_name, family_cases
from tests.support.patches import PATCHES, Patch, by_a_closure, by_a_function_of_torch, by_a_linear_layer

MODELS = {"gpt2": tiny_gpt2, "llama": by_name("llama").build}


def assert_never_stale(lm: bp.LanguageModel, patch: Callable[[], object]) -> None:
    """After a patch, the same language model and a new one agree with plain passes of the model, or refuse it."""
    before = lm("The quick brown fox")
    lm.db.flush()
    patch()
    for each in (lm, bp.LanguageModel(lm.model, lm.tokenizer, db=lm.db)):
        try:
            after = each("The quick brown fox")
        except BackpromptError:
            continue
        expected, _ = plain_logprobs(lm.model, before.input_ids)
        assert torch.allclose(after.token_logprobs, expected, atol=TOLERANCE, equal_nan=True)


def patch_cases() -> Iterator[Any]:
    """Each patch of a GPT-2, and by default one of a Llama: only that has linear layers."""
    for family, patch in itertools.product(MODELS, PATCHES):
        marks = () if family == "gpt2" or patch is by_a_linear_layer else pytest.mark.exhaustive
        yield pytest.param(family, patch, id=f"{family}-{patch.__name__}", marks=marks)


@pytest.mark.filterwarnings("ignore:.*compile.*")
@pytest.mark.parametrize(("family", "patch"), list(patch_cases()))
def test_after_a_patch_results_are_those_of_the_patched_model_or_an_error(
    family: str, patch: Patch, db: bp.Database, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = bp.LanguageModel(MODELS[family](), tokenizer, db=db)
    assert_never_stale(lm, lambda: patch(lm.model, monkeypatch))


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The patches in a module that has no file."""
    module = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)
    code = compile(Path(patches.__file__).read_text(encoding="utf-8"), "<cell>", "exec")
    exec(code, vars(module))  # noqa: S102 - as a notebook does
    return module


@pytest.mark.parametrize("name", [patch.__name__ for patch in PATCHES])
def test_a_patch_in_a_notebook_changes_the_id_as_one_in_a_file(
    name: str, gpt2: Any, notebook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights_id(gpt2)
    for module in (patches, notebook):
        model = tiny_gpt2()
        with monkeypatch.context() as patcher:
            getattr(module, name)(model, patcher)
            try:
                assert (weights_id(model) == before) is (name == "by_compiling")
            except UnsupportedModel:
                continue
    assert weights_id(gpt2) == before


@pytest.mark.parametrize("family", family_cases(FAMILIES))
def test_no_library_is_taken_for_patched(family: Family) -> None:
    model = family.build()
    reach = Reach({type(module) for module in model.modules()}, attention=model.config._attn_implementation)
    assert [place.path for place in reach.places if is_patched(place)] == []


def test_without_its_patch_a_model_has_its_id_again(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = ModelIdentity(gpt2)
    before = identity.weights_id()
    for patch in (by_a_closure, by_a_function_of_torch):
        with monkeypatch.context() as patcher:
            patch(gpt2, patcher)
            assert identity.weights_id() == weights_id(gpt2) != before
        assert identity.weights_id() == before


HELD: list[Callable[[float], object]] = [
    lambda x: deque([x]), lambda x: [torch.tensor(x)], lambda x: {"a": torch.tensor(x)},
    lambda x: SimpleNamespace(factor=x), lambda x: ({"a": [deque([x])]},), lambda x: torch.tensor([x]).numpy(),
    lambda x: OrderedDict(a=deque([x])),
]  # fmt: skip


@pytest.mark.parametrize("make", HELD)
def test_attributes_of_any_kind_of_container_are_in_the_id_or_refused(
    gpt2: Any, make: Callable[[float], object]
) -> None:
    identity = ModelIdentity(gpt2)
    ids = [identity.weights_id()]
    for value in (1.0, 2.0):
        gpt2.transformer.held = make(value)
        try:
            ids.append(identity.weights_id())
        except UnsupportedModel:
            continue
        assert ids.count(ids[-1]) == 1


def test_an_attribute_that_nothing_describes_is_refused(gpt2: Any) -> None:
    gpt2.transformer.held = iter([1.0])
    with pytest.raises(UnsupportedModel, match=r"transformer\.held was replaced by, or holds, a list_iterator"):
        weights_id(gpt2)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks for it
def test_an_adapter_that_tokens_activate_is_refused_and_others_are_not(gpt2: Any) -> None:
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    assert weights_id(get_peft_model(tiny_gpt2(), LoraConfig(use_dora=True, **options)))
    activated = get_peft_model(gpt2, LoraConfig(alora_invocation_tokens=[5, 6], **options))
    with pytest.raises(UnsupportedModel, match="an adapter that tokens activate"):
        weights_id(activated)
