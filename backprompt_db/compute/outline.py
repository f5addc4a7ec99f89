"""What follows from a model's shape alone, without its weights: the cost of passes, and the sizes of what they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.cache_utils import DynamicCache

from backprompt_db.compute.kvcache import KVShape, shape_of
from backprompt_db.compute.limits import masked_window, max_columns, max_positions
from backprompt_db.compute.orders import Bounds
from backprompt_db.compute.plan import Costs
from backprompt_db.compute.runtime import Runtime, costs_of
from backprompt_db.errors import UnsupportedModel

if TYPE_CHECKING:
    from backprompt_db.catalog import ModelRecord

_CONFIG_ARGUMENTS = ("revision", "cache_dir", "local_files_only", "token", "subfolder", "gguf_file")
_PACKS = "packs"
_MLP_WIDTH = 4
"""What a model whose configuration does not say has, in widths of its hidden states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A model without its weights."""

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


def outline_of(runtime: Runtime, record: ModelRecord | None) -> Outline:
    """Return the outline of a loaded model; `record` is what a self-check has shown of it, if there was one."""
    return _outline(runtime.model, runtime.shape, record)


def outline_of_files(name: str, arguments: dict[str, Any], record: ModelRecord | None) -> Outline:
    """Return the outline of a model in files, of which nothing but the configuration is read.

    Raises whatever transformers does where that does not suffice, and `UnsupportedModel` where there are no plain keys
    and values.
    """
    config = transformers.AutoConfig.from_pretrained(
        name, **{each: arguments[each] for each in _CONFIG_ARGUMENTS if each in arguments}
    )
    dtype = getattr(torch, record.dtype) if record and record.dtype else config.dtype or torch.float32
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        cache = DynamicCache(config=config.get_text_config())
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 2), dtype=torch.int64), past_key_values=cache, use_cache=True)
    shape = shape_of(cache, num_tokens=2)
    if isinstance(shape, str):
        raise UnsupportedModel(shape, hint="Only decoder-only models that fill a transformers Cache can be used.")
    return _outline(model, shape, record)


def _outline(model: Any, shape: KVShape, record: ModelRecord | None) -> Outline:
    is_checked = record is not None and record.checked_with is not None
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    return Outline(
        dtype=str(model.dtype).removeprefix("torch."),
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
