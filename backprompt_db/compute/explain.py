"""Explaining what a run would find and compute, also for a model that only the catalog knows.

Nothing is computed, written or counted; torch is not needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from backprompt_db.catalog.records import Selection
from backprompt_db.compute import plan
from backprompt_db.compute.call import Addresses
from backprompt_db.compute.healing import Healed, Healer
from backprompt_db.compute.inference.loading import locate, source_key
from backprompt_db.compute.misses import MissingSegment, Records
from backprompt_db.compute.tokens import SegmentTokenizer
from backprompt_db.database.vocabulary import open_tokenizer
from backprompt_db.errors import PromptError
from backprompt_db.prompt.explanation import Explanation, Place, SegmentExplanation
from backprompt_db.prompt.ids import ModelIds, TokenizerId, namespace_id
from backprompt_db.prompt.representation import Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.prompt.text import Text

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import ModelRecord
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.database.database import Database
    from backprompt_db.prompt.explanation import Miss


logger = logging.getLogger(__name__)

_TOKENIZER_FILE = "tokenizer.json"
_MIN_DIGITS = 8
_NUM_DIGITS = 12
_NUM_SAMPLES = 20

_Number = TypeVar("_Number", int, float)

_Found = dict[Segment, dict[Part, tuple[Place, int]]]
"""Where the parts of each segment are, and how many bytes they have."""


def explain_run(db: Database, source: ModelSource, healed: Healed) -> Explanation:
    """Explain what running a text on a model would do, as `explain` does. Loads the tokenizer, not the model.

    Waits until what is queued is written: the catalog does not know of it before.
    """
    ids = source.ids
    db.wait_until_written()
    explanation = explain(db, ids, healed, tokenizer=source.tokenizer)
    if explanation.dtype is not None or not source.is_loaded:
        return replace(explanation, model_name=explanation.model_name or source.name)
    return replace(explanation, model_name=source.name, dtype=source.runner.dtype)


def explain_recorded(
    db: Database, ids: ModelIds, text: Text, *, namespace: str, tokenizer: SegmentTokenizer | None
) -> Explanation:
    """Explain what running a text on a model that is not here would do, as `explain` does.

    Without a tokenizer, a text that was never run is explained in the pieces in which it was written.
    """
    try:
        (healed,) = Healer(_Recorded(ids.tokenizer_id, tokenizer), db.model_metadata).heal([text], namespace=namespace)
    except _NoTokenizer:
        healed = Healed.as_written(text, namespace=namespace)
    return explain(db, ids, healed, tokenizer=tokenizer)


class _NoTokenizer(Exception):
    """The tokenizer of a model is not known."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A tokenizer, if it is known, and its id."""

    tokenizer_id: TokenizerId
    known_tokenizer: SegmentTokenizer | None

    @property
    def tokenizer(self) -> SegmentTokenizer:
        if self.known_tokenizer is None:
            raise _NoTokenizer
        return self.known_tokenizer


def explain(db: Database, ids: ModelIds, healed: Healed, *, tokenizer: SegmentTokenizer | None) -> Explanation:
    """Explain what running a text would find, and what it would compute and why.

    Without a tokenizer, seams and the tokens of segments that were never computed stay unknown. Raises `InvalidText`
    for a segment that has no tokens.
    """
    segments = healed.segments
    addresses, records = Addresses(ids), Records(db, ids, segments)
    found = _look(db, addresses, segments)
    misses = _misses(addresses, found, records)
    num_tokens = _num_tokens(segments, records, tokenizer)
    seconds = _seconds(segments, records, num_tokens)
    written = healed.text.segments(segments[0].namespace)
    numbers = {segment: number for number, segment in enumerate(segments)}
    model = records.model(ids.weights_id)
    cached, missing = [each for each in segments if each not in misses], list(misses)

    def explained(segment: Segment) -> SegmentExplanation:
        return SegmentExplanation(
            text=segment.string,
            parents=tuple(numbers[parent] for parent in segment.parents),
            start=segment.start,
            segment_id=segment.id,
            address=addresses.address(segment),
            places={part: place for part, (place, _) in found[segment].items()},
            nbytes={part: nbytes for part, (_, nbytes) in found[segment].items()},
            num_tokens=num_tokens[segment],
            seconds=seconds[segment],
            miss=misses.get(segment),
        )

    return Explanation(
        model_name=(model.name or None) if model else None,
        dtype=(model.dtype or None) if model else None,
        weights_id=ids.weights_id,
        tokenizer_id=ids.tokenizer_id,
        namespace=segments[0].namespace,
        segments=tuple(map(explained, segments)),
        seams=None if tokenizer is None else tuple(tokenizer.seams(written)),
        is_healed=written != segments,
        num_cached_tokens=_sum(num_tokens[segment] for segment in cached),
        num_missing_tokens=_sum(num_tokens[segment] for segment in missing),
        nbytes=sum(nbytes for parts in found.values() for _, nbytes in parts.values()),
        saved_seconds=_sum(seconds[segment] for segment in cached),
        needed_seconds=_sum(seconds[segment] for segment in missing),
    )


