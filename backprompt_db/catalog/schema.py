"""The schema of `catalog.sqlite`. A change here needs a revision in `migrations/versions`; a test compares the two."""

from __future__ import annotations

from typing import ClassVar

from sqlalchemy import CheckConstraint, ColumnElement, ForeignKey, Integer, MetaData, func, literal_column, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from backprompt_db.catalog.columns import Blob, Number, Numbers, Real, Words
from backprompt_db.prompt.ids import Address, SegmentId, TokenizerId, WeightsId
from backprompt_db.prompt.representation import Part

_NAMES = {
    "ix": "ix_%(column_0_label)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}
_BLOBS = (Address, SegmentId, WeightsId, TokenizerId, bytes)


class Base(DeclarativeBase):
    """The base class of all tables. Ids are BLOBs; constraints have names, so that later revisions can drop them."""

    metadata = MetaData(naming_convention=_NAMES)
    type_annotation_map: ClassVar = {
        **dict.fromkeys(_BLOBS, Blob()),
        int: Number(),
        float: Real(),
        str: Words(),
        list[int]: Numbers(),
    }


class Model(Base):
    """A model. Its id is the digest of everything about it that changes its numbers."""

    __tablename__ = "models"
    __table_args__ = (CheckConstraint("verdict IN ('packs', 'chains', 'refused', 'unchecked')", name="verdict"),)

    weights_id: Mapped[WeightsId] = mapped_column(primary_key=True)
    name: Mapped[str]
    architecture: Mapped[str]
    dtype: Mapped[str]
    num_layers: Mapped[int]
    num_kv_heads: Mapped[int]
    head_dim: Mapped[int]
    vocab_size: Mapped[int]
    max_positions: Mapped[int | None]
    verdict: Mapped[str]
    mask_form: Mapped[str | None]
    max_error: Mapped[float | None]
    reason: Mapped[str | None]
    checked_with: Mapped[str | None]
    signature: Mapped[bytes | None]


class Tokenizer(Base):
    """A tokenizer. Its id is the digest of everything about it that changes its tokens."""

    __tablename__ = "tokenizers"

    tokenizer_id: Mapped[TokenizerId] = mapped_column(primary_key=True)
    name: Mapped[str]
    kind: Mapped[str]
    vocab_size: Mapped[int]
    definition: Mapped[bytes | None]


class Segment(Base):
    """A piece of text in its place: after its parents, in a namespace."""

    __tablename__ = "segments"

    id: Mapped[SegmentId] = mapped_column(primary_key=True)
    text: Mapped[str]
    start: Mapped[int | None]
    namespace: Mapped[str]


class Parent(Base):
    """One segment directly follows another.

    `parent_id` is not a foreign key: the parent may have been evicted, or may be the synthetic parent that stands for
    a namespace.
    """

    __tablename__ = "parents"
    __table_args__ = ({"sqlite_with_rowid": False},)

    segment_id: Mapped[SegmentId] = mapped_column(ForeignKey("segments.id", ondelete="CASCADE"), primary_key=True)
    parent_id: Mapped[SegmentId] = mapped_column(primary_key=True, index=True)


class Representation(Base):
    """A representation: what it was computed from, which parts are stored, and how it is used.

    The size of a part that is not stored is null.
    """

    __tablename__ = "representations"

    address: Mapped[Address] = mapped_column(primary_key=True)
    segment_id: Mapped[SegmentId] = mapped_column(ForeignKey("segments.id"), index=True)
    weights_id: Mapped[WeightsId] = mapped_column(ForeignKey("models.weights_id"))
    tokenizer_id: Mapped[TokenizerId] = mapped_column(ForeignKey("tokenizers.tokenizer_id"))
    num_tokens: Mapped[int]
    scores_nbytes: Mapped[int | None]
    logits_nbytes: Mapped[int | None]
    kv_nbytes: Mapped[int | None]
    compute_seconds: Mapped[float]
    created_at: Mapped[float] = mapped_column(index=True)
    last_used_at: Mapped[float | None]
    num_hits: Mapped[int]
    is_pinned: Mapped[bool]
    label: Mapped[str | None]
    namespace: Mapped[str] = mapped_column(server_default=text("''"))
    num_kv_children: Mapped[int] = mapped_column(server_default=text("0"))
    """How many following segments have kv under the same model and tokenizer. A trigger keeps it right."""
    continuations_nbytes: Mapped[int | None]


class SourceFiles(Base):
    """The ids of a model and its tokenizer, for model files that have not changed since."""

    __tablename__ = "sources"

    key: Mapped[bytes] = mapped_column(primary_key=True)
    name: Mapped[str]
    weights_id: Mapped[WeightsId]
    tokenizer_id: Mapped[TokenizerId]
    signature: Mapped[bytes | None]


class Cuts(Base):
    """Where a long string is cut into segments."""

    __tablename__ = "cuts"

    key: Mapped[bytes] = mapped_column(primary_key=True)
    offsets: Mapped[list[int]]
    signature: Mapped[bytes | None]


class GreedyPathRow(Base):
    """The likeliest tokens after a prompt, one after the other. The prompt's representation may not be listed yet."""

    __tablename__ = "greedy_paths"

    address: Mapped[Address] = mapped_column(primary_key=True)
    token_ids: Mapped[list[int]]
    signature: Mapped[bytes | None]


class GenerationRow(Base):
    """What a model has generated after a prompt. Its representation may not be listed yet."""

    __tablename__ = "generations"

    key: Mapped[bytes] = mapped_column(primary_key=True)
    address: Mapped[Address] = mapped_column(index=True)
    """The representation that prompt and continuation end with."""
    string: Mapped[str]
    token_ids: Mapped[list[int]]
    token_logprobs: Mapped[bytes]
    """float32, little-endian."""
    num_kept: Mapped[int]
    is_finished: Mapped[bool]
    signature: Mapped[bytes | None]


class Count(Base):
    """How often something happened, over all processes since the catalog was made."""

    __tablename__ = "counts"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]


