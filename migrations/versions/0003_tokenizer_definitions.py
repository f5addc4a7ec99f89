"""What a tokenizer is made of, so that tokens can be shown without its files; and room for an index of texts.

The index itself is no part of the schema: it is made when somebody first searches, by an SQLite that can.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tokenizers", sa.Column("definition", sa.LargeBinary(), nullable=True))


def downgrade() -> None:
    op.execute("DROP TRIGGER IF EXISTS segments_inserted")
    for table in ("search", "searchable", "unsearchable"):
        op.execute(f"DROP TABLE IF EXISTS {table}")
    op.drop_column("tokenizers", "definition")
