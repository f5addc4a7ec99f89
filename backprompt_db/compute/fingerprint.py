r"""Who a model is: a digest of everything about it that changes the numbers.

    weights_id = SHA256("backprompt-db/weights/1\0" | ascending SHA-256 digests of the facts)

A fact is one of: the class and the numeric attributes of a module, under its name; a configuration field; a parameter's
or buffer's name, dtype, shape and bytes; the compute dtype. What these cannot see is refused: hooks, replaced forward
methods, quantised or otherwise special tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from backprompt_db.errors import ModelMismatch, UnsupportedModel
from backprompt_db.keys import WeightsId

_WEIGHTS = b"backprompt-db/weights/1\0"

_INERT_CONFIG = frozenset({
    "_name_or_path", "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "transformers_version",
    "architectures", "auto_map", "torch_dtype", "dtype", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "cls_token_id",
    "unk_token_id", "is_decoder", "chunk_size_feed_forward", "finetuning_task", "gradient_checkpointing",
})  # fmt: skip
"""Configuration fields that change no number of a forward pass in evaluation mode."""

_ADAPTER_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters")
_INERT_ATTRIBUTES = frozenset({"training", "gradient_checkpointing"})
_NUM_SAMPLES = 32


def weights_id(model: nn.Module) -> WeightsId:
    """Return the id of a model's weights, architecture, configuration, compute dtype and active adapters.

    Hashes every parameter and buffer, in one thread per core. Raises `UnsupportedModel` for what it cannot see.
    """
    _refuse_invisible(model)
    facts = [*_structure(model), _fact("dtype", str(getattr(model, "dtype", None)))]
    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
        facts += pool.map(_tensor_fact, *zip(*_distinct_tensors(model), strict=True))
    return WeightsId(hashlib.sha256(_WEIGHTS + b"".join(sorted(facts))).digest())


class ModelIdentity:
    """The weights id of one model object, computed again only when the object has changed.

    Changes are seen by tensors' version counters and addresses, by module and configuration attributes, and, for writes
    that bypass the counters (`parameter.data`), by a sample of every tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._signature: object = None
        self._id: WeightsId | None = None
        self._samples: list[torch.Tensor] = []
        self._layout: object = None

    def weights_id(self) -> WeightsId:
        """Return the weights id of the model as it is now."""
        signature = self._observe()
        if self._id is None or signature != self._signature:
            self._id, self._signature = weights_id(self._model), signature
        return self._id

    def _observe(self) -> object:
        tensors = [tensor for _, tensor in _tensors(self._model)]
        try:
            layout = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors]
        except RuntimeError as error:
            raise ModelMismatch(
                f"changes of this model's tensors cannot be seen ({error})",
                hint="Load the model outside torch.inference_mode().",
            ) from None
        if layout != self._layout:
            self._samples = [sample for tensor in tensors if (sample := _sample(tensor)) is not None]
            self._layout = layout
        sampled = [hashlib.sha256(_bytes(sample)).digest() for sample in _joined(self._samples)]
        return layout, sampled, list(_structure(self._model))


def _structure(model: nn.Module) -> Iterator[bytes]:
    """Yield the facts about modules and configuration: cheap, so that they are looked at in every call."""
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        yield _fact("module", name, f"{kind.__module__}.{kind.__qualname__}", sorted(_attributes(module)))
    config = getattr(model, "config", None)
    fields = config.to_dict() if config is not None else {}
    yield _fact("config", {name: value for name, value in fields.items() if name not in _INERT_CONFIG})


def _attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        if name in _ADAPTER_STATE:
            yield name, repr(value)
        elif name.startswith("_") or name in _INERT_ATTRIBUTES:
            continue
        elif isinstance(value, bool | int | float) or (isinstance(value, dict) and _is_numeric(value)):
            yield name, repr(value)


def _is_numeric(values: dict[Any, Any]) -> bool:
    return bool(values) and all(isinstance(value, bool | int | float) for value in values.values())


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _distinct_tensors(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """Return each tensor once, with all its names: tied weights are hashed once."""
    names: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in _tensors(model):
        names.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(names.values())


def _tensor_fact(names: list[str], tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256(_bytes(tensor)).hexdigest()
    return _fact("tensor", sorted(names), str(tensor.dtype), list(tensor.shape), digest)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _sample(tensor: torch.Tensor) -> torch.Tensor | None:
    """A few elements spread over a tensor, as a view; None for one that cannot be viewed as a line."""
    if not tensor.numel() or not tensor.is_contiguous():
        return None
    return tensor.detach().view(-1)[:: max(1, tensor.numel() // _NUM_SAMPLES)][: _NUM_SAMPLES + 1]


def _joined(samples: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield one tensor for all samples of the same dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for sample in samples:
        groups.setdefault((sample.dtype, sample.device), []).append(sample)
    yield from (torch.cat(group) for group in groups.values())


def _fact(*values: object) -> bytes:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).digest()


def _refuse_invisible(model: nn.Module) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        raise _invisible("it is quantised", "Load it without quantisation, or dequantise it.")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise _invisible(f"{name or 'the model'} has forward hooks", "Remove them: their effect has no id.")
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            raise _invisible(f"the forward method of {name or 'the model'} was replaced", "Restore it.")
    for name, tensor in _tensors(model):
        if type(tensor) not in (nn.Parameter, nn.Buffer, torch.Tensor) or tensor.is_meta:
            raise _invisible(f"{name} is a {type(tensor).__name__} on {tensor.device}", "Load it as plain tensors.")


def _invisible(reason: str, hint: str) -> UnsupportedModel:
    return UnsupportedModel(f"this model cannot be identified: {reason}", hint=hint)
