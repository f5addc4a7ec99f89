"""The directory that a command works on, and opening the database there; `path` prints it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backprompt_db.errors import StoreReadOnly

if TYPE_CHECKING:
    from backprompt_db.database.database import Database


def named_directory(given: str) -> Path:
    """Return a directory that was given. An empty name is refused: it would mean the current directory."""
    if not given:
        raise typer.BadParameter("an empty name is no directory: give one, or . for the current one.")
    return Path(given)


DbOption = Annotated[
    Path | None,
    typer.Option(
        "--db",
        metavar="DIR",
        parser=named_directory,
        help="The database's directory. Without it: $BACKPROMPT_DB, else the user cache directory.",
        show_default=False,
    ),
]


def path(*, db: DbOption = None) -> None:
    """Print the database's directory, even if it does not exist yet."""
    # As bytes: a name that is not valid UTF-8 must be printed as it is.
    typer.echo(os.fsencode(directory_of(db)))


def directory_of(db: Path | None) -> Path:
    """Return the directory to work on, absolute."""
    if db is None:
        from backprompt_db.database.opening import default_location

        db = default_location()
    return db.expanduser().absolute()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Log nothing to the terminal: what the library would log is in the command's own report."""
    logger, silence = logging.getLogger("backprompt_db"), logging.NullHandler()
    logger.addHandler(silence)
    try:
        yield
    finally:
        logger.removeHandler(silence)


@contextlib.contextmanager
def open_quietly(db: Path | None) -> Iterator[Database]:
    """Open an existing database, `quietly`.

    Where nothing may be written because a file is not as it should be, the error says which, as the library would log.
    """
    from backprompt_db.database.config import sharing_of
    from backprompt_db.database.location import access_problem
    from backprompt_db.database.opening import open_existing

    directory = directory_of(db)
    with quietly(), open_existing(directory) as database:
        try:
            yield database
        except StoreReadOnly as error:
            raise (access_problem(directory, sharing_of(directory), readonly=False) or error) from error