def _look(db: Database, addresses: Addresses, segments: Iterable[Segment]) -> _Found:
    """Look for all parts. Keys and values that lie in a buffer of an earlier pass are in memory."""
    buffered = {address for buffer in db.memory.grouped() for address, _ in buffer.contents}
    found: _Found = {}
    for segment in segments:
        looked = {part: db.look(addresses.key(segment, part)) for part in Part}
        found[segment] = {part: where for part, where in looked.items() if where is not None}
        if Part.KV in found[segment] and addresses.address(segment) in buffered:
            found[segment][Part.KV] = Place.MEMORY, found[segment][Part.KV][1]
    return found


def _misses(addresses: Addresses, found: _Found, records: Records) -> Mapping[Segment, Miss]:
    """Return the segments that a run would compute, and why each of them is missing."""

    def is_stored(segment: Segment, part: Part) -> bool:
        return part in found[segment]

    missing = plan.missing_parts(dict.fromkeys(found, frozenset({Part.SCORES})), is_stored=is_stored)
    return records.misses(
        [
            MissingSegment(segment, addresses.address(segment), _in_order(parts), frozenset(found[segment]))
            for segment, parts in missing.items()
        ]
    )


def _in_order(parts: Iterable[Part]) -> tuple[Part, ...]:
    return tuple(sorted(parts, key=list(Part).index))


def _num_tokens(
    segments: Sequence[Segment], records: Records, tokenizer: SegmentTokenizer | None
) -> dict[Segment, int | None]:
    rows = {segment: row for segment in segments if (row := records.row(segment)) is not None}
    unknown = [segment for segment in segments if segment not in rows]
    encoded = {} if tokenizer is None else tokenizer.encode(unknown)
    counted = {segment: len(ids) for segment, ids in encoded.items()} | {
        segment: row.num_tokens for segment, row in rows.items()
    }
    return {segment: counted.get(segment) for segment in segments}


def _seconds(
    segments: Sequence[Segment], records: Records, num_tokens: Mapping[Segment, int | None]
) -> dict[Segment, float | None]:
    """Return the seconds that computing each segment took, or would take at the recorded rate."""
    rate = records.seconds_per_token()
    seconds: dict[Segment, float | None] = {}
    for segment in segments:
        row, count = records.row(segment), num_tokens[segment]
        estimated = None if rate is None or count is None else rate * count
        seconds[segment] = estimated if row is None else row.compute_seconds
    return seconds


def _sum(numbers: Iterable[_Number | None]) -> _Number | None:
    """Return the sum of numbers, None if one of them is unknown."""
    total: _Number = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total


def recorded_ids(db: Database, catalog: Catalog, model: str | None) -> ModelIds:
    """Return the ids of the model that a user means: by a name, a directory, or 8 digits or more of a weights id.

    `None` means the only model that has representations. The tokenizer is the one that the model was used with last.
    Raises `PromptError` where no model is meant, or several are.
    """
    key = None if model is None else source_key(model, {})
    source = None if key is None else db.model_metadata.recall(lambda catalog: catalog.source(key))
    if source is not None:
        return ModelIds(source.weights_id, source.tokenizer_id)
    used = catalog.totals_by_model()
    records = [record for record in catalog.models() if record.weights_id in used and _is_meant(record, model)]
    if len(records) != 1:
        raise _not_one(records, model)
    (newest,) = catalog.rows(limit=1, selection=Selection(model=records[0].weights_id.hex()))
    return ModelIds(newest.weights_id, newest.tokenizer_id)


