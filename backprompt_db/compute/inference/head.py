"""From hidden states to log-probabilities: the model's head, applied only to the tokens whose logits are needed.

Most heads are one linear layer. It is kept from running inside the pass and is applied here to chosen tokens, a block
of the vocabulary at a time: a block of logits stays in the processor's cache, while `[T, vocab_size]` would be written
to new memory and read again (blocks are 1.6 to 1.9 times as fast for GPT-2 on two cores). A head that is followed by
more, such as a soft cap, runs inside the pass. What is changed in a model for a pass is undone after it, in a forked
child too.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from backprompt_db.system.platform import register_at_fork

VOCABULARY_BLOCK = 2048
"""Logits of a few hundred tokens over so many tokens of the vocabulary fit into the processor's cache."""

_ROWS_AT_ONCE = 64
"""How many rows of whole logits are turned into log-probabilities at a time."""

_SOFT_CAP = re.compile(r"soft_?cap")

_undo: list[Callable[[], None]] = []
"""What is to be undone after the passes that run now."""


class Predictions(Protocol):
    """The predictions of a pass after each of its tokens."""

    def __len__(self) -> int:
        """Return the number of tokens."""

    def read(self, query: LogitsQuery) -> tuple[npt.NDArray[np.float32], torch.Tensor]:
        """Return the natural log-probabilities [num_targets] and the whole logits [num_ends, vocab_size] asked for."""


class LogitsQuery:
    """Which predictions are needed: log-probabilities after some tokens of a pass, and the whole logits after others.

    `rows` [n] are tokens of the pass and `targets` [n] the token ids whose log-probabilities are wanted after them;
    after the tokens `ends` the whole logits are wanted. Tokens that occur repeatedly are computed once.
    """

    def __init__(self, rows: npt.NDArray[Any], targets: npt.NDArray[Any], ends: npt.NDArray[Any]) -> None:
        distinct, places = np.unique(np.concatenate([rows, ends]), return_inverse=True)
        self.tokens = torch.from_numpy(distinct.astype(np.int64))
        """[m]: the tokens to compute, ascending."""
        self.places = torch.from_numpy(places[: len(rows)])
        """[n]: the place in `tokens` that predicts each target."""
        self.targets = torch.from_numpy(targets.astype(np.int64))
        self.ends = torch.from_numpy(places[len(rows) :])
        """[num_ends]: the places in `tokens` after which the whole logits are wanted."""

    def to(self, device: torch.device) -> LogitsQuery:
        """Move the query to the device of the numbers."""
        for name in ("tokens", "places", "targets", "ends"):
            setattr(self, name, getattr(self, name).to(device))
        return self


class WholeLogits:
    """Predictions of a pass that gave its logits [T, vocab_size]."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def __len__(self) -> int:
        return len(self._logits)

    def read(self, query: LogitsQuery) -> tuple[npt.NDArray[np.float32], torch.Tensor]:
        """Return log-probabilities and logits, a few rows at a time."""
        return _by_rows(lambda rows: self._logits[rows], query.to(self._logits.device))


class HiddenStates:
    """Predictions of a pass whose head was kept from running: hidden states [T, hidden_size].

    Read them in `evaluation` of the model, like the pass: the head may have adapters with dropout.
    """

    def __init__(self, hidden: torch.Tensor, head: nn.Module) -> None:
        self._hidden = hidden
        self._head = head

    def __len__(self) -> int:
        return len(self._hidden)

    def read(self, query: LogitsQuery) -> tuple[npt.NDArray[np.float32], torch.Tensor]:
        """Return log-probabilities and logits, a block of the vocabulary or a few rows at a time."""
        query.to(self._hidden.device)
        with torch.no_grad():
            if type(self._head) is nn.Linear:
                return _by_words(self._head, self._hidden[query.tokens], query)
            return _by_rows(lambda rows: self._head(self._hidden[rows]), query)


def first_logprobs(logits: torch.Tensor, targets: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the log-probability [n] of each of `targets` after one token with these `logits` [vocab_size]."""
    row = logits.float()
    chosen = row[torch.from_numpy(targets.astype(np.int64)).to(row.device)]
    result: npt.NDArray[np.float32] = (chosen - row.logsumexp(0)).cpu().numpy()
    return result


