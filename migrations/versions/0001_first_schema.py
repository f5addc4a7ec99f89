"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_INDEXES = (("parents", "parent_id"), ("representations", "segment_id"), ("representations", "created_at"))


def upgrade() -> None:
    _create_models()
    _create_segments()
    _create_representations()
    _create_memos()
    for table, column in _INDEXES:
        op.create_index(op.f(f"ix_{table}_{column}"), table, [column])


def _create_models() -> None:
    op.create_table(
        "models",
        sa.Column("weights_id", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("architecture", sa.String(), nullable=False),
        sa.Column("dtype", sa.String(), nullable=False),
        sa.Column("num_layers", sa.Integer(), nullable=False),
        sa.Column("num_kv_heads", sa.Integer(), nullable=False),
        sa.Column("head_dim", sa.Integer(), nullable=False),
        sa.Column("vocab_size", sa.Integer(), nullable=False),
        sa.Column("max_positions", sa.Integer(), nullable=True),
        sa.Column("verdict", sa.String(), nullable=False),
        sa.Column("mask_form", sa.String(), nullable=True),
        sa.Column("max_error", sa.Float(), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("checked_with", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("weights_id", name=op.f("pk_models")),
        sa.CheckConstraint("verdict IN ('packs', 'chains', 'refused', 'unchecked')", name=op.f("ck_models_verdict")),
    )
    op.create_table(
        "tokenizers",
        sa.Column("tokenizer_id", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("vocab_size", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("tokenizer_id", name=op.f("pk_tokenizers")),
    )


def _create_segments() -> None:
    op.create_table(
        "segments",
        sa.Column("id", sa.LargeBinary(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("start", sa.Integer(), nullable=True),
        sa.Column("namespace", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_segments")),
    )
    op.create_table(
        "parents",
        sa.Column("segment_id", sa.LargeBinary(), nullable=False),
        sa.Column("parent_id", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("segment_id", "parent_id", name=op.f("pk_parents")),
        sa.ForeignKeyConstraint(
            ["segment_id"], ["segments.id"], name=op.f("fk_parents_segment_id"), ondelete="CASCADE"
        ),
        sqlite_with_rowid=False,
    )


def _create_representations() -> None:
    op.create_table(
        "representations",
        sa.Column("address", sa.LargeBinary(), nullable=False),
        sa.Column("segment_id", sa.LargeBinary(), nullable=False),
        sa.Column("weights_id", sa.LargeBinary(), nullable=False),
        sa.Column("tokenizer_id", sa.LargeBinary(), nullable=False),
        sa.Column("num_tokens", sa.Integer(), nullable=False),
        sa.Column("scores_nbytes", sa.Integer(), nullable=True),
        sa.Column("logits_nbytes", sa.Integer(), nullable=True),
        sa.Column("kv_nbytes", sa.Integer(), nullable=True),
        sa.Column("compute_seconds", sa.Float(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("last_used_at", sa.Float(), nullable=True),
        sa.Column("num_hits", sa.Integer(), nullable=False),
        sa.Column("is_pinned", sa.Boolean(), nullable=False),
        sa.Column("label", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("address", name=op.f("pk_representations")),
        sa.ForeignKeyConstraint(["segment_id"], ["segments.id"], name=op.f("fk_representations_segment_id")),
        sa.ForeignKeyConstraint(["weights_id"], ["models.weights_id"], name=op.f("fk_representations_weights_id")),
        sa.ForeignKeyConstraint(
            ["tokenizer_id"], ["tokenizers.tokenizer_id"], name=op.f("fk_representations_tokenizer_id")
        ),
    )


def _create_memos() -> None:
    op.create_table(
        "sources",
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("weights_id", sa.LargeBinary(), nullable=False),
        sa.Column("tokenizer_id", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_sources")),
    )
    op.create_table(
        "cuts",
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("offsets", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_cuts")),
    )


def downgrade() -> None:
    for table in ("cuts", "sources", "representations", "parents", "segments", "tokenizers", "models"):
        op.drop_table(table)