def _is_meant(record: ModelRecord, model: str | None) -> bool:
    by_digits = model is not None and len(model) >= _MIN_DIGITS and record.weights_id.hex().startswith(model.lower())
    return model in (None, record.name) or by_digits


def _not_one(records: Sequence[ModelRecord], model: str | None) -> PromptError:
    if not records:
        what = "any model" if model is None else f"the model {model!r}"
        return PromptError(
            f"nothing is stored of {what}", hint="`backprompt-db ls --models` lists names and weights ids."
        )
    listed = ", ".join(
        f"{record.weights_id.hex()[:_NUM_DIGITS]} ({record.name or '?'}, {record.dtype or '?'})" for record in records
    )
    return PromptError(f"there are several models: {listed}", hint="Give the digits of one of them as --model.")


def recorded_tokenizer(catalog: Catalog, ids: ModelIds, model: str | None) -> SegmentTokenizer | None:
    """Return the tokenizer of a model out of the catalog, else out of the file beside its weights; None without both.

    The tokenizer in the file must give the newest stored segments of the model as many tokens as were recorded.
    """
    try:
        kept = open_tokenizer(catalog, ids.tokenizer_id)
        if kept is not None:
            return SegmentTokenizer(RecordedTokenizer(kept))
        return None if model is None else _in_file(catalog, ids, model)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises nothing more specific
        logger.info("the tokenizer of %s cannot be used: %s", model, error)
        return None


def _in_file(catalog: Catalog, ids: ModelIds, model: str) -> SegmentTokenizer | None:
    from tokenizers import Tokenizer

    directory = locate(model, {})
    if directory is None or not (directory / _TOKENIZER_FILE).is_file():
        return None
    tokenizer = SegmentTokenizer(RecordedTokenizer(Tokenizer.from_file(str(directory / _TOKENIZER_FILE))))
    return tokenizer if _agrees(tokenizer, catalog, ids) else None


def _agrees(tokenizer: SegmentTokenizer, catalog: Catalog, ids: ModelIds) -> bool:
    """Whether a tokenizer gives the newest stored segments of a model as many tokens as were recorded."""
    rows = catalog.rows(limit=_NUM_SAMPLES, selection=Selection(model=ids.weights_id.hex()))
    for row in rows:
        is_first = set(catalog.parents(row.segment_id)) <= {namespace_id(row.namespace)}
        before = () if is_first else tuple(Text("something").segments())
        segment = Segment(row.segment_id, row.text, before, row.start, row.namespace)
        if row.tokenizer_id == ids.tokenizer_id and len(tokenizer.encode([segment])[segment]) != row.num_tokens:
            return False
    return bool(rows)


class _Encoded(dict[str, Any]):
    """The encoding of a string, as transformers gives it."""

    def __init__(self, encoding: Encoding) -> None:
        super().__init__(input_ids=list(encoding.ids), offset_mapping=encoding.offsets)
        self._encoding = encoding

    def word_ids(self) -> list[int | None]:
        """Return the number of the word that each token belongs to."""
        return list(self._encoding.word_ids)


class RecordedTokenizer:
    """A tokenizer of the `tokenizers` library as `SegmentTokenizer` takes it: transformers would import torch."""

    is_fast = True
    special_tokens_map: ClassVar[dict[str, str]] = {}

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend_tokenizer = tokenizer
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()

    def __deepcopy__(self, _: object) -> RecordedTokenizer:
        return self  # nobody else has it

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size())

    def __call__(self, texts: str | list[str], *, add_special_tokens: bool, **_: Any) -> dict[str, Any]:
        """Return the token ids of a string, with its offsets and words, or the ids of each of several."""
        if isinstance(texts, str):
            return _Encoded(self.backend_tokenizer.encode(texts, add_special_tokens=add_special_tokens))
        encoded = self.backend_tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return {"input_ids": [list(each.ids) for each in encoded]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        """Return the tokens that ids stand for."""
        return [self.backend_tokenizer.id_to_token(each) for each in ids]