def head_of(model: Any) -> nn.Module | None:
    """Return the module that may be all of the model's head; None where the configuration names a soft cap.

    A soft cap changes small logits too little to be found by comparing numbers.
    """
    head = model.get_output_embeddings()
    caps = [value for name, value in model.config.get_text_config().to_dict().items() if _SOFT_CAP.search(name)]
    return head if isinstance(head, nn.Module) and not any(caps) else None


def is_whole_head(head: nn.Module, kept: list[torch.Tensor], logits: torch.Tensor) -> bool:
    """Whether a pass's logits [T, vocab_size] are bit for bit what `head` makes of its hidden states `kept`."""
    if len(kept) != 1 or kept[0].shape[:-1] != (1, len(logits)):
        return False
    again = head(kept[0])[0]
    return again.dtype == logits.dtype and torch.equal(again, logits)


@contextmanager
def kept_from_running(head: nn.Module, *, skip: bool = True) -> Iterator[list[torch.Tensor]]:
    """Collect the hidden states [1, T, hidden_size] that this thread gives `head`; with `skip` it computes nothing."""
    kept: list[torch.Tensor] = []
    thread = threading.get_ident()

    def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if threading.get_ident() != thread:
            return None
        kept.append(arguments[0])
        return (arguments[0][:, :0], *arguments[1:]) if skip else None

    handle = head.register_forward_pre_hook(keep)
    with undone_afterwards(handle.remove):
        yield kept


@contextmanager
def undone_afterwards(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` at the end of the block; also in a forked child, which lacks the thread that would end the block."""
    _undo.append(undo)
    try:
        yield
    finally:
        if undo in _undo:
            _undo.remove(undo)
        undo()


def _by_words(
    head: nn.Linear, hidden: torch.Tensor, query: LogitsQuery
) -> tuple[npt.NDArray[np.float32], torch.Tensor]:
    """Apply a linear head to `hidden` [m, hidden_size], one block of the vocabulary after the other."""
    targets = query.targets
    chosen = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    vocab_size = len(head.weight)
    logits = torch.empty((len(query.ends), vocab_size), dtype=hidden.dtype, device=hidden.device)
    room = torch.empty(len(hidden) * VOCABULARY_BLOCK, dtype=hidden.dtype, device=hidden.device)
    sums = []
    for begin in range(0, vocab_size, VOCABULARY_BLOCK):
        weight = head.weight[begin : begin + VOCABULARY_BLOCK]
        block = torch.mm(hidden, weight.T, out=room[: len(hidden) * len(weight)].view(len(hidden), len(weight)))
        if head.bias is not None:
            block += head.bias[begin : begin + len(weight)]
        inside = ((targets >= begin) & (targets < begin + len(weight))).nonzero()[:, 0]
        chosen[inside] = block[query.places[inside], targets[inside] - begin].float()
        logits[:, begin : begin + len(weight)] = block[query.ends]
        if len(targets):
            sums.append(block.float().logsumexp(1))
    return _finish(chosen, sums, query), logits


def _finish(chosen: torch.Tensor, sums: list[torch.Tensor], query: LogitsQuery) -> npt.NDArray[np.float32]:
    if sums:
        chosen -= torch.stack(sums).logsumexp(0)[query.places]
    result: npt.NDArray[np.float32] = chosen.cpu().numpy()
    return result


def _by_rows(
    logits_of: Callable[[torch.Tensor], torch.Tensor], query: LogitsQuery
) -> tuple[npt.NDArray[np.float32], torch.Tensor]:
    """Read the predictions from the logits of a few tokens at a time."""
    chosen = torch.empty(len(query.targets), dtype=torch.float32, device=query.tokens.device)
    logits = torch.empty((len(query.ends), 0))
    for begin in range(0, len(query.tokens), _ROWS_AT_ONCE):
        rows = logits_of(query.tokens[begin : begin + _ROWS_AT_ONCE])
        if not begin:
            logits = rows.new_empty((len(query.ends), rows.shape[1]))
        inside = ((query.places >= begin) & (query.places < begin + len(rows))).nonzero()[:, 0]
        at = query.places[inside] - begin
        chosen[inside] = rows[at, query.targets[inside]].float() - rows.float().logsumexp(1)[at]
        ending = ((query.ends >= begin) & (query.ends < begin + len(rows))).nonzero()[:, 0]
        logits[ending] = rows[query.ends[ending] - begin]
    result: npt.NDArray[np.float32] = chosen.cpu().numpy()
    return result, logits


def _after_fork_in_child() -> None:
    while _undo:
        _undo.pop()()


register_at_fork(after_in_child=_after_fork_in_child)
