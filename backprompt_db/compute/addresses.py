"""What everything is called in one call: addresses and keys under one model and one tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backprompt_db.prompt.ids import Address, TokenizerId, WeightsId, address
from backprompt_db.prompt.representation import Origin, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.store.contract import Key


@dataclass(frozen=True, slots=True)
class Addresses:
    """Addresses under one model and tokenizer, which must stay the same for the whole of a call."""

    weights_id: WeightsId
    tokenizer_id: TokenizerId
    is_certain: bool = True
    """Whether the ids are those of objects in memory, not those that were recorded for their files."""

    @property
    def ids(self) -> tuple[WeightsId, TokenizerId]:
        """Both ids."""
        return self.weights_id, self.tokenizer_id

    def address(self, segment: Segment) -> Address:
        """Return the address of a segment's representation."""
        return address(segment.id, self.weights_id, self.tokenizer_id)

    def key(self, segment: Segment, part: Part) -> Key:
        """Return the store's key of one part of a segment."""
        return Key(self.address(segment), part)

    def content(self, segment: Segment, num_tokens: int) -> tuple[Address, int]:
        """Return what a buffer says of the segment that lies in it: its address and its number of tokens."""
        return self.address(segment), num_tokens

    def origin(self, segment: Segment, num_tokens: int, seconds: float, *, versions: Mapping[str, str]) -> Origin:
        """Return what is stored beside a segment that was computed in `seconds`."""
        return Origin(
            text=segment.string,
            parents=segment.parent_ids,
            start=segment.start,
            weights_id=self.weights_id,
            tokenizer_id=self.tokenizer_id,
            num_tokens=num_tokens,
            compute_seconds=seconds,
            namespace=segment.namespace,
            versions=versions,
        )
