"""What a model goes on with after a prompt, as far as that was found out."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "greedy_paths",
        sa.Column("address", sa.LargeBinary(), nullable=False),
        sa.Column("token_ids", sa.JSON(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("address", name=op.f("pk_greedy_paths")),
    )


def downgrade() -> None:
    op.drop_table("greedy_paths")
