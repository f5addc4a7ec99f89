"""What is known of models, tokenizers, model files, long strings and prompts: plain functions on a transaction."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Delete, bindparam, delete, exists, select

from backprompt_db.catalog.changes import replace
from backprompt_db.catalog.graph import chunks
from backprompt_db.catalog.records import CutsRecord, GreedyPath, Known, ModelRecord, Source, TokenizerRecord
from backprompt_db.catalog.schema import (
    Base,
    Cuts,
    GreedyPathRow,
    Model,
    Parent,
    Representation,
    SourceFiles,
    Tokenizer,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from backprompt_db.prompt.ids import Address, TokenizerId, WeightsId

_TABLES: dict[type, type[Base]] = {
    ModelRecord: Model,
    TokenizerRecord: Tokenizer,
    Source: SourceFiles,
    CutsRecord: Cuts,
    GreedyPath: GreedyPathRow,
}
_MODELS = select(*Model.__table__.columns)
_TOKENIZERS = select(*Tokenizer.__table__.columns).order_by(Tokenizer.name, Tokenizer.tokenizer_id)
_SOURCES = select(*SourceFiles.__table__.columns)
_CUTS = select(Cuts.key, Cuts.offsets, Cuts.signature)
_MAX_TOKEN_ID = 2**32
_PATHS = select(GreedyPathRow.address, GreedyPathRow.token_ids, GreedyPathRow.signature)


def save(connection: Connection, record: Known) -> None:
    """Write what is known of something, over what was known of it before."""
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


def greedy_paths(connection: Connection, addresses: Iterable[Address]) -> dict[Address, GreedyPath]:
    """Return how models go on after prompts that end with these representations, as far as that is known."""
    found = (connection.execute(_PATHS.where(GreedyPathRow.address.in_(some))) for some in chunks(addresses))
    return {
        row.address: GreedyPath(row.address, tuple(row.token_ids), row.signature)
        for rows in found
        for row in rows
        if _are_tokens(row.token_ids)
    }


def _are_tokens(found: object) -> bool:
    return isinstance(found, list) and all(type(token) is int and 0 <= token < _MAX_TOKEN_ID for token in found)


def forget_greedy_paths(connection: Connection, addresses: Iterable[Address]) -> None:
    """Remove how models go on after prompts with these in them, and after those of which nothing is listed.

    What goes on from a prompt that stays may be in its path: it was followed as far as it agrees with what was there.
    """
    for some in chunks(addresses):
        connection.execute(delete(GreedyPathRow).where(GreedyPathRow.address.in_(some)))
        connection.execute(_FORGET_BEFORE, {"addresses": some})
    connection.execute(delete(GreedyPathRow).where(GreedyPathRow.address.not_in(select(Representation.address))))


def _forget_before() -> Delete:
    of = Representation.address.in_(bindparam("addresses", expanding=True))
    reached = select(Representation.segment_id.label("id")).where(of).cte("reached", recursive=True)
    reached = reached.union(select(Parent.parent_id).join(reached, Parent.segment_id == reached.c.id))
    before = select(Representation.address).where(Representation.segment_id.in_(select(reached.c.id)))
    return delete(GreedyPathRow).where(GreedyPathRow.address.in_(before))


_FORGET_BEFORE = _forget_before()
