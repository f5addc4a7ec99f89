"""What models have generated after prompts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "generations",
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("address", sa.LargeBinary(), nullable=False),
        sa.Column("string", sa.String(), nullable=False),
        sa.Column("token_ids", sa.JSON(), nullable=False),
        sa.Column("token_logprobs", sa.LargeBinary(), nullable=False),
        sa.Column("num_kept", sa.Integer(), nullable=False),
        sa.Column("is_finished", sa.Boolean(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_generations")),
    )
    op.create_index(op.f("ix_generations_address"), "generations", ["address"])


def downgrade() -> None:
    op.drop_table("generations")
