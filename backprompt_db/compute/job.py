"""One call's worth of computation: its packs, with everything that a pass needs to know of their segments."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from backprompt_db.compute.plan import Pack
from backprompt_db.representation import Arrays, Part
from backprompt_db.text import Segment

if TYPE_CHECKING:
    from backprompt_db.compute.runtime import Runtime

Need = tuple[Segment, Part]
"""One part of one segment."""

Wanted = Mapping[Segment, frozenset[Part]]
"""Parts that a caller asked for, by segment."""


@dataclass(frozen=True, eq=False)
class Job:
    """Packs to compute with one model, in order, and the parts that pass between them."""

    runtime: Runtime
    packs: list[Pack]
    input_ids: Mapping[Segment, Sequence[int]]
    starts: Mapping[Segment, int]
    wanted: Wanted
    keep: Wanted
    """Parts to store; all three of a segment that is not named."""

    def num_tokens(self, pack: Pack) -> int:
        """Tokens that a pack computes."""
        return sum(len(self.input_ids[segment]) for segment in pack.segments)

    def can_use(self, need: Need, found: Mapping[Need, Arrays]) -> bool:
        """Whether a part is there and has the shape that this model gives it."""
        segment, part = need
        if need not in found or part is not Part.KV:
            return need in found
        keys = found[need]["keys"]
        return keys.shape[2] == len(self.input_ids[segment]) and self.runtime.fits(found[need])

    def compute(self, pack: Pack, found: Mapping[Need, Arrays]) -> tuple[dict[Need, Arrays], float]:
        """Run the model on a pack whose needs are in `found`; return the parts to store or use, and the seconds."""
        return self.runtime.compute(
            pack,
            input_ids=self.input_ids,
            starts=self.starts,
            context=[found[segment, Part.KV] for segment in pack.context],
            predictions={segment: found[segment, Part.LOGITS]["logits"] for segment in pack.predictors},
            produce={segment: self._produced(segment) for segment in pack.segments},
        )

    def kept(self, segment: Segment) -> frozenset[Part]:
        """Which parts of a computed segment are stored."""
        return self.keep.get(segment, _ALL_PARTS)

    def is_used(self, need: Need) -> bool:
        """Whether a part was asked for, or another pack needs it."""
        return need in self._last_use or need[1] in self.wanted.get(need[0], ())

    def release(self, pack: Pack, found: MutableMapping[Need, Arrays]) -> None:
        """Drop from `found` what no later pack needs and nobody asked for: memory holds no more than it must."""
        for need in pack.needs:
            if self._last_use[need] is pack and need[1] not in self.wanted.get(need[0], ()):
                del found[need]

    def _produced(self, segment: Segment) -> frozenset[Part]:
        return self.kept(segment) | {part for part in Part if self.is_used((segment, part))}

    @cached_property
    def _last_use(self) -> dict[Need, Pack]:
        return {need: pack for pack in self.packs for need in pack.needs}


_ALL_PARTS = frozenset(Part)
