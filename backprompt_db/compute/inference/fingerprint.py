r"""The identity of a model: a digest of everything about it that changes the numbers.

    weights_id = SHA256("backprompt-db/weights/1\0" | ascending SHA-256 digests of the facts)

A fact is one of: the class, the forward method's origin and the plain attributes of a module, under its name; the
configuration; a parameter's, buffer's or other tensor's name, dtype, shape and bytes; the compute dtype; a patch of the
code that the model runs, which is what differs from the files of its libraries. Models with anything that these facts
cannot describe are refused: hooks, replaced forward methods, quantised or otherwise special tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _global_hooks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from backprompt_db.compute.inference.descriptions import Indescribable, describe
from backprompt_db.compute.inference.patches import is_original, is_patched
from backprompt_db.compute.inference.reach import Place, Reach, functions_of
from backprompt_db.errors import ModelMismatch, UnsupportedModel
from backprompt_db.prompt.ids import WeightsId

_WEIGHTS = b"backprompt-db/weights/1\0"
_SKETCH = b"backprompt-db/weights sketch/1\0"

_INERT_CONFIG = frozenset({
    "_name_or_path", "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "transformers_version",
    "architectures", "auto_map", "torch_dtype", "dtype", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "cls_token_id",
    "unk_token_id", "chunk_size_feed_forward", "finetuning_task", "gradient_checkpointing",
})  # fmt: skip
"""Configuration fields that change no number of a forward pass in evaluation mode."""

_ADAPTER_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters")
_INERT_ATTRIBUTES = frozenset({
    "training", "gradient_checkpointing", "name_or_path", "loss_type", "warnings_issued", "hf_device_map",
    "model_parallel", "is_parallelizable", "config", "generation_config",
})  # fmt: skip
"""Attributes of modules that change no number of a forward pass; trainers set some of them."""

_HARMLESS_HOOKS = frozenset({"transformers.utils.output_capturing", "backprompt_db.compute.inference.head"})
"""Modules whose hooks change nothing: transformers keeps some after hidden states were asked for, and another thread's
pass may be running."""

_VERSIONED = frozenset(
    {"torch", "transformers", "transformers_modules", "peft", "accelerate", "builtins", "typing", "abc"}
)
"""Packages whose classes are identified by name alone: code that changes there has another version or module name."""

_SIMPLE = frozenset({type(None), bool, int, float, str, torch.dtype})
_UNPATCHED = {*vars(nn.Module()), *_INERT_ATTRIBUTES}
"""Attributes that every module has, and those that change no number."""

_NUM_SAMPLES = 32
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


_Modules = list[tuple[str, nn.Module]]
_Tensors = list[tuple[str, torch.Tensor]]
_Signature = tuple[object, bytes, list[tuple[object, ...]]]
"""Where the tensors are and how often they were written, samples of them, and the facts beside them."""


def weights_id(model: nn.Module) -> WeightsId:
    """Return the id of a model's weights, architecture, configuration, compute dtype and active adapters.

    Hashes every parameter and buffer, in one thread per core. Raises `UnsupportedModel` for a model with changes that
    the digest cannot describe.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    tensors = list(_tensors(modules))
    _refuse_invisible(model, modules, tensors)
    facts = [_fact(*described) for described in _structure(model, modules)]
    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
        facts += pool.map(_tensor_fact, *zip(*_distinct(tensors), strict=True))
    return WeightsId(hashlib.sha256(_WEIGHTS + b"".join(sorted(facts))).digest())


