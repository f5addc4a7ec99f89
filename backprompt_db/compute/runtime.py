"""A loaded model, ready to compute packs: its identity, its verdict, and its own limits. Imports torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
import transformers

from backprompt_db.catalog import ModelRecord
from backprompt_db.compute.fingerprint import ModelIdentity
from backprompt_db.compute.forward import MaskForm, compute_pack
from backprompt_db.compute.kvcache import KVShape
from backprompt_db.compute.limits import max_positions
from backprompt_db.compute.plan import Pack
from backprompt_db.compute.selfcheck import CHECK_VERSION, Verdict, examine, probe_shape, recorded
from backprompt_db.errors import UnsupportedModel
from backprompt_db.keys import WeightsId
from backprompt_db.representation import Array, Arrays, Part
from backprompt_db.text import Segment


class Runtime:
    """What computes misses: a causal language model and what is known about it."""

    def __init__(self, model: Any, *, name: str) -> None:
        self.model = model
        self.name = name
        self.num_calls = 0
        self._identity = ModelIdentity(model)
        self._proven: tuple[WeightsId, str] | None = None
        self._max_positions: int | None = None
        self._verdict = Verdict(None, None, "it was never checked")

    @classmethod
    def load(cls, name_or_path: str, arguments: dict[str, Any]) -> Runtime:
        """Load a pretrained causal language model with transformers, in evaluation mode."""
        model = transformers.AutoModelForCausalLM.from_pretrained(name_or_path, **arguments)
        return cls(model.eval(), name=name_or_path)

    @property
    def weights_id(self) -> WeightsId:
        """The weights id of the model as it is now; hashed again only when the model has changed."""
        return self._identity.weights_id()

    @cached_property
    def shape(self) -> KVShape:
        """The shape of the model's keys and values. Raises `UnsupportedModel` where it has none."""
        return probe_shape(self.model)

    def fits(self, arrays: Arrays) -> bool:
        """Whether stored keys and values have the shape and dtype of this model's."""
        return KVShape.of(arrays) == self.shape

    @property
    def max_positions(self) -> int | None:
        """How many positions a prompt may have, None where there is no limit; known once the model is proven."""
        return self._max_positions

    @property
    def device(self) -> torch.device:
        """Where the model is, and where its inputs go."""
        device: torch.device = self.model.device
        return device

    @property
    def vocab_size(self) -> int:
        """How many token ids the model can read."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions that may change the last bits of a number."""
        return {"torch": version("torch"), "transformers": version("transformers"), "python": platform.python_version()}

    def prove(self, weights_id: WeightsId, known: ModelRecord | None) -> ModelRecord | None:
        """Settle how the model may be computed: by what is `known`, if that still holds, else by a self-check.

        Returns the record to keep when a self-check was made, else None.
        """
        if self._proven == (weights_id, self._checked_with):
            return None
        verdict = None
        if known is not None and known.checked_with == self._checked_with:
            verdict = recorded(known.verdict, known.mask_form, max_error=known.max_error, reason=known.reason)
        vars(self).pop("shape", None)  # the model may have another dtype by now
        self._verdict = verdict or self._examine(weights_id)
        self._max_positions = max_positions(self.model) if self._verdict.form else None
        self._proven = weights_id, self._checked_with
        return None if verdict else self._record(weights_id, self._verdict)

    def require_supported(self) -> MaskForm:
        """Return how to compute this model. Raises `UnsupportedModel`, with the reason, for a refused one."""
        if self._verdict.form is None:
            raise UnsupportedModel(
                f"{type(self.model).__name__} cannot be cached and stay right: {self._verdict.reason}",
                hint="Run it with transformers directly; nothing of it was stored.",
            )
        return self._verdict.form

    def require_runnable(
        self, packs: Sequence[Pack], input_ids: Mapping[Segment, Sequence[int]], starts: Mapping[Segment, int]
    ) -> None:
        """Raise `UnsupportedModel` for packs that this model cannot run: one of chains runs no branches and no gaps."""
        if not self.takes_packs:
            for pack in packs:
                _require_plain_chain(pack, input_ids, starts, reason=self._verdict.reason)

    @property
    def takes_packs(self) -> bool:
        """Whether a pass may hold several segments."""
        return self._verdict.form is not MaskForm.CAUSAL

    def compute(
        self,
        pack: Pack,
        *,
        input_ids: Mapping[Segment, Sequence[int]],
        starts: Mapping[Segment, int],
        context: Sequence[Arrays],
        predictions: Mapping[Segment, Array],
        produce: Mapping[Segment, frozenset[Part]],
    ) -> tuple[dict[tuple[Segment, Part], Arrays], float]:
        """Run the model once; see `compute_pack`. Raises `UnsupportedModel` for a refused model."""
        form = self.require_supported()
        self.num_calls += 1
        return compute_pack(
            self.model, pack, form=form, shape=self.shape, input_ids=input_ids, starts=starts, context=context,
            predictions=predictions, produce=produce,
        )  # fmt: skip

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
            dtype=str(self.model.dtype).removeprefix("torch."),
            num_layers=shape.num_layers if shape else 0,
            num_kv_heads=shape.num_kv_heads if shape else 0,
            head_dim=shape.key_dim if shape else 0,
            vocab_size=self.vocab_size,
            max_positions=self.max_positions,
            verdict=verdict.kind,
            mask_form=verdict.form.value if verdict.form else None,
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


def _require_plain_chain(
    pack: Pack,
    input_ids: Mapping[Segment, Sequence[int]],
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
        begin += len(input_ids[segment])