class EventRow(Base):
    """Something that somebody may want to know about: a failure, a quarantine."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    kind: Mapped[str]
    address: Mapped[Address | None]
    detail: Mapped[str]


class Eviction(Base):
    """When a representation, or a part of it, was evicted the last time."""

    __tablename__ = "evictions"

    address: Mapped[Address] = mapped_column(primary_key=True)
    at: Mapped[float] = mapped_column(index=True)


class Namespace(Base):
    """A namespace with representations, and the number of their segments. Triggers keep it right."""

    __tablename__ = "namespaces"

    name: Mapped[str] = mapped_column(primary_key=True)
    num_segments: Mapped[int]


class Sums(Base):
    """Sums over the representations of one model in one namespace. Triggers keep them right.

    The row is deleted with its last representation, and so are the rounding errors in `saved_seconds`.
    """

    __tablename__ = "sums"

    weights_id: Mapped[WeightsId] = mapped_column(primary_key=True)
    namespace: Mapped[str] = mapped_column(primary_key=True)
    num_representations: Mapped[int]
    num_tokens: Mapped[int]
    scores_nbytes: Mapped[int]
    logits_nbytes: Mapped[int]
    kv_nbytes: Mapped[int]
    num_hits: Mapped[int]
    saved_seconds: Mapped[float]
    continuations_nbytes: Mapped[int] = mapped_column(server_default=text("0"))


NBYTES = {
    Part.SCORES: Representation.scores_nbytes,
    Part.LOGITS: Representation.logits_nbytes,
    Part.KV: Representation.kv_nbytes,
    Part.CONTINUATIONS: Representation.continuations_nbytes,
}
"""The column that holds the size of each part."""

ALL_NBYTES: ColumnElement[int] = sum(
    (func.coalesce(column, 0) for column in NBYTES.values()), start=literal_column("0", Integer)
)
"""The stored bytes of all parts of a representation together."""

USED_AT: ColumnElement[float] = func.coalesce(Representation.last_used_at, Representation.created_at)
"""When a representation was last used, or made if it never was."""