class ModelIdentity:
    """The weights id of one model object, computed again only when the object has changed.

    Changes are detected by tensors' version counters and addresses, by module and configuration attributes, and, for
    writes that bypass the counters (`parameter.data`), by a sample of every tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._signature: object = None
        self._id: WeightsId | None = None
        self._samples = _Samples([])
        self._layout: object = None

    def weights_id(self) -> WeightsId:
        """Return the weights id of the model as it is now."""
        signature = self._observe()
        if self._id is None or signature != self._signature:
            self._id, self._signature = weights_id(self._model), signature
        return self._id

    def sketch(self) -> bytes:
        """Return a digest of what the weights id covers, with samples in place of all bytes of the tensors."""
        return self._sketch(self._observe())

    def recognise(self, known: WeightsId, *, sketch: bytes) -> bool:
        """Take over an id without reading the tensors, if the model has the sketch that belongs to it."""
        signature = self._observe()
        if self._sketch(signature) != sketch:
            return False
        self._id, self._signature = known, signature
        return True

    def _sketch(self, signature: _Signature) -> bytes:
        _, samples, structure = signature
        tensors = _tensors(list(self._model.named_modules()))
        facts = [_fact(*described) for described in structure]
        facts += [_fact("tensor", name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors]
        return hashlib.sha256(_SKETCH + _WEIGHTS + b"".join(sorted(facts)) + samples).digest()

    def _observe(self) -> _Signature:
        modules = list(self._model.named_modules())
        named = list(_tensors(modules))
        _refuse_invisible(self._model, modules, named)
        tensors = [tensor for _, tensor in named]
        try:
            layout = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors]
        except RuntimeError as error:
            raise ModelMismatch(
                f"changes of this model's tensors cannot be seen ({error})",
                hint="Load the model outside torch.inference_mode().",
            ) from None
        if layout != self._layout:
            self._samples, self._layout = _Samples(tensors), layout
        return layout, self._samples.bytes(), list(_structure(self._model, modules))


class _Samples:
    """Views of a few elements of every tensor, spread over it: reading them again shows changes."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        views = [view for tensor in tensors if (view := _sample(tensor)) is not None]
        # Concatenating hundreds of small tensors costs more than reading them one by one, unless they are on a device.
        self._arrays = [view.numpy() for view in views if view.device.type == "cpu"]
        self._elsewhere: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for view in views:
            if view.device.type != "cpu":
                self._elsewhere.setdefault((view.dtype, view.device), []).append(view)

    def bytes(self) -> bytes:
        """Return the sampled elements as they are now."""
        joined = [torch.cat(group).cpu().numpy() for group in self._elsewhere.values()]
        return b"".join([array.tobytes() for array in (*self._arrays, *joined)])


def _structure(model: nn.Module, modules: _Modules) -> Iterator[tuple[object, ...]]:
    """Yield the facts of modules and configuration as plain values. They are cheap, so every call reads them."""
    for name, module in modules:
        kind: Any = type(module)
        yield "module", name, _origin(kind), _origin(kind.forward), *_attributes(module)
        yield from _patches_of_attributes(name, module)
    yield from _patches_of_code(model, frozenset(type(module) for _, module in modules))
    config = getattr(model, "config", None)
    yield "config", repr(_effective(config.to_dict()) if config is not None else {})
    yield "dtype", str(getattr(model, "dtype", None))


def _patches_of_code(model: nn.Module, kinds: frozenset[type]) -> Iterator[tuple[object, ...]]:
    """Yield what the code that these classes reach finds elsewhere than in the files of its libraries."""
    for place in _code_of(kinds, str(_attention(model))).patches:
        yield "patch", f"{place.module}.{place.path}", _patch(place.value, f"{place.module}.{place.path}")


def _patches_of_attributes(name: str, module: nn.Module) -> Iterator[tuple[object, ...]]:
    """Yield the attributes of a module that `_attributes` names but does not describe."""
    for attribute in vars(module).keys() - _UNPATCHED:
        value = vars(module)[attribute]
        if type(value) in _SIMPLE or isinstance(value, torch.Tensor):  # a fact of its own
            continue
        functions = [*functions_of(value)]
        is_held = not all(map(is_original, functions)) if functions else _is_opaque(value)
        if is_held and (attribute[0] != "_" or functions):
            yield "patch", f"{name}.{attribute}", _patch(value, f"{name}.{attribute}")


