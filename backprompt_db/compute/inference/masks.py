"""Attention masks: which token sees which in a pass, as one mask for all layers or one for each type of layer."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from backprompt_db.compute.plan import Pack, token_offsets
from backprompt_db.prompt.segments import Segment, ancestry

Mask = npt.NDArray[np.bool_]
"""`[new tokens, context tokens + new tokens]`, True where a token attends."""

SLIDING_LAYERS = "sliding_attention"
"""What transformers calls the layers that have a window."""


class MaskKind(enum.Enum):
    """What the numbers of a mask mean."""

    BOOLEAN = "boolean"
    """True where a token attends."""
    ADDITIVE = "additive"
    """0 where a token attends, the dtype's minimum elsewhere: added to the attention scores."""
    CAUSAL = "causal"
    """No mask, only plain causal attention over the cache: a pass computes one segment of a plain chain."""


@dataclass(frozen=True, slots=True)
class MaskForm:
    """How a model takes the attention mask of a pack."""

    kind: MaskKind
    window: int | None = None
    """How many positions a layer with a window sees: a token's own and those before it. None if no layer has one."""
    layer_types: tuple[str, ...] = ()
    """Types of layers that get masks of their own. Empty if one mask, and so the window, is for all layers."""

    @property
    def name(self) -> str:
        """The form's name in the catalog; the window and the types follow from the model."""
        prefix = "layered " if self.layer_types else "windowed " if self.window else ""
        return prefix + self.kind.value


def attention_mask(pack: Pack, num_tokens: Mapping[Segment, int]) -> Mask:
    """Return the mask of a pack: a token sees its visible segments, itself, and the tokens before it in its segment."""
    columns = [*pack.context, *pack.segments]
    between = _visible(columns, ancestry(pack.segments))
    column_of_token = np.repeat(np.arange(len(columns)), [num_tokens[segment] for segment in columns])
    num_context = sum(num_tokens[segment] for segment in pack.context)
    mask: Mask = between[column_of_token[num_context:]][:, column_of_token]
    for begin, segment in token_offsets(pack, num_tokens):
        end = begin + num_tokens[segment]
        mask[begin:end, num_context + begin : num_context + end] = np.tri(end - begin, dtype=bool)
    return mask


def mask_of_tokens(
    tokens: npt.NDArray[np.integer], segments: Sequence[Segment], num_tokens: Mapping[Segment, int]
) -> Mask:
    """Return which tokens of `segments`, parents before children, are seen by each of `tokens`: `[len(tokens), T]`.

    No token counts as seeing itself.
    """
    owners = np.repeat(np.arange(len(segments)), [num_tokens[segment] for segment in segments])
    own = owners[tokens]
    is_before = np.arange(len(owners)) < tokens[:, None]
    mask: Mask = _visible(segments, segments)[own][:, owners] | ((owners == own[:, None]) & is_before)
    return mask


def _visible(columns: Sequence[Segment], ordered: Sequence[Segment]) -> Mask:
    """Return which of `columns` each one sees, without itself; `ordered` has the same, parents before children."""
    index = {segment: number for number, segment in enumerate(columns)}
    between = np.zeros((len(columns), len(columns)), dtype=bool)
    for segment in ordered:
        for parent in segment.parents:
            between[index[segment]] |= between[index[parent]]
            between[index[segment], index[parent]] = True
    return between


def within_window(mask: Mask, position_ids: npt.NDArray[np.integer], window: int | None) -> Mask:
    """Return the mask of a layer with a window: tokens `window` or more positions before a token are hidden from it.

    `position_ids` are those of all columns; the rows are the last columns. Distances are between positions, not between
    places in the cache, where other branches lie in between: a branch sees as far back as if it stood alone, and what
    follows parallel branches sees the near positions of each. The same holds for explicit starts: a gap is as wide as
    if it were filled, and visible tokens at later positions are never hidden.
    """
    if window is None:
        return mask
    first_seen = position_ids[-len(mask) :] - window + 1
    return mask & (position_ids >= first_seen[:, None])


def mask_argument(
    mask: Mask, position_ids: npt.NDArray[np.integer], form: MaskForm, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return a mask as a model takes it: `[1, 1, new, columns]`, or one such mask for each layer type."""

    def tensor(window: int | None) -> torch.Tensor:
        allowed = torch.from_numpy(within_window(mask, position_ids, window))[None, None].to(device)
        return allowed if form.kind is MaskKind.BOOLEAN else _additive(allowed, dtype)

    if not form.layer_types:
        return tensor(form.window)
    return {name: tensor(form.window if name == SLIDING_LAYERS else None) for name in form.layer_types}


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    added = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return added.masked_fill_(~allowed, torch.finfo(dtype).min)
