"""What is known of models, tokenizers, model files, long strings and prompts."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import Connection, Delete, RowMapping, bindparam, delete, exists, select
from sqlalchemy.dialects.sqlite import insert

from backprompt_db.catalog.connection import CatalogFile
from backprompt_db.catalog.graph import chunks
from backprompt_db.catalog.records import (
    CutsRecord,
    EncodingRecord,
    GenerationRecord,
    GreedyPath,
    Known,
    ModelRecord,
    Source,
    TokenizerRecord,
    are_cuts,
    require_all,
)
from backprompt_db.catalog.schema import (
    Base,
    Cuts,
    EncodingRow,
    GenerationRow,
    GreedyPathRow,
    Model,
    Parent,
    Representation,
    SourceFiles,
    Tokenizer,
)
from backprompt_db.prompt.ids import ID_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from backprompt_db.prompt.ids import Address, TokenizerId, WeightsId

_Record = TypeVar("_Record")

_TABLES: dict[type, type[Base]] = {
    ModelRecord: Model,
    TokenizerRecord: Tokenizer,
    Source: SourceFiles,
    CutsRecord: Cuts,
    EncodingRecord: EncodingRow,
    GreedyPath: GreedyPathRow,
    GenerationRecord: GenerationRow,
}
_MODELS = select(*Model.__table__.columns)
_TOKENIZERS = select(*Tokenizer.__table__.columns).order_by(Tokenizer.name, Tokenizer.tokenizer_id)
_SOURCES = select(*SourceFiles.__table__.columns)
_CUTS = select(Cuts.key, Cuts.offsets, Cuts.signature)
_ENCODINGS = select(*EncodingRow.__table__.columns)
_MAX_TOKEN_ID = 2**32
_LOGPROB_NBYTES = 4
_GENERATIONS = select(*GenerationRow.__table__.columns)
_PATHS = select(GreedyPathRow.address, GreedyPathRow.token_ids, GreedyPathRow.signature)


class Models(CatalogFile):
    """The part of a catalog that remembers what was found out about models, and about prompts under them.

    What comes out has the key that was asked for: in a damaged file, an index may lead to another row.
    """

    def save(self, *records: Known) -> None:
        """Save what is known of something, all records or none, over what was known before."""
        with self.writing() as connection:
            for record in records:
                _replace(connection, _TABLES[type(record)], asdict(record))

    def model(self, weights_id: WeightsId) -> ModelRecord | None:
        """Return one model, `None` if it is unknown.

        A model that was never saved, but has representations, is `"unchecked"` and has the name `""`.
        """
        with self.reading() as connection:
            found = connection.execute(_MODELS.where(Model.weights_id == weights_id)).mappings().one_or_none()
            return _made(ModelRecord, found) if found is not None and found["weights_id"] == weights_id else None

    def models(self) -> list[ModelRecord]:
        """Return all models, by name."""
        with self.reading() as connection:
            found = connection.execute(_MODELS.order_by(Model.name, Model.weights_id)).mappings()
            return [_made(ModelRecord, values) for values in found]

    def tokenizers(self) -> list[TokenizerRecord]:
        """Return all tokenizers, by name; one that was never saved has the name `""`."""
        with self.reading() as connection:
            return [_made(TokenizerRecord, values) for values in connection.execute(_TOKENIZERS).mappings()]

    def definition(self, tokenizer_id: TokenizerId) -> bytes | None:
        """Return a tokenizer's definition as it was saved, unchecked; `None` if none was."""
        found = select(Tokenizer.definition).where(Tokenizer.tokenizer_id == tokenizer_id)
        with self.reading() as connection:
            return connection.execute(found).scalar_one_or_none()

    def has_definition(self, tokenizer_id: TokenizerId) -> bool:
        """Whether a tokenizer's definition was saved, or that it has none."""
        found = exists().where(Tokenizer.tokenizer_id == tokenizer_id, Tokenizer.definition.is_not(None))
        with self.reading() as connection:
            return bool(connection.execute(select(found)).scalar_one())

    def source(self, key: bytes) -> Source | None:
        """Return the ids of unchanged files, `None` if they are unknown."""
        with self.reading() as connection:
            found = connection.execute(_SOURCES.where(SourceFiles.key == key)).mappings().one_or_none()
            return _made(Source, found) if found is not None and found["key"] == key and _has_ids(found) else None

    def cuts(self, key: bytes) -> CutsRecord | None:
        """Return where a long string is cut, `None` if that is unknown."""
        return self.cuts_of([key]).get(key)

    def cuts_of(self, keys: Iterable[bytes]) -> dict[bytes, CutsRecord]:
        """Return where strings are cut, of those for which that is known."""
        with self.reading() as connection:
            found = (connection.execute(_CUTS.where(Cuts.key.in_(some))) for some in chunks(keys))
            return {
                row.key: CutsRecord(row.key, tuple(row.offsets), row.signature)
                for rows in found
                for row in rows
                if row.offsets is not None and are_cuts(row.offsets)
            }

    def encoding(self, key: bytes) -> EncodingRecord | None:
        """Return the tokens of strings that were encoded together, `None` if they are unknown."""
        with self.reading() as connection:
            row = connection.execute(_ENCODINGS.where(EncodingRow.key == key)).mappings().one_or_none()
            if row is None or row["key"] != key or row["offsets"] is None or row["token_ids"] is None:
                return None
            ends, ids = tuple(row["offsets"]), tuple(row["token_ids"])
            is_whole = are_cuts(ends) and ends[-1:] == (len(ids),) and all(0 <= token < _MAX_TOKEN_ID for token in ids)
            return EncodingRecord(key, ends, ids, row["signature"]) if is_whole else None

    def greedy_paths(self, addresses: Iterable[Address]) -> dict[Address, GreedyPath]:
        """Return how models go on after prompts that end with these representations, as far as that is known."""
        with self.reading() as connection:
            found = (connection.execute(_PATHS.where(GreedyPathRow.address.in_(some))) for some in chunks(addresses))
            return {
                row.address: GreedyPath(row.address, tuple(row.token_ids), row.signature)
                for rows in found
                for row in rows
                if row.token_ids is not None and all(0 <= token < _MAX_TOKEN_ID for token in row.token_ids)
            }

    def generations(self, keys: Iterable[bytes]) -> dict[bytes, GenerationRecord]:
        """Return what was generated, of those for which that is known."""
        with self.reading() as connection:
            found = (
                connection.execute(_GENERATIONS.where(GenerationRow.key.in_(some))).mappings() for some in chunks(keys)
            )
            return {
                row["key"]: GenerationRecord(**{**row, "token_ids": tuple(row["token_ids"])})
                for rows in found
                for row in rows
                if _is_whole(row)
            }