def _is_opaque(value: Any) -> bool:
    """Whether a value, or something in it, has no description as a plain value."""
    if isinstance(value, dict | list | tuple):
        return any(map(_is_opaque, value.values() if isinstance(value, dict) else value))
    return _described(value) is None and type(value).__module__.split(".")[0] != "peft"


def _patch(value: Any, label: str) -> object:
    try:
        return describe(value)
    except Indescribable as kind:
        reason = f"{label} was replaced by, or holds, a {kind}"
        raise _invisible(reason, "Take it away: its effect has no id.") from None


class _Code:
    """What the code of a model's classes reaches, found again when any of it has changed."""

    def __init__(self, kinds: frozenset[type], attention: str) -> None:
        self._kinds, self._attention = kinds, attention
        self._found: tuple[Reach, list[Place]] | None = None

    @property
    def patches(self) -> list[Place]:
        """The places that hold something else than the files of their modules put there."""
        found = self._found
        if found is None or not found[0].is_current:
            _origin.cache_clear()
            reach = Reach(self._kinds, attention=self._attention)
            found = self._found = reach, [place for place in reach.places if is_patched(place)]
        return found[1]


_code_of = lru_cache(maxsize=16)(_Code)


def _attention(model: nn.Module) -> object:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _effective(fields: dict[Any, Any]) -> list[tuple[str, Any]]:
    """Return the configuration fields that change numbers, sorted, including those of nested configurations."""
    return [
        (str(name), _effective(value) if isinstance(value, dict) else value)
        for name, value in sorted(fields.items(), key=lambda item: str(item[0]))
        if name not in _INERT_CONFIG
    ]


def _attributes(module: nn.Module) -> list[tuple[str, str]]:
    """Return a module's plain attributes: numbers, strings, functions, and lists and dicts of these."""
    return [
        (name, described)
        for name, value in sorted(vars(module).items())
        if (name[0] != "_" or name in _ADAPTER_STATE)
        and name not in _INERT_ATTRIBUTES
        and (described := _described(value)) is not None
    ]


def _described(value: Any) -> str | None:
    """Return a plain value as a string that is the same in every process, None for anything else."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value)
    if isinstance(value, list | tuple | set | frozenset):
        parts = [_described(part) for part in value]
        return None if None in parts else repr(sorted(map(str, parts)) if isinstance(value, set | frozenset) else parts)
    if isinstance(value, dict):
        return repr(sorted((str(name), str(_described(part))) for name, part in value.items()))
    if isinstance(value, partial):
        return repr((_origin(value.func), _described(value.args), _described(value.keywords)))
    return None if isinstance(value, nn.Module) or not hasattr(value, "__qualname__") else _origin(value)


@lru_cache(maxsize=4096)
def _origin(definition: Any) -> str:
    """Return the full name of a class or function, with a digest of its code unless its package has versions."""
    classes = definition.__mro__ if isinstance(definition, type) else (definition,)
    own = [each for each in classes if str(each.__module__).split(".")[0] not in _VERSIONED]
    codes = [code for each in own for part in _functions(each) for code in _code(part)]
    digest = hashlib.sha256(repr(codes).encode()).hexdigest() if codes else ""
    return f"{definition.__module__}.{definition.__qualname__} {digest}"


def _functions(definition: Any) -> list[Any]:
    return [value for _, value in sorted(vars(definition).items())] if isinstance(definition, type) else [definition]


def _code(function: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the bytecode, names and constants of a function and of the functions inside it."""
    codes = [getattr(getattr(function, "fget", None) or getattr(function, "__func__", function), "__code__", None)]
    while codes:
        code = codes.pop()
        if isinstance(code, CodeType):
            inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
            codes += inner
            yield code.co_code, code.co_names, [repr(each) for each in code.co_consts if each not in inner]


