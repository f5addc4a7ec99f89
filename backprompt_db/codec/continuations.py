"""What makes arrays a tree of continuations: of the tokens that may follow a segment, each with the token before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from backprompt_db.prompt.representation import Arrays

_MAX_LOGPROB = 1e-3
"""A probability is at most 1; what a library rounds may be a little above."""


def flaw_of_tree(arrays: Arrays) -> str | None:
    """Return what is wrong with `input_ids`, `parents` and `token_logprobs` [N] as a tree; None for a sound one."""
    columns: list[npt.NDArray[Any]] = [arrays[name].numpy() for name in ("input_ids", "parents", "token_logprobs")]
    ids, parents, logprobs = columns
    if (ids < 0).any():
        return "a token of its tree has no id"
    if ((parents < -1) | (parents >= np.arange(len(parents)))).any():
        return "a token of its tree does not come after the one before it"
    if not (logprobs <= _MAX_LOGPROB).all():  # NaN is not
        return "a token of its tree has no log-probability"
    if len(np.unique((parents.astype(np.int64) << 32) + ids)) != len(ids):
        return "a token of its tree is followed by the same one twice"
    return None
