"""Databases of any number of small representations, and one of a few large ones. Everything follows from a number.

No model runs: what is in a part does not matter to how it is found, only that it is found as it was stored. And no
torch is imported.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import backprompt_db as bp
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import StoredPart
from backprompt_db.codec.blob import encode
from backprompt_db.prompt.ids import SegmentId, TokenizerId, WeightsId, namespace_id
from backprompt_db.prompt.representation import Array, Arrays, Origin, Part
from backprompt_db.store.contract import Blob, Key

NUM_REQUESTS = 25
"""After each context."""
NUM_LABELS = 9
"""After each request."""
NUM_KV = 64
KV_SHAPE = (12, 12, 64, 64)
"""Layers, heads, tokens, head_dim: 2.25 MiB of keys, and as much of values."""

_PER_REQUEST = 1 + NUM_LABELS
_PER_CONTEXT = 1 + NUM_REQUESTS * _PER_REQUEST
_NAMESPACES = ("", "sales", "support")
_MODELS = (WeightsId(b"w" * 32), WeightsId(b"W" * 32))
_TOKENIZER = TokenizerId(b"t" * 32)
_PER_GROUP = 50_000
_GROUP_SECONDS = 3_600.0
"""Each group was made so long after the one before."""


class Building(NamedTuple):
    """How long it took to store so many representations, and to enter them into the catalog."""

    num_representations: int
    store_seconds: float
    catalog_seconds: float


def build_scores(directory: Path, num_representations: int) -> Building:
    """Make a database of scores, and enter uses for every tenth."""
    store_seconds = catalog_seconds = 0.0
    first_at = time.time() - num_representations / _PER_GROUP * _GROUP_SECONDS
    with bp.open(directory, memory_nbytes=0) as db:
        for group, numbers in enumerate(_groups(num_representations)):
            made = sorted(((origin(number), number) for number in numbers), key=lambda pair: pair[0].address)
            blobs = [_blob(each, Part.SCORES, scores(each)) for each, _ in made]
            began = time.perf_counter()
            db.store.put(blobs)
            stored = time.perf_counter()
            _enter(db.catalog, blobs, [each for each, _ in made], at=first_at + group * _GROUP_SECONDS)
            catalog_seconds += time.perf_counter() - stored
            store_seconds += stored - began
    return Building(num_representations, store_seconds, catalog_seconds)


def build_kv(directory: Path) -> None:
    """Make a database of keys and values."""
    with bp.open(directory, memory_nbytes=0) as db:
        origins = [origin(number) for number in range(NUM_KV)]
        blobs = [_blob(each, Part.KV, kv(each)) for each in origins]
        db.store.put(blobs)
        _enter(db.catalog, blobs, origins, at=time.time())


def _groups(num_representations: int) -> Sequence[Sequence[int]]:
    return [
        range(begin, min(begin + _PER_GROUP, num_representations))
        for begin in range(0, num_representations, _PER_GROUP)
    ]


def _blob(each: Origin, part: Part, arrays: Arrays) -> Blob:
    return Blob(Key(each.address, part), encode(part, arrays, each))


def _enter(catalog: Catalog | None, blobs: Sequence[Blob], origins: Sequence[Origin], *, at: float) -> None:
    assert catalog is not None
    parts = [StoredPart(*blob.key, blob.nbytes, each) for blob, each in zip(blobs, origins, strict=True)]
    catalog.record(parts, at=at)
    catalog.touch({blob.key.address: 1 for blob in blobs[::10]}, at=at + 60)


@functools.lru_cache(maxsize=1_000)
def origin(number: int) -> Origin:
    """Return what the representation of that number was computed from: a context, a request after it, or a label."""
    context, rest = divmod(number, _PER_CONTEXT)
    namespace = _NAMESPACES[context % len(_NAMESPACES)]
    request, label = divmod(rest - 1, _PER_REQUEST)
    if not rest:
        text, parents = f"Context {context}: what is known of customer {context}.\n", _root(namespace)
    elif not label:
        text, parents = f"Request {request}: what about order {number}?\nLabel:", _ids(number - rest)
    else:
        text, parents = f" label {label}", _ids(number - label)
    return Origin(
        text=text,
        parents=parents,
        start=None,
        weights_id=_MODELS[context % 5 == 0],
        tokenizer_id=_TOKENIZER,
        num_tokens=2 + number % 6,
        compute_seconds=(number * 7919 % 1000 + 1) / 1e5,
        namespace=namespace,
    )


def _ids(number: int) -> tuple[SegmentId, ...]:
    return (origin(number).segment_id,)


def _root(namespace: str) -> tuple[SegmentId, ...]:
    synthetic = namespace_id(namespace)
    return () if synthetic is None else (synthetic,)


def scores(each: Origin) -> Arrays:
    """Return scores that no other representation has."""
    words = np.frombuffer(each.address, dtype="<u4")[: each.num_tokens]
    return {
        "input_ids": Array.from_numpy((words % 50_257).astype("<i4")),
        "token_logprobs": Array.from_numpy(np.negative(words % 4096, dtype=np.float32)),
    }


def kv(each: Origin) -> Arrays:
    """Return keys and values that no other representation has."""
    random = np.random.default_rng(list(each.address))
    keys, values = (random.standard_normal(KV_SHAPE, dtype=np.float32) for _ in range(2))
    return {"keys": Array.from_numpy(keys), "values": Array.from_numpy(values)}


def is_same(found: Arrays, expected: Arrays) -> bool:
    """Whether two parts are the same, bit for bit."""
    return found.keys() == expected.keys() and all(found[name].data == expected[name].data for name in expected)