def _tensors(modules: _Modules) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor that a module holds, registered or not, under its name."""
    for prefix, module in modules:
        held = [*module._parameters.items(), *module._buffers.items()]
        held += [
            (name, value) for name, value in vars(module).items() if name[0] != "_" and isinstance(value, torch.Tensor)
        ]
        for name, tensor in held:
            if tensor is not None:
                yield f"{prefix}.{name}", tensor


def _distinct(tensors: _Tensors) -> list[tuple[list[str], torch.Tensor]]:
    """Return each tensor once, with all its names: tied weights are hashed once."""
    names: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in tensors:
        names.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(names.values())


def _tensor_fact(names: list[str], tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256(_bytes(tensor)).hexdigest()
    return _fact("tensor", sorted(names), str(tensor.dtype), list(tensor.shape), digest)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _sample(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a view of the bits of a few elements of a tensor; None for one that cannot be viewed as one dimension."""
    if not tensor.numel() or not tensor.is_contiguous():
        return None
    line = tensor.detach().view(-1)[:: max(1, tensor.numel() // _NUM_SAMPLES)][: _NUM_SAMPLES + 1]
    return line.view(_BITS[tensor.element_size()])


def _fact(*values: object) -> bytes:
    return hashlib.sha256(json.dumps(values).encode()).digest()


def _refuse_invisible(model: nn.Module, modules: _Modules, tensors: _Tensors) -> None:
    if _global_hooks._global_forward_hooks or _global_hooks._global_forward_pre_hooks:
        raise _invisible("there are global forward hooks", "Remove them: their effect has no id.")
    attention = str(_attention(model))
    registered = ALL_ATTENTION_FUNCTIONS.get(attention)
    if registered is not None and not _is_of_transformers(registered):
        raise _invisible(f"its attention is {attention!r}, a registered function", "Use one of transformers' own.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise _invisible("it is quantised", "Load it without quantisation, or dequantise it.")
    for name, module in modules:
        _refuse_invisible_module(name or "the model", module)
    for name, tensor in tensors:
        if type(tensor) not in (nn.Parameter, nn.Buffer, torch.Tensor) or tensor.is_meta:
            raise _invisible(f"{name} is a {type(tensor).__name__} on {tensor.device}", "Load it as plain tensors.")


def _refuse_invisible_module(name: str, module: nn.Module) -> None:
    if "_orig_mod" in module._modules:
        raise _invisible(f"{name} was compiled", "Give its _orig_mod, which has the same weights.")
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(getattr(hook, "__module__", None) not in _HARMLESS_HOOKS for hook in hooks):
        raise _invisible(f"{name} has forward hooks", "Remove them: their effect has no id.")
    if any("ALora" in type(each).__name__ for each in vars(module).get("lora_variant", {}).values()):
        raise _invisible(f"{name} has an adapter that tokens activate", "Disable it: its pieces depend on others.")
    if "forward" in vars(module) and not _is_hooked_by_accelerate(module):
        raise _invisible(f"the forward method of {name} was replaced", "Restore it.")


def _is_hooked_by_accelerate(module: nn.Module) -> bool:
    """Whether a module's `forward` only moves tensors between devices, around the one of its class."""
    held: Any = vars(module)
    kind: Any = type(module)
    hook = held.get("_hf_hook")
    is_theirs = all(type(each).__module__ == "accelerate.hooks" for each in getattr(hook, "hooks", [hook]))
    return is_theirs and getattr(held.get("_old_forward"), "__func__", None) is kind.forward


def _is_of_transformers(function: Any) -> bool:
    functions = [*functions_of(function)]
    modules = [str(each.__globals__.get("__name__")) for each in functions]
    is_theirs = all(module.startswith("transformers.") for module in modules)
    return bool(functions) and is_theirs and all(map(is_original, functions))


def _invisible(reason: str, hint: str) -> UnsupportedModel:
    return UnsupportedModel(f"this model cannot be identified: {reason}", hint=hint)
