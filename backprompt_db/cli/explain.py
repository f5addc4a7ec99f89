"""`explain`: where the segments of a prompt are stored, or why they are not."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backprompt_db.cli.help import Command
from backprompt_db.cli.location import DbOption, directory_of, quietly
from backprompt_db.cli.options import ModelOption, RunNamespaceOption
from backprompt_db.cli.output import JsonOption, emit, emit_json
from backprompt_db.errors import InvalidText, PromptError

if TYPE_CHECKING:
    from backprompt_db.prompt.explanation import Explanation
    from backprompt_db.prompt.text import Text

_FILE = "\0"
"""Marks a piece that is the name of a file. No argument of a process can contain this character."""

_STDIN = "-"

FileOption = Annotated[
    Path | None,
    typer.Option("--file", metavar="FILE", readable=False, help="A piece that is the content of a UTF-8 file."),
]


class PiecesCommand(Command):
    """A command that takes `--file FILE` among its texts, and keeps them in the order in which they were given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the files among the texts, in the order of the command line."""
        return super().parse_args(ctx, list(_in_order(args)))


def _in_order(arguments: Iterable[str]) -> Iterator[str]:
    remaining = iter(arguments)
    for argument in remaining:
        option, has_value, value = argument.partition("=")
        if argument == "--":
            yield argument
            yield from remaining
        elif option == "--file":
            name = value if has_value else next(remaining, None)
            yield argument if name is None else _FILE + name
        else:
            yield argument


def explain(
    pieces: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT | --file FILE | -", help="The pieces of a prompt; - is stdin."),
    ] = None,
    *,
    db: DbOption = None,
    model: ModelOption = None,
    file: FileOption = None,
    namespace: RunNamespaceOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show where each segment of a prompt would be found, or why it would have to be computed.

    The pieces are run as their joined string, as in a concatenation. Nothing is computed, and no model is loaded.
    --model says which one is meant where the database has several; it may also be a directory. Where the catalog does
    not have the tokenizer, what was never computed has a number of tokens only if MODEL is a directory, or a name whose
    files are on this machine, with a tokenizer.json.
    """
    del file  # it is among the pieces
    text = text_of(pieces or [])
    with quietly():
        explanation = explanation_of(directory_of(db), text, model=model, namespace=namespace)
    if as_json:
        emit_json(explanation)
        return
    emit(explanation)
    if explanation.seams is None:
        emit("Give --model a directory with a tokenizer.json to see them.")


def text_of(pieces: Iterable[str]) -> Text:
    """Return the text of pieces: strings, files and stdin. Raises `PromptError` for an empty text."""
    from backprompt_db.prompt.text import Text

    text = Text("")
    for piece in pieces:
        text += _content(piece)
    if not text:
        raise PromptError("the prompt is empty", hint="Give at least one character.")
    return text


def _content(piece: str) -> str:
    if piece == _STDIN:
        return _decoded(sys.stdin.buffer.read(), "stdin")
    if not piece.startswith(_FILE):
        return piece
    path = Path(piece.removeprefix(_FILE))
    try:
        return _decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}", hint="Give another file.") from error


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InvalidText(
            f"{name} is not UTF-8: {error.reason}", hint="Convert it, for instance with iconv."
        ) from error


def explanation_of(directory: Path, text: Text, *, model: str | None, namespace: str) -> Explanation:
    """Explain a text by the database in `directory`, for a model that it knows."""
    from backprompt_db.compute.explain import explain_recorded, recorded_ids, recorded_tokenizer
    from backprompt_db.database.opening import READ, manifest_of, open_catalog, open_database

    manifest_of(directory)
    with open_catalog(directory) as catalog, open_database(directory, mode=READ, memory_nbytes=0) as database:
        ids = recorded_ids(database, catalog, model)
        tokenizer = recorded_tokenizer(catalog, ids, model)
        return explain_recorded(database, ids, text, namespace=namespace, tokenizer=tokenizer)
