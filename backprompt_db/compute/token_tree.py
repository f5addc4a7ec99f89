"""The tokens of many completions as one tree, and what is known of the tokens that may follow a segment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from backprompt_db.prompt.representation import Array, Arrays

Numbers = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

_COLUMNS = ("input_ids", "parents", "token_logprobs")
_NOWHERE = -2


def root_node(root: int) -> int:
    """Return the number that stands for a root where a node's would; `root_node` of it is the root again."""
    return -1 - root


class TokenTree:
    """The tokens of completions, in which completions that begin alike share their beginnings.

    Each completion follows one of several roots. A node is a token after those before it.
    """

    def __init__(self, completions: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Build the tree of completions, each with the number of its root and its token ids."""
        numbers: dict[tuple[int, int], int] = {}
        self.paths: Numbers = np.full((len(completions), max(len(ids) for _, ids in completions)), -1)
        """[num_completions, most tokens]: the nodes of each completion, then -1."""
        for row, (root, ids) in zip(self.paths, completions, strict=True):
            node = root_node(root)
            for place, token in enumerate(ids):
                node = row[place] = numbers.setdefault((int(node), token), len(numbers))
        self.nodes = list(numbers)
        """The parent and the token of each node, parents before children."""
        self.lengths: Numbers = (self.paths >= 0).sum(axis=1)
        """[num_completions]: how many tokens each has."""

    def __len__(self) -> int:
        return len(self.nodes)

    def token(self, node: int) -> int:
        """Return the token id of a node."""
        return self.nodes[node][1]

    def children(self, node: int) -> Sequence[int]:
        """Return the nodes directly after a node or a root."""
        return self._children.get(node, ())

    @cached_property
    def _children(self) -> dict[int, list[int]]:
        children: dict[int, list[int]] = {}
        for node, (parent, _) in enumerate(self.nodes):
            children.setdefault(parent, []).append(node)
        return children


class Continuations:
    """What is known of the tokens that may follow a segment: a tree that only grows, as it is stored."""

    def __init__(self, arrays: Arrays | None = None) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._logprobs: list[float] = []
        if arrays is not None:
            ids, parents, logprobs = (arrays[name].numpy().tolist() for name in _COLUMNS)
            self._numbers = {key: number for number, key in enumerate(zip(parents, ids, strict=True))}
            self._logprobs = logprobs

    def __len__(self) -> int:
        return len(self._logprobs)

    def known(self, tree: TokenTree, *, root: int) -> dict[int, float]:
        """Return what is known of the nodes of a tree after one of its roots: their log-probabilities."""
        places, logprobs = {root_node(root): -1}, {}
        for node, (parent, token) in enumerate(tree.nodes):
            number = self._numbers.get((places.get(parent, _NOWHERE), token))
            if number is not None:
                places[node] = number
                logprobs[node] = self._logprobs[number]
        return logprobs

    def learn(self, tree: TokenTree, logprobs: Values, *, root: int) -> bool:
        """Add the nodes after a root whose log-probabilities are known; whether there were new ones."""
        places, num_before = {root_node(root): -1}, len(self)
        for node, (parent, token) in enumerate(tree.nodes):
            if parent in places and not np.isnan(logprobs[node]):
                places[node] = number = self._numbers.setdefault((places[parent], token), len(self))
                if number == len(self):
                    self._logprobs.append(float(logprobs[node]))
        return len(self) > num_before

    def arrays(self) -> Arrays:
        """Return the tree as it is stored."""
        keys = np.array(list(self._numbers), dtype=np.int32).reshape(-1, 2)
        columns = keys[:, 1], keys[:, 0], np.array(self._logprobs, dtype=np.float32)
        named = zip(_COLUMNS, columns, strict=True)
        return {name: Array.from_numpy(np.ascontiguousarray(column)) for name, column in named}
