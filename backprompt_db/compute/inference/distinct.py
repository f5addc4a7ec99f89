"""No token twice within a pass: segments that begin alike after the same tokens compute these once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backprompt_db.compute.inference.masks import Mask
from backprompt_db.compute.plan import Pack
from backprompt_db.prompt.segments import Segment, ancestry


@dataclass(frozen=True, eq=False)
class DistinctTokens:
    """The tokens of a pack that go through the model: equal ones that see the same tokens are one column of a pass."""

    ids: npt.NDArray[np.int64]
    """[num_columns]"""
    columns: npt.NDArray[np.int64]
    """[num_tokens]: the column of each token of the pack's segments, one segment after the other."""

    @classmethod
    def of(
        cls, pack: Pack, input_ids: Mapping[Segment, Sequence[int]], num_tokens: Mapping[Segment, int]
    ) -> DistinctTokens:
        """Return the tokens of a pack, of which each segment feeds the first `num_tokens`.

        What follows parallel branches sees the tokens of each of them: these stay apart, also where they are equal.
        """
        apart = set(ancestry(parent for each in pack.segments if len(each.parents) > 1 for parent in each.parents))
        known: dict[tuple[Hashable, int], int] = {}
        columns, last = list[int](), dict[Segment, int]()
        for segment in pack.segments:
            before: Hashable = segment.parent_ids, segment.start
            if segment in apart:
                before = segment.id
            elif segment.start is None and len(segment.parents) == 1 and segment.parents[0] in last:
                before = last[segment.parents[0]]  # whatever pieces have led there
            for token in input_ids[segment][: num_tokens[segment]]:
                before = known.setdefault((before, token), len(known))
                columns.append(before)
            if num_tokens[segment]:
                last[segment] = columns[-1]
        return cls(np.array([token for _, token in known], dtype=np.int64), np.array(columns, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def are_in_order(self, num_tokens: int) -> bool:
        """Whether each of the first tokens has a column of its own, in the order of the tokens."""
        return num_tokens == 0 or int(self.columns[num_tokens - 1]) == num_tokens - 1

    def placed(self, position_ids: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """Return the position ids of context and columns, by those of context and tokens."""
        context, own = np.split(position_ids, [len(position_ids) - len(self.columns)])
        return np.concatenate([context, own[self._firsts]])

    def masked(self, mask: Mask) -> Mask:
        """Return which columns see which, [num_columns, num_context + num_columns], by the mask of all tokens."""
        if len(self.ids) == len(self.columns):
            return mask
        rows = mask[self._firsts]
        context, own = np.split(rows, [mask.shape[1] - len(self.columns)], axis=1)
        by_column = np.argsort(self.columns, kind="stable")
        begins = np.searchsorted(self.columns[by_column], np.arange(len(self.ids)))
        seen: Mask = np.concatenate([context, np.logical_or.reduceat(own[:, by_column], begins, axis=1)], axis=1)
        return seen

    @property
    def _firsts(self) -> npt.NDArray[np.int64]:
        """The first token of each column."""
        firsts: npt.NDArray[np.int64] = np.unique(self.columns, return_index=True)[1]
        return firsts
