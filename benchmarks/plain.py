"""What transformers alone can do with keys and values in memory or in files: the ways that ours is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

from backprompt_db.compute.inference.kv_cache import CACHE_KEYWORD

Ids = Sequence[int]
Tensors = Mapping[str, torch.Tensor]
Reader = Callable[[Path], Tensors]


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a user keeps of a prompt: its cache, and the logits [vocab_size] that predict what comes next."""

    cache: Any
    logits: torch.Tensor


class InPlaceLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A cache layer with room for `capacity` tokens: appending copies new tokens alone, forgetting copies nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, *, capacity: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._room = tuple(each.new_empty((*each.shape[:2], capacity, each.shape[3])) for each in (keys, values))
        self.keep(0)
        self.update(keys, values)

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Append keys and values; return all."""
        begin = self.keys.shape[2]
        end = begin + key_states.shape[2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, begin:end] = states
        self.keep(end)
        return self.keys, self.values

    def keep(self, num_tokens: int) -> None:
        """Forget all but the first tokens."""
        self.keys, self.values = (room[:, :, :num_tokens] for room in self._room)


def dynamic(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """Return a `DynamicCache` of keys and values by layer. Nothing is copied before the model extends it."""
    cache = DynamicCache()
    cache.layers = [DynamicLayer() for _ in pairs]
    for layer, (keys, values) in zip(cache.layers, pairs, strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return cache


def viewed(cache: Any) -> Any:
    """Return another cache of the same tensors: extending it leaves `cache` as it is."""
    return dynamic([(layer.keys, layer.values) for layer in cache.layers])


def repeated(cache: Any, num_rows: int) -> Any:
    """Return a cache with the one row of `cache` repeated; the copies are made once, when the model extends it."""
    size = (num_rows, -1, -1, -1)
    return dynamic([(layer.keys.expand(size), layer.values.expand(size)) for layer in cache.layers])


def row_of(cache: Any, row: int) -> Any:
    """Return a cache of one row of a batch."""
    return dynamic([(layer.keys[row : row + 1], layer.values[row : row + 1]) for layer in cache.layers])


def in_place(cache: Any, *, capacity: int) -> Any:
    """Return a cache that begins with a copy of `cache` and appends in place, up to `capacity` tokens."""
    other = DynamicCache()
    other.layers = [InPlaceLayer(layer.keys, layer.values, capacity=capacity) for layer in cache.layers]
    return other


def keep(cache: Any, num_tokens: int) -> Any:
    """Forget all but the first tokens of a cache that `in_place` or `static` made; return it."""
    for layer in cache.layers:
        if isinstance(layer, InPlaceLayer):
            layer.keep(num_tokens)
        else:
            layer.cumulative_length.fill_(num_tokens)
    return cache


def static(model: Any, cache: Any, *, capacity: int) -> Any:
    """Return a `StaticCache` that begins with a copy of `cache`."""
    other = StaticCache(config=model.config, max_cache_len=capacity)
    for index, layer in enumerate(cache.layers):
        other.update(layer.keys, layer.values, index)
    return other


def run(model: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
    """Call the model without gradients."""
    with torch.no_grad():
        return model(input_ids, **inputs)


def prefill(model: Any, ids: Ids) -> Prefix:
    """Run a prompt; return its cache and its last logits."""
    output = run(model, torch.tensor([ids]), **{CACHE_KEYWORD: DynamicCache()}, use_cache=True, logits_to_keep=1)
    return Prefix(output.past_key_values, output.logits[0, -1].clone())


def chosen(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each of `targets` [...] under `logits` [..., vocab_size]."""
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]  # faster than to subtract logsumexp


def continue_prefix(model: Any, prefix: Prefix, ids: Ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a suffix on a cache, which is extended; return its tokens' log-probabilities [T] and its last logits."""
    targets = torch.tensor(ids)
    logits = run(model, targets[None], **{CACHE_KEYWORD: prefix.cache}, use_cache=True).logits[0]
    return chosen(torch.cat([prefix.logits[None], logits[:-1]]), targets), logits[-1]


def save_tensors(cache: Any, path: Path) -> None:
    """Save a cache for each way of `READERS`: as safetensors, and with torch beside it."""
    tensors = {f"keys.{index}": layer.keys.contiguous() for index, layer in enumerate(cache.layers)}
    tensors |= {f"values.{index}": layer.values.contiguous() for index, layer in enumerate(cache.layers)}
    save_file(tensors, path)
    torch.save(tensors, path.with_suffix(".pt"))


def read_cache(path: Path, read: Reader) -> Any:
    """Return a cache over the tensors of a file that `save_tensors` wrote."""
    tensors = read(path)
    return dynamic([(tensors[f"keys.{index}"], tensors[f"values.{index}"]) for index in range(len(tensors) // 2)])


def _read_one_by_one(path: Path) -> Tensors:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _read_with_torch(path: Path) -> Tensors:
    tensors: Tensors = torch.load(path.with_suffix(".pt"), mmap=True, weights_only=True)
    return tensors


READERS: Mapping[str, Reader] = {
    "load_file": load_file,
    "safe_open": _read_one_by_one,
    "torch.load": _read_with_torch,
}
"""Ways to read tensors by mapping a file into memory."""


def padded(rows: Sequence[Ids]) -> torch.Tensor:
    """Return token ids [num_rows, longest], padded on the right, where no other token sees the padding."""
    return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)


def score_batch(model: Any, prefix: Prefix, completions: Sequence[Ids]) -> list[float]:
    """Score completions of a prefix of one row in one batch, over its repeated cache.

    A last token predicts nothing that is asked for and is not fed, a first one is predicted by the prefix.
    """
    targets = padded(completions)
    logprobs = prefix.logits.log_softmax(-1)[targets[:, :1]]
    if targets.shape[1] > 1:
        cache = repeated(prefix.cache, len(completions))
        logits = run(model, targets[:, :-1], **{CACHE_KEYWORD: cache}, use_cache=True).logits
        logprobs = torch.cat([logprobs, chosen(logits, targets[:, 1:])], 1)
    lengths = torch.tensor([len(each) for each in completions])
    is_token = torch.arange(targets.shape[1]) < lengths[:, None]
    return [float(each) for each in (logprobs * is_token).double().sum(1)]


def score_in_place(model: Any, prefix: Prefix, completions: Sequence[Ids]) -> list[float]:
    """Score completions one by one on a cache of `in_place`, which is cropped after each: nothing is copied."""
    num_tokens = prefix.cache.get_seq_length()
    scores = []
    for ids in completions:
        targets = torch.tensor(ids)
        logits = prefix.logits[None]
        if len(ids) > 1:
            fed = run(model, targets[None, :-1], **{CACHE_KEYWORD: prefix.cache}, use_cache=True).logits[0]
            logits = torch.cat([logits, fed])
            keep(prefix.cache, num_tokens)
        scores.append(float(chosen(logits, targets).double().sum()))
    return scores


def chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    """Yield the items in order, so many at a time."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
