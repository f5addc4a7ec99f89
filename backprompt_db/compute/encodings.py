"""The tokens of strings that are encoded together, remembered: asked for again, they need no tokenizer."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from backprompt_db.catalog.records import EncodingRecord

if TYPE_CHECKING:
    from backprompt_db.compute.healing import TokenizerSource
    from backprompt_db.database.catalogs import ModelMetadata
    from backprompt_db.prompt.segments import Segment

_ENCODINGS = b"backprompt-db/encodings/1\0"


class Encodings:
    """Finds the tokens of the completions of a call: the same strings are asked for again and again."""

    def __init__(self, source: TokenizerSource, model_metadata: ModelMetadata) -> None:
        self._source = source
        self._metadata = model_metadata

    def encode(self, segments: Iterable[Segment]) -> dict[Segment, Sequence[int]]:
        """Return the token ids of segments that have parents.

        Loads the tokenizer only for strings that were not encoded together before.
        """
        segments = list(segments)
        strings = list(dict.fromkeys(segment.string for segment in segments))
        if not strings:
            return {}
        tokenizer_id = self._source.tokenizer_id
        key = _key(tokenizer_id, strings)
        ids = self._recalled(key, strings)
        if ids is None:
            encoded = self._source.tokenizer.encode(segments)
            ids = {segment.string: tuple(encoded[segment]) for segment in segments}
            if self._source.tokenizer_id == tokenizer_id:  # once loaded, it may be another than was recorded
                self._remember(key, [ids[string] for string in strings])
        return {segment: ids[segment.string] for segment in segments}

    def _recalled(self, key: bytes, strings: Sequence[str]) -> dict[str, tuple[int, ...]] | None:
        known = self._metadata.recall(lambda catalog: catalog.encoding(key))
        if known is None or len(known.offsets) != len(strings):
            return None
        spans = itertools.pairwise((0, *known.offsets))
        return {string: known.token_ids[begin:end] for string, (begin, end) in zip(strings, spans, strict=True)}

    def _remember(self, key: bytes, ids: Sequence[Sequence[int]]) -> None:
        ends = itertools.accumulate(map(len, ids))
        self._metadata.save(EncodingRecord(key, tuple(ends), tuple(itertools.chain.from_iterable(ids))))


def _key(tokenizer_id: bytes, strings: Sequence[str]) -> bytes:
    digest = hashlib.sha256(_ENCODINGS + tokenizer_id)
    for string in strings:
        encoded = string.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()
