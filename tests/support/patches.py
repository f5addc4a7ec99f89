"""Ways to patch the code that a model runs. `patcher` undoes what is not the model's own."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Patcher = pytest.MonkeyPatch
Patch = Callable[[Any, Patcher], object]
SCALE = 1.5
TABLE = {"scale": 1.5}


def mlp(model: Any) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith(".mlp"))


def attention(model: Any) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith((".attn", ".self_attn")))


def file_of(model: Any) -> Any:
    return sys.modules[type(model).__module__]


def replace_forward(model: Any, patcher: Patcher, make: Callable[[Any], Any]) -> None:
    """Replace `forward` at the class of the feed-forward layers by what `make` makes of it."""
    kind = type(mlp(model))
    patcher.setattr(kind, "forward", make(kind.forward))


def scaled(original: Any, factor: float) -> Any:
    def forward(self: Any, hidden: Any) -> Any:
        return original(self, hidden) * factor

    return forward


def by_a_closure(model: Any, patcher: Patcher) -> None:
    replace_forward(model, patcher, lambda original: scaled(original, 1.5))


def by_a_function_that_hides(model: Any, patcher: Patcher) -> None:
    replace_forward(model, patcher, lambda original: functools.wraps(original)(scaled(original, 1.5)))


def by_a_default(model: Any, patcher: Patcher) -> None:
    def make(original: Any) -> Any:
        return lambda self, hidden, factor=1.5, original=original: original(self, hidden) * factor

    replace_forward(model, patcher, make)


def by_a_keyword_default(model: Any, patcher: Patcher) -> None:
    def make(original: Any) -> Any:
        return lambda self, hidden, *, factor=1.5, original=original: original(self, hidden) * factor

    replace_forward(model, patcher, make)


def by_a_function_with_attributes(model: Any, patcher: Patcher) -> None:
    def make(original: Any) -> Any:
        def forward(self: Any, hidden: Any) -> Any:
            return original(self, hidden) * forward.factor  # type: ignore[attr-defined]

        forward.factor = 1.5  # type: ignore[attr-defined]
        return forward

    replace_forward(model, patcher, make)


def by_a_global(model: Any, patcher: Patcher) -> None:
    def make(original: Any) -> Any:
        return lambda self, hidden: original(self, hidden) * SCALE * TABLE["scale"]

    replace_forward(model, patcher, make)


class Scaled:
    """A callable object in place of a method."""

    def __init__(self, original: Any, factor: Any) -> None:
        self.original, self.factor = original, factor

    def __get__(self, instance: Any, owner: type) -> Any:
        return lambda hidden: self.original(instance, hidden) * self.factor


def by_an_object(model: Any, patcher: Patcher) -> None:
    replace_forward(model, patcher, lambda original: Scaled(original, 1.5))


def by_an_object_with_a_tensor(model: Any, patcher: Patcher) -> None:
    replace_forward(model, patcher, lambda original: Scaled(original, torch.tensor(1.5)))


def by_other_code(model: Any, patcher: Patcher) -> None:
    forward = type(mlp(model)).forward
    patcher.setattr(forward, "__code__", (lambda self, hidden: hidden * 1.5).__code__)


def by_a_default_in_place(model: Any, patcher: Patcher) -> None:
    softmax = torch.nn.functional.softmax
    model.set_attn_implementation("eager")
    patcher.setattr(softmax, "__defaults__", (3, torch.bfloat16))
    norm = torch.nn.functional.layer_norm
    patcher.setattr(norm, "__defaults__", (None, None, 0.5))


def by_a_function_of_torch(model: Any, patcher: Patcher) -> None:
    original = torch.nn.functional.scaled_dot_product_attention
    patcher.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **more: original(*args, **more) * 1.5
    )


def by_an_object_of_torch(model: Any, patcher: Patcher) -> None:
    original = torch.nn.functional.scaled_dot_product_attention

    class Attention:
        def __call__(self, *args: Any, **more: Any) -> Any:
            return original(*args, **more) * 1.5

    patcher.setattr(torch.nn.functional, "scaled_dot_product_attention", Attention())


def by_a_function_of_the_file(model: Any, patcher: Patcher) -> None:
    name = "apply_rotary_pos_emb" if hasattr(file_of(model), "apply_rotary_pos_emb") else "eager_attention_forward"
    original = getattr(file_of(model), name)
    model.set_attn_implementation("eager")
    patcher.setattr(file_of(model), name, lambda *args, **more: tuple(each * 1.5 for each in original(*args, **more)))


def by_eager_attention(model: Any, patcher: Patcher) -> None:
    original = file_of(model).eager_attention_forward
    model.set_attn_implementation("eager")

    def attend(*args: Any, **more: Any) -> Any:
        output, weights = original(*args, **more)
        return output * 1.5, weights

    patcher.setattr(file_of(model), "eager_attention_forward", functools.wraps(original)(attend))


def by_a_mask_of_the_file(model: Any, patcher: Patcher) -> None:
    patcher.setattr(file_of(model), "create_causal_mask", lambda *args, **more: None)


def by_a_function_in_the_table(model: Any, patcher: Patcher) -> None:
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(*args: Any, **more: Any) -> Any:
        output, weights = original(*args, **more)
        return output * 1.5, weights

    patcher.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", functools.wraps(original)(attend))


def by_the_code_in_the_table(model: Any, patcher: Patcher) -> None:
    def attend(*args: Any, **more: Any) -> Any:
        return args[1].transpose(1, 2).contiguous(), None

    patcher.setattr(ALL_ATTENTION_FUNCTIONS["sdpa"], "__code__", attend.__code__)


def by_a_method_of_tensors(model: Any, patcher: Patcher) -> None:
    original = torch.Tensor.reshape
    patcher.setattr(torch.Tensor, "reshape", lambda self, *shape: original(self, *shape) * 1.01)


def by_a_method_of_the_cache(model: Any, patcher: Patcher) -> None:
    original = DynamicLayer.update
    patcher.setattr(DynamicLayer, "update", lambda *args, **more: tuple(t * 1.1 for t in original(*args, **more)))


def by_a_linear_layer(model: Any, patcher: Patcher) -> None:
    original = nn.Linear.forward
    patcher.setattr(nn.Linear, "forward", lambda self, hidden: original(self, hidden) * 1.5)


def by_an_attribute_of_a_class(model: Any, patcher: Patcher) -> None:
    for module in model.modules():
        if type(module) is type(attention(model)):
            del module.scaling
    patcher.setattr(type(attention(model)), "scaling", 0.5, raising=False)


def by_a_method_of_an_instance(model: Any, patcher: Patcher) -> None:
    act = "act" if hasattr(mlp(model), "act") else "act_fn"
    delattr(mlp(model), act)
    setattr(mlp(model), act, scaled(lambda self, hidden: hidden, 1.5).__get__(mlp(model)))


def by_a_hook(model: Any, patcher: Patcher) -> None:
    mlp(model).register_forward_hook(lambda module, args, output: output * 1.5)


def by_a_parametrization(model: Any, patcher: Patcher) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2.0

    linear = next(m for m in mlp(model).modules() if isinstance(getattr(m, "weight", None), nn.Parameter))
    parametrize.register_parametrization(linear, "weight", Doubled())


def by_compiling(model: Any, patcher: Patcher) -> None:
    mlp(model).compile(backend="eager")


PATCHES: list[Patch] = [
    by_a_closure, by_a_function_that_hides, by_a_default, by_a_keyword_default, by_a_function_with_attributes,
    by_a_global, by_an_object, by_an_object_with_a_tensor, by_other_code, by_a_default_in_place, by_a_function_of_torch,
    by_an_object_of_torch, by_a_function_of_the_file, by_eager_attention, by_a_mask_of_the_file,
    by_a_function_in_the_table, by_the_code_in_the_table, by_a_method_of_tensors, by_a_method_of_the_cache,
    by_a_linear_layer, by_an_attribute_of_a_class, by_a_method_of_an_instance, by_a_hook, by_a_parametrization,
    by_compiling,
]  # fmt: skip
