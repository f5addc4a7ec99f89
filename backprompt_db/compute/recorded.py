"""Which model of a database somebody means, and its tokenizer, without loading either. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from backprompt_db.catalog import Selection
from backprompt_db.compute.names import Names
from backprompt_db.compute.pretrained import locate, source_key
from backprompt_db.compute.tokens import SegmentTokenizer
from backprompt_db.errors import PromptError
from backprompt_db.keys import namespace_id
from backprompt_db.maintenance.vocabulary import open_tokenizer
from backprompt_db.text import Segment, Text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from backprompt_db.catalog import Catalog, ModelRecord
    from backprompt_db.database import Database

logger = logging.getLogger(__name__)

_TOKENIZER_FILE = "tokenizer.json"
_MIN_DIGITS = 8
_NUM_DIGITS = 12
_NUM_SAMPLES = 20


def recorded_names(db: Database, catalog: Catalog, model: str | None) -> Names:
    """Return the ids of the model that is meant: a name, a directory, or 8 digits or more of a weights id.

    Without one it is the only model that has representations. The tokenizer is the one that it was used with last.
    Raises `PromptError` where that is no model, or several.
    """
    key = None if model is None else source_key(model, {})
    source = None if key is None else db.notes.recall(lambda catalog: catalog.source(key))
    if source is not None:
        return Names(source.weights_id, source.tokenizer_id)
    used = catalog.totals_by_model()
    records = [record for record in catalog.models() if record.weights_id in used and _is_meant(record, model)]
    if len(records) != 1:
        raise _not_one(records, model)
    (newest,) = catalog.rows(limit=1, selection=Selection(model=records[0].weights_id.hex()))
    return Names(newest.weights_id, newest.tokenizer_id)


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


def recorded_tokenizer(catalog: Catalog, names: Names, model: str | None) -> SegmentTokenizer | None:
    """Return the tokenizer of a model out of the catalog, else out of the file beside its weights; None without both.

    That in the file must give what was stored of the model last as many tokens as that has.
    """
    try:
        kept = open_tokenizer(catalog, names.tokenizer_id)
        if kept is not None:
            return SegmentTokenizer(RecordedTokenizer(kept))
        return None if model is None else _in_file(catalog, names, model)
    except Exception as error:  # noqa: BLE001 - the library for tokenizers raises no other
        logger.info("the tokenizer of %s cannot be used: %s", model, error)
        return None


def _in_file(catalog: Catalog, names: Names, model: str) -> SegmentTokenizer | None:
    from tokenizers import Tokenizer

    directory = locate(model, {})
    if directory is None or not (directory / _TOKENIZER_FILE).is_file():
        return None
    tokenizer = SegmentTokenizer(RecordedTokenizer(Tokenizer.from_file(str(directory / _TOKENIZER_FILE))))
    return tokenizer if _agrees(tokenizer, catalog, names) else None


def _agrees(tokenizer: SegmentTokenizer, catalog: Catalog, names: Names) -> bool:
    rows = catalog.rows(limit=_NUM_SAMPLES, selection=Selection(model=names.weights_id.hex()))
    for row in rows:
        is_first = set(catalog.parents(row.segment_id)) <= {namespace_id(row.namespace)}
        before = () if is_first else tuple(Text("something").segments())
        segment = Segment(row.segment_id, row.text, before, row.start, row.namespace)
        if row.tokenizer_id == names.tokenizer_id and len(tokenizer.encode([segment])[segment]) != row.num_tokens:
            return False
    return bool(rows)


class RecordedTokenizer:
    """What `SegmentTokenizer` needs of a tokenizer, out of one of `tokenizers`: transformers would import torch."""

    is_fast = True
    special_tokens_map: ClassVar[dict[str, str]] = {}

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend_tokenizer = tokenizer
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size())

    def __call__(self, texts: str | list[str], *, add_special_tokens: bool, **_: Any) -> dict[str, Any]:
        """Return the token ids of a string, or of each of several."""
        strings = [texts] if isinstance(texts, str) else texts
        encoded = self.backend_tokenizer.encode_batch(strings, add_special_tokens=add_special_tokens)
        ids = [list(each.ids) for each in encoded]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        """Return the tokens that ids stand for."""
        return [self.backend_tokenizer.id_to_token(each) for each in ids]
