"""Lineage: segments with all their ancestors, rebuilt from what stored parts say of their origin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from graphlib import TopologicalSorter

from backprompt_db.codec.blob import read_origin
from backprompt_db.prompt.ids import Address, SegmentId, TokenizerId, WeightsId, address, namespace_id
from backprompt_db.prompt.representation import Origin, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.store.contract import Key, Store

Ids = tuple[WeightsId, TokenizerId]
"""The ids of one model and of one tokenizer."""


def origin_of(store: Store, where: Address) -> Origin | None:
    """Return what the representation at an address was computed from; None where no part of it can be used."""
    origins = (read_origin(store, Key(where, part)) for part in Part)
    return next((origin for origin in origins if origin is not None), None)


class Lineage:
    """Segments under one model and tokenizer, rebuilt from a store; each is read once.

    An address follows from what is found under it, so nothing can pass for an ancestor that is not.
    """

    def __init__(self, store: Store, ids: Ids) -> None:
        self.num_tokens: dict[Segment, int] = {}
        """The number of tokens of every segment that was rebuilt."""
        self._store = store
        self._ids = ids
        self._segments: dict[SegmentId, Segment] = {}

    def segment(self, tip: Origin) -> Segment | None:
        """Return the segment that was computed, with all ancestors; None where one of them is not in the store."""
        origins = self._unknown(tip)
        if origins is None:
            return None
        graph = {id_: [parent for parent in _parents(origin) if parent in origins] for id_, origin in origins.items()}
        for segment_id in TopologicalSorter(graph).static_order():
            self._add(segment_id, origins[segment_id])
        return self._segments[tip.segment_id]

    def _unknown(self, tip: Origin) -> dict[SegmentId, Origin] | None:
        origins = dict[SegmentId, Origin]()
        remaining: list[tuple[SegmentId, Origin | None]] = [(tip.segment_id, tip)]
        while remaining:
            segment_id, origin = remaining.pop()
            if segment_id in origins or segment_id in self._segments:
                continue
            origin = origin or origin_of(self._store, address(segment_id, *self._ids))
            if origin is None:
                return None
            origins[segment_id] = origin
            remaining.extend((parent, None) for parent in _parents(origin))
        return origins

    def _add(self, segment_id: SegmentId, origin: Origin) -> None:
        parents = tuple(self._segments[parent] for parent in _parents(origin))
        # A namespace is part of the id only where it is the parent of a first segment; elsewhere anything may stand.
        namespace = origin.namespace if origin.parents else ""
        segment = Segment.after(parents, origin.text, start=origin.start, namespace=namespace)
        self._segments[segment_id] = segment
        self.num_tokens[segment] = origin.num_tokens


def _parents(origin: Origin) -> tuple[SegmentId, ...]:
    """Return the ids of the segments before it; the namespace, a parent of first segments, is left out."""
    root = namespace_id(origin.namespace)
    return () if root is not None and origin.parents == (root,) else origin.parents


Origins = Callable[[Address], Origin | None]
"""A function that returns what the representation at an address was computed from; None where that is not known."""


def closure(origin_of: Origins, wanted: Iterable[Address]) -> Iterator[Address]:
    """Yield the wanted addresses and those of all their ancestors, each once, and each after its ancestors.

    The stored parts are asked and not the catalog: an address follows from what is found under it. Nothing may be
    stored under an address.
    """
    done = set[Address]()
    for each in wanted:
        # Not by recursion: a prompt may have ten thousand segments.
        path = [(each, _following(origin_of, each, done))]
        while path:
            current, before = path[-1]
            if before:
                first = before.pop()
                path.append((first, _following(origin_of, first, done)))
                continue
            path.pop()
            if current not in done:
                done.add(current)
                yield current


def _following(origin_of: Origins, at: Address, done: set[Address]) -> list[Address]:
    """Return the addresses that this one directly follows and that were not yielded yet."""
    origin = None if at in done else origin_of(at)
    return [] if origin is None else [each for each in origin.parent_addresses if each not in done]
