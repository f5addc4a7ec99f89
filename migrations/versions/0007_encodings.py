"""The tokens of strings that were encoded together."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "encodings",
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("offsets", sa.JSON(), nullable=False),
        sa.Column("token_ids", sa.JSON(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_encodings")),
    )


def downgrade() -> None:
    op.drop_table("encodings")
