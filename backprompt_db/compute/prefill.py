"""The packs that one call computes, with everything that a pass needs to know about their segments."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from backprompt_db.compute.plan import Need, Pack, Wanted
from backprompt_db.prompt.representation import OWN_PARTS, Arrays, Part
from backprompt_db.prompt.segments import Segment

if TYPE_CHECKING:
    from backprompt_db.compute.inference.forward import PassResult
    from backprompt_db.compute.inference.kv_cache import KVBuffer
    from backprompt_db.compute.inference.runner import ModelRunner


@dataclass(frozen=True, eq=False)
class Passes:
    """Packs to compute, in order, and which of their parts other packs or the caller need."""

    packs: list[Pack]
    input_ids: Mapping[Segment, Sequence[int]]
    starts: Mapping[Segment, int]
    wanted: Wanted
    missing: Wanted
    """Parts that are needed and were not stored when the packs were planned."""
    keep: MutableMapping[Segment, frozenset[Part]]
    """Parts to store of each segment that is computed, without those that others stored before its pack was claimed."""
    is_deterministic: bool
    """Whether all parts are always computed, so that a part has the same bits whatever else is wanted."""

    def num_tokens(self, pack: Pack) -> int:
        """Return how many tokens a pack computes."""
        return sum(len(self.input_ids[segment]) for segment in pack.segments)

    def produced(self, segment: Segment) -> frozenset[Part]:
        """Return the parts of a segment that its pass makes."""
        if self.is_deterministic:
            return frozenset(OWN_PARTS)
        return self.keep[segment] | {part for part in OWN_PARTS if self.is_used((segment, part))}

    def is_used(self, need: Need) -> bool:
        """Whether the caller wants a part, or another pack needs it."""
        return need in self._last_use or need[1] in self.wanted.get(need[0], ())

    def is_handed_on(self, need: Need, pack: Pack) -> bool:
        """Whether a part that `pack` needed is needed again."""
        return self._last_use[need] is not pack or need[1] in self.wanted.get(need[0], ())

    @cached_property
    def _last_use(self) -> dict[Need, Pack]:
        return {need: pack for pack in self.packs for need in pack.needs}


@dataclass(frozen=True, eq=False)
class Prefill(Passes):
    """Passes to compute with one model."""

    runner: ModelRunner

    def fits(self, segment: Segment, kv: Arrays) -> bool:
        """Whether keys and values have the shape that this model gives to those of a segment."""
        return kv["keys"].shape[2] == len(self.input_ids[segment]) and self.runner.fits(kv)

    def compute(self, pack: Pack, context: KVBuffer, found: Mapping[Need, Arrays]) -> PassResult:
        """Run the model on a pack after its context; its scores need the logits of its predictors, out of `found`."""
        return self.runner.compute(
            pack,
            input_ids=self.input_ids,
            starts=self.starts,
            context=context,
            predictions={segment: found[segment, Part.LOGITS]["logits"] for segment in pack.predictors},
            produce={segment: self.produced(segment) for segment in pack.segments},
        )

    def retain(self, pack: Pack, computed: PassResult, found: MutableMapping[Need, Arrays]) -> None:
        """Add to `found` the parts that a pack has computed and that the caller or another pack needs.

        Parts that the pack needed and nobody needs again are dropped, to save memory.
        """
        found.update({need: part for need, part in computed.parts.items() if self.is_used(need) and need not in found})
        for need in pack.needs:
            if not self.is_handed_on(need, pack):
                found.pop(need, None)
