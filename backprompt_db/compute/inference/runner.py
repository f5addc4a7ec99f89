"""A loaded model that computes packs: its identity, the verdict of its self-check, and its limits. Imports torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
import transformers

from backprompt_db.catalog.records import ModelRecord
from backprompt_db.compute.inference.canary import Canary
from backprompt_db.compute.inference.fingerprint import ModelIdentity
from backprompt_db.compute.inference.forward import PassResult, compute_pack
from backprompt_db.compute.inference.head import head_of
from backprompt_db.compute.inference.kv_cache import KVBuffer, KVShape, acquire_prefix, release_prefix, short_name
from backprompt_db.compute.inference.limits import embedding_of, max_columns, max_positions
from backprompt_db.compute.inference.masks import MaskForm, MaskKind
from backprompt_db.compute.inference.selfcheck import (
    CHECK_VERSION,
    Verdict,
    canary_numbers,
    examine,
    probe_shape,
    proven_head,
    recorded,
)
from backprompt_db.compute.plan import Costs, Pack
from backprompt_db.database.memory_cache import MemoryCache
from backprompt_db.errors import ContextLengthExceeded, UnsupportedModel
from backprompt_db.prompt.ids import Address, WeightsId
from backprompt_db.prompt.representation import Array, Arrays, Part, dtype_name
from backprompt_db.prompt.segments import Segment


class ModelRunner:
    """A causal language model that computes packs, and what is known about it."""

    def __init__(self, model: Any, *, name: str) -> None:
        self.model = model
        self.name = name
        self.num_calls = 0
        self._identity = ModelIdentity(model)
        self._probed: WeightsId | None = None
        self._proven: tuple[WeightsId, str] | None = None
        self._max_positions: int | None = None
        self._verdict = Verdict(None, None, "it was never checked")

    @classmethod
    def load(cls, name_or_path: str, arguments: dict[str, Any]) -> ModelRunner:
        """Load a pretrained causal language model with transformers, in evaluation mode."""
        model = transformers.AutoModelForCausalLM.from_pretrained(name_or_path, **arguments)
        return cls(model.eval(), name=name_or_path)

    @property
    def weights_id(self) -> WeightsId:
        """The weights id of the model as it is now; hashed again only when the model has changed."""
        weights_id = self._identity.weights_id()
        if weights_id != self._probed:  # what running it has shown, such as its dtype, may have changed too
            for name in ("shape", "kv_dtype", "costs", "_proven_head"):
                vars(self).pop(name, None)
            self._probed = weights_id
        return weights_id

    def recognise(self, weights_id: WeightsId, *, sketch: bytes) -> bool:
        """Take over the weights id of files that have not changed, if the model has the sketch of what they were."""
        return self._identity.recognise(weights_id, sketch=sketch)

    def sketch(self) -> bytes:
        """Return the sketch by which `recognise` knows the model."""
        return self._identity.sketch()

    @cached_property
    def shape(self) -> KVShape:
        """The shape of the model's keys and values. Raises `UnsupportedModel` where it has none."""
        return probe_shape(self.model)

    @property
    def head(self) -> torch.nn.Module | None:
        """The module that alone makes logits of hidden states; None where more than one module does."""
        if self._proven_head[0] is not self.model.get_output_embeddings():  # replaced by one with equal weights
            vars(self).pop("_proven_head")
        return self._proven_head[1]

    @cached_property
    def _proven_head(self) -> tuple[Any, torch.nn.Module | None]:
        return self.model.get_output_embeddings(), proven_head(self.model)

    @property
    def dtype(self) -> str:
        """What torch calls the dtype of the model, such as `float32`."""
        return short_name(self.model.dtype)

    @cached_property
    def kv_dtype(self) -> str:
        """The safetensors name of the dtype of keys and values."""
        return dtype_name(self.shape.dtype)

    @cached_property
    def costs(self) -> Costs:
        """What passes of this model cost."""
        return costs_of(self.model, num_layers=self.shape.num_layers)

    def acquire_prefix(self, memory: MemoryCache, contents: Sequence[tuple[Address, int]], *, room: int) -> KVBuffer:
        """Return a buffer that begins with as much of `contents` as any in memory; see `kv_cache.acquire_prefix`."""
        memory = memory if self.device.type == "cpu" else self._device_memory
        return acquire_prefix(memory, self.shape, contents, room=room, longest=self.max_positions, device=self.device)

    def release_prefix(self, memory: MemoryCache, context: KVBuffer) -> None:
        """Put a buffer into the memory cache, for passes that begin like it."""
        release_prefix(memory if context.device.type == "cpu" else self._device_memory, context)

    @cached_property
    def _device_memory(self) -> MemoryCache:
        """The buffers on a device with memory of its own; those of the processor are in the database's memory cache."""
        is_cuda = self.device.type == "cuda"
        free_nbytes = torch.cuda.mem_get_info(self.device)[0] if is_cuda else 0
        return MemoryCache(free_nbytes // 8)

    def fits(self, arrays: Arrays) -> bool:
        """Whether stored keys and values have the shape and dtype of this model's."""
        return KVShape.of(arrays) == self.shape

    @property
    def max_positions(self) -> int | None:
        """How many positions a prompt may have, None where there is no limit. Known once the model is proven."""
        return self._max_positions

    @property
    def window(self) -> int | None:
        """The window, in positions, that packs are masked with; None without one, or if the model takes no packs."""
        return self._verdict.form.window if self._verdict.form else None

    @property
    def max_columns(self) -> int | None:
        """How many tokens a pass may have with its context; None where there is no limit."""
        return max_columns(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is, and where its inputs go."""
        device: torch.device = self.model.device
        return device

    @property
    def vocab_size(self) -> int:
        """How many token ids the model can read."""
        return int(embedding_of(self.model).num_embeddings)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions that may change the last bits of a number."""
        return {"torch": version("torch"), "transformers": version("transformers"), "python": platform.python_version()}

    def is_proven(self, weights_id: WeightsId) -> bool:
        """Whether `settle` was called for the model as it is, and nothing that matters has changed since."""
        return self._proven == (weights_id, self._checked_with)

    def accepts(self, known: ModelRecord | None) -> bool:
        """Whether a record settles how this model is computed: it was checked with what is at hand now."""
        return (
            known is not None and known.checked_with == self._checked_with and recorded(self.model, known) is not None
        )

    def prove(self, weights_id: WeightsId, known: ModelRecord | None) -> ModelRecord | None:
        """Settle how the model may be computed: by the record `known`, if that still holds, else by a self-check.

        Returns the record to save if a self-check was made, else None.
        """
        verdict = recorded(self.model, known) if known is not None and self.accepts(known) else None
        self._verdict = verdict or self._examine(weights_id)
        form = self._verdict.form
        self._max_positions = max_positions(self.model, masked=form.window) if form else None
        return None if verdict else self._record(weights_id, self._verdict)

    def settle(self, weights_id: WeightsId) -> None:
        """Let passes begin: the model was proven, and compared with its canary."""
        self._proven = weights_id, self._checked_with

    @property
    def is_refused(self) -> bool:
        """Whether `prove` has found that nothing of this model can be stored."""
        return self._verdict.form is None

    def trust(self, canary: Canary) -> None:
        """Take over what was shown with a canary of this model, so that no pass need show it again."""
        self.shape = KVShape(*canary.kv_size, dtype=getattr(torch, canary.kv_dtype))
        self._proven_head = self.model.get_output_embeddings(), head_of(self.model) if canary.has_head else None

    def canary(self, weights_id: WeightsId) -> Canary:
        """Return the canary of a model that is not refused, as it is computed here and now."""
        shape, form = self.shape, self.require_supported()
        return Canary(
            weights_id=weights_id,
            conditions=self.conditions,
            kv_size=(shape.num_layers, shape.num_kv_heads, shape.key_dim, shape.value_dim),
            kv_dtype=short_name(shape.dtype),
            has_head=self.head is not None,
            numbers=canary_numbers(self.model, shape, form=form, head=self.head, longest=self.max_positions),
        )

    @property
    def conditions(self) -> str:
        """What may change the numbers of a pass a little, and legitimately, besides the number of threads."""
        is_cuda = self.device.type == "cuda"
        processor = torch.cuda.get_device_name(self.device) if is_cuda else torch.backends.cpu.get_cpu_capability()
        return f"{self._checked_with}, {self.device.type} {processor}"

    def require_supported(self) -> MaskForm:
        """Return the mask form to compute with. Raises `UnsupportedModel`, with the reason, for a refused model."""
        if self._verdict.form is None:
            raise UnsupportedModel(
                f"{type(self.model).__name__} cannot be cached and stay right: {self._verdict.reason}",
                hint="Run it with transformers directly; nothing of it was stored.",
            )
        return self._verdict.form

    def require_runnable(
        self, packs: Sequence[Pack], num_read: Mapping[Segment, int], starts: Mapping[Segment, int]
    ) -> None:
        """Raise `UnsupportedModel` for packs that this model cannot run: if it takes only chains, branches and gaps."""
        limit = self.max_columns
        for pack in packs:
            _require_room(pack, num_read, limit)
            if not self.takes_packs:
                _require_plain_chain(pack, num_read, starts, reason=self._verdict.reason)

    @property
    def takes_packs(self) -> bool:
        """Whether a pass may hold several segments."""
        return self._verdict.form is None or self._verdict.form.kind is not MaskKind.CAUSAL

    def compute(
        self,
        pack: Pack,
        *,
        input_ids: Mapping[Segment, Sequence[int]],
        starts: Mapping[Segment, int],
        context: KVBuffer,
        predictions: Mapping[Segment, Array],
        produce: Mapping[Segment, frozenset[Part]],
        followers: Mapping[Segment, Sequence[int]],
    ) -> PassResult:
        """Run the model at most once; see `compute_pack`. Raises `UnsupportedModel` for a refused model."""
        computed = compute_pack(
            self.model, pack, form=self.require_supported(), head=self.head, input_ids=input_ids, starts=starts,
            context=context, predictions=predictions, produce=produce, followers=followers,
        )  # fmt: skip
        self.num_calls += computed.num_tokens > 0
        return computed

    def _examine(self, weights_id: WeightsId) -> Verdict:
        verdict = examine(self.model)
        if verdict.form and self.weights_id != weights_id:
            return Verdict(None, None, "running it changes its weights, its buffers or its attributes")
        return verdict

    def _record(self, weights_id: WeightsId, verdict: Verdict) -> ModelRecord:
        shape = self.shape if verdict.form else None
        return ModelRecord(
            weights_id=weights_id,
            name=self.name,
            architecture=type(self.model).__name__,
            dtype=self.dtype,
            num_layers=shape.num_layers if shape else 0,
            num_kv_heads=shape.num_kv_heads if shape else 0,
            head_dim=shape.key_dim if shape else 0,
            vocab_size=self.vocab_size,
            max_positions=self.max_positions,
            verdict=verdict.kind,
            mask_form=verdict.form.name if verdict.form else None,
            max_error=verdict.max_error,
            reason=verdict.reason,
            checked_with=self._checked_with,
        )

    @property
    def _checked_with(self) -> str:
        config = self.model.config
        attention = {str(getattr(each, "_attn_implementation", None)) for each in (config, config.get_text_config())}
        kinds = "/".join(sorted(attention))
        libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
        return f"check {CHECK_VERSION}, {libraries}, {kinds} attention"


def _require_room(pack: Pack, num_read: Mapping[Segment, int], limit: int | None) -> None:
    """Raise `ContextLengthExceeded` for a pack that has, with its context, more tokens than fit into one pass."""
    num_columns = sum(num_read[segment] for segment in (*pack.context, *pack.segments))
    if limit is not None and num_columns > limit:
        raise ContextLengthExceeded(
            f"a pass needs {num_columns:,} tokens at once, the causal mask inside this model has {limit:,}",
            hint="Use fewer or shorter parallel branches with it.",
        )


def costs_of(model: Any, *, num_layers: int) -> Costs:
    """Estimate what passes of a model cost, from its size.

    A token takes two operations for each weight; a pair of tokens takes `4 * hidden_size` in each layer, and attention
    is about two thirds as fast as matrix products. The cost of a pass was measured on a processor; a GPU computes many
    more tokens in the time in which it reads the weights.
    """
    config = model.config.get_text_config()
    embedding, head = embedding_of(model), model.get_output_embeddings()
    is_tied = head is not None and getattr(head, "weight", None) is embedding.weight
    num_weights = sum(parameter.numel() for parameter in model.parameters()) - (
        0 if is_tied else embedding.weight.numel()
    )
    return Costs(
        tokens_per_pass=32 if model.device.type in ("cpu", "meta") else 256,
        pairs_per_token=max(1.0, 2 * num_weights / (4 * config.hidden_size * num_layers) / 1.5),
    )


def _require_plain_chain(
    pack: Pack,
    num_read: Mapping[Segment, int],
    starts: Mapping[Segment, int],
    *,
    reason: str | None,
) -> None:
    """Raise `UnsupportedModel` unless the pack is the last segment of a plain chain without gaps."""
    chain = [*pack.context, *pack.segments]
    begin = 0
    for index, segment in enumerate(chain):
        is_next = segment.parents == tuple(chain[max(0, index - 1) : index])
        if not is_next or starts[segment] != begin or len(pack.segments) != 1:
            raise UnsupportedModel(
                f"this model runs plain chains only ({reason})",
                hint="Use no parallel branches and no explicit start with it.",
            )
        begin += num_read[segment]
