"""What follows from a model's shape alone, without its weights: limits, the cost of passes, the sizes of parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.cache_utils import DynamicCache

from backprompt_db.compute.inference.kv_cache import KVShape, cache_argument, shape_of, short_name
from backprompt_db.compute.inference.limits import masked_window, max_columns, max_positions, refusal
from backprompt_db.compute.inference.runner import ModelRunner, costs_of
from backprompt_db.compute.plan import Bounds, Costs
from backprompt_db.errors import UnsupportedModel

if TYPE_CHECKING:
    from backprompt_db.catalog.records import ModelRecord

_DTYPE_ARGUMENTS = ("dtype", "torch_dtype")
_TELLING_ARGUMENTS = {"config", "quantization_config"}
"""What these change in a model shows only when it is loaded."""

_PACKS, _REFUSED = "packs", "refused"
_MLP_WIDTH = 4
"""Width of the MLP, in widths of the hidden states, of a model whose configuration does not say it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes, limits and costs of a model, known without its weights."""

    dtype: str
    costs: Costs
    shape: KVShape
    bounds: Bounds
    takes_packs: bool
    """Whether a pass may hold several segments."""
    num_logits: int
    num_heads: int
    hidden_size: int
    mlp_size: int
    weights_nbytes: int
    is_eager: bool
    """Whether attention weights are written to memory."""


def spec_of(runner: ModelRunner, record: ModelRecord | None) -> ModelSpec:
    """Return the spec of a loaded model; `record` is the result of a self-check, if there was one.

    Raises `UnsupportedModel` for a model that is refused.
    """
    return _spec(runner.model, runner.shape, record)


def spec_of_files(name: str, arguments: dict[str, Any], record: ModelRecord | None) -> ModelSpec:
    """Return the spec of a model in files; only its configuration is read.

    `arguments` are those that load the model; some change its configuration. Raises any error of transformers where the
    configuration is not enough, and `UnsupportedModel` where there are no plain keys and values.
    """
    if _TELLING_ARGUMENTS & set(arguments):
        raise ValueError("its configuration is not that of its files")
    others = {each: value for each, value in arguments.items() if each not in _DTYPE_ARGUMENTS}
    config, _ = transformers.AutoConfig.from_pretrained(name, return_unused_kwargs=True, **others)
    dtype = _dtype(record.dtype if record and record.dtype else arguments, config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        cache = DynamicCache(config=config.get_text_config())
        with torch.no_grad():
            ids = torch.zeros((1, 2), dtype=torch.int64)
            model(input_ids=ids, **cache_argument(model, cache), use_cache=True)
    shape = shape_of(cache, num_tokens=2)
    if isinstance(shape, str):
        raise UnsupportedModel(shape, hint="Only decoder-only models that fill a transformers Cache can be used.")
    return _spec(model, shape, record)


def _dtype(given: str | dict[str, Any], config: Any) -> torch.dtype:
    """Return the dtype that a name, or the arguments that load a model, give; else the one of its files."""
    dtype = (
        given if isinstance(given, str) else next((given[key] for key in _DTYPE_ARGUMENTS if given.get(key)), "auto")
    )
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def _require_supported(model: Any, record: ModelRecord | None) -> None:
    is_refused = record is not None and record.verdict == _REFUSED
    reason = record.reason if record and is_refused else refusal(model)
    if reason is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be cached and stay right: {reason}",
            hint="Run it with transformers directly.",
        )


def _spec(model: Any, shape: KVShape, record: ModelRecord | None) -> ModelSpec:
    is_checked = record is not None and record.checked_with is not None
    _require_supported(model, record)
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    return ModelSpec(
        dtype=short_name(model.dtype),
        costs=costs_of(model, num_layers=shape.num_layers),
        shape=shape,
        bounds=Bounds(
            record.max_positions if record and is_checked else max_positions(model, masked=masked_window(model)),
            max_columns(model),
        ),
        takes_packs=record.verdict == _PACKS if record and is_checked else True,
        num_logits=config.vocab_size if head is None else len(head.weight),
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        mlp_size=getattr(config, "intermediate_size", None) or _MLP_WIDTH * config.hidden_size,
        weights_nbytes=sum(parameter.nbytes for parameter in model.parameters()),
        is_eager=getattr(config, "_attn_implementation", None) == "eager",
    )