def _made(kind: type[_Record], row: RowMapping) -> _Record:
    values = dict(row)
    require_all(kind, values)
    return kind(**values)


def _is_whole(row: RowMapping) -> bool:
    """Whether what is said to have been generated can have been."""
    ids = row["token_ids"]
    return (
        all(value is not None for name, value in row.items() if name != "signature")
        and all(0 <= token < _MAX_TOKEN_ID for token in ids)
        and len(row["token_logprobs"]) == _LOGPROB_NBYTES * len(ids)
        and len(ids) - 1 <= row["num_kept"] <= len(ids)
    )


def _replace(connection: Connection, table: type[Base], values: Mapping[str, object]) -> None:
    """Write one row, over the one with the same primary key if there is one."""
    new = insert(table).values(values)
    key = [column.name for column in table.__table__.primary_key]
    connection.execute(
        new.on_conflict_do_update(index_elements=key, set_={name: new.excluded[name] for name in values})
    )


def _has_ids(source: RowMapping) -> bool:
    return all(len(source[name] or b"") == ID_NBYTES for name in ("weights_id", "tokenizer_id"))


def forget_continuations(connection: Connection, addresses: Iterable[Address]) -> None:
    """Remove the greedy paths of representations, of all that these follow, and of prompts that are not listed.

    The path of a prompt that stays may contain what goes: it was followed as far as it agreed with what was there.
    Generations go likewise, with what they end with.
    """
    for some in chunks(addresses):
        for table in (GreedyPathRow, GenerationRow):
            connection.execute(delete(table).where(table.address.in_(some)))
            connection.execute(_FORGET_BEFORE[table], {"addresses": some})
    for table in (GreedyPathRow, GenerationRow):
        connection.execute(delete(table).where(table.address.not_in(select(Representation.address))))


def _forget_before(table: type[GreedyPathRow] | type[GenerationRow]) -> Delete:
    of = Representation.address.in_(bindparam("addresses", expanding=True))
    reached = select(Representation.segment_id.label("id")).where(of).cte("reached", recursive=True)
    reached = reached.union(select(Parent.parent_id).join(reached, Parent.segment_id == reached.c.id))
    before = select(Representation.address).where(Representation.segment_id.in_(select(reached.c.id)))
    return delete(table).where(table.address.in_(before))


_FORGET_BEFORE = {table: _forget_before(table) for table in (GreedyPathRow, GenerationRow)}
