"""What is known of models, tokenizers, model files and long strings: plain functions on an open transaction."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from sqlalchemy import Connection, exists, select

from backprompt_db.catalog.changes import replace
from backprompt_db.catalog.records import CutsRecord, ModelRecord, Source, TokenizerRecord
from backprompt_db.catalog.tables import Base, Cuts, Model, SourceFiles, Tokenizer

if TYPE_CHECKING:
    from backprompt_db.keys import TokenizerId, WeightsId

_TABLES: dict[type, type[Base]] = {
    ModelRecord: Model,
    TokenizerRecord: Tokenizer,
    Source: SourceFiles,
    CutsRecord: Cuts,
}
_MODELS = select(*Model.__table__.columns)
_TOKENIZERS = select(*Tokenizer.__table__.columns).order_by(Tokenizer.name, Tokenizer.tokenizer_id)
_SOURCES = select(*SourceFiles.__table__.columns)
_CUTS = select(Cuts.key, Cuts.offsets, Cuts.signature)


def save(connection: Connection, record: ModelRecord | TokenizerRecord | Source | CutsRecord) -> None:
    """Write what is known of a model, a tokenizer, a model's files or a long string, over what was known before."""
    replace(connection, _TABLES[type(record)], asdict(record))


def model(connection: Connection, weights_id: WeightsId) -> ModelRecord | None:
    """Return one model, `None` if it is unknown."""
    found = connection.execute(_MODELS.where(Model.weights_id == weights_id)).mappings().one_or_none()
    return None if found is None else ModelRecord(**found)


def models(connection: Connection) -> list[ModelRecord]:
    """Return all models, by name."""
    found = connection.execute(_MODELS.order_by(Model.name, Model.weights_id)).mappings()
    return [ModelRecord(**values) for values in found]


def tokenizers(connection: Connection) -> list[TokenizerRecord]:
    """Return all tokenizers, by name."""
    return [TokenizerRecord(**values) for values in connection.execute(_TOKENIZERS).mappings()]


def definition(connection: Connection, tokenizer_id: TokenizerId) -> bytes | None:
    """Return a tokenizer's definition as it was saved; `None` if none was."""
    found = select(Tokenizer.definition).where(Tokenizer.tokenizer_id == tokenizer_id)
    return connection.execute(found).scalar_one_or_none()


def has_definition(connection: Connection, tokenizer_id: TokenizerId) -> bool:
    """Whether a tokenizer's definition, or that there is none, was saved."""
    found = exists().where(Tokenizer.tokenizer_id == tokenizer_id, Tokenizer.definition.is_not(None))
    return bool(connection.execute(select(found)).scalar_one())


def source(connection: Connection, key: bytes) -> Source | None:
    """Return the ids of unchanged files, `None` if they are unknown."""
    found = connection.execute(_SOURCES.where(SourceFiles.key == key)).mappings().one_or_none()
    return None if found is None else Source(**found)


def cuts(connection: Connection, key: bytes) -> CutsRecord | None:
    """Return where a long string is cut, `None` if that is unknown."""
    found = connection.execute(_CUTS.where(Cuts.key == key)).one_or_none()
    return None if found is None else CutsRecord(found.key, tuple(found.offsets), found.signature)
