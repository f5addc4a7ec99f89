"""Runs migrations on the connection that the catalog hands over, or, from the command line, on the file in alembic.ini.

The command line is for writing the next revision: `alembic --config migrations/alembic.ini revision --autogenerate`.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, create_engine

from backprompt_db.catalog.schema import Base


def run(connection: Connection) -> None:
    # SQLite changes a table by copying it, hence batches; its schema changes are part of the transaction.
    context.configure(
        connection=connection, target_metadata=Base.metadata, render_as_batch=True, transactional_ddl=True
    )
    with context.begin_transaction():
        context.run_migrations()


if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    with create_engine(context.config.get_main_option("sqlalchemy.url", "sqlite://")).begin() as opened:
        run(opened)
