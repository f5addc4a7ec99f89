"""`tree`: the graph of a prompt, or the prompt trees of the whole database."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from backprompt_db.cli.explain import explanation_of, text_of
from backprompt_db.cli.location import DbOption, directory_of, quietly
from backprompt_db.cli.output import JsonOption, emit, emit_json
from backprompt_db.cli.selecting import LabelOption, ModelOption, NamespaceOption, selected
from backprompt_db.errors import PromptError
from backprompt_db.pictures.picture import MIN_ROWS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from backprompt_db.catalog import Selection
    from backprompt_db.pictures.picture import Picture

_NUM_ROWS = 40


class By(enum.Enum):
    """What the trees of a database are measured in."""

    TOKENS = "tokens"
    BYTES = "bytes"
    SECONDS = "seconds"
    RECENCY = "recency"


class _Answer(NamedTuple):
    for_people: RenderableType
    for_programs: object
    picture: Picture


def tree(
    pieces: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT | --file FILE | -", help="The pieces of a prompt; - is stdin."),
    ] = None,
    *,
    db: DbOption = None,
    by: Annotated[
        By | None, typer.Option("--by", help="Tokens, bytes, seconds saved, or how recently used: 1 for now.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", metavar="N", min=0, help="Show no more than so many branchings.")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=MIN_ROWS, help="Show no more than so many representations.")
    ] = _NUM_ROWS,
    namespace: NamespaceOption = None,
    model: ModelOption = None,
    label: LabelOption = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="A piece that is the content of a UTF-8 file.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write a picture to this file, too.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw a prompt, with what is stored of it and what is missing; without one, all that the database holds.

    A prompt is given as to explain. Of a database those representations are shown that hold most together with all
    that follow them, and it is said where how many are hidden. Nothing is computed, and no model is loaded.
    """
    del file  # it is among the pieces
    directory = directory_of(db)
    if pieces and (by, depth, label) != (None, None, None):
        raise PromptError("--by, --depth and --label are about the whole database", hint="Leave them out, or the text.")
    if pieces:
        answer = _prompt(directory, pieces, model=model, namespace=namespace or "", limit=limit)
    else:
        selection = selected(namespace=namespace, model=model, label=label)
        answer = _database(directory, selection, by=by or By.TOKENS, depth=depth, limit=limit)
    if svg is not None:
        _save(answer.picture, svg, max_rows=limit)
    if as_json:
        emit_json(answer.for_programs)
    else:
        emit(answer.for_people)


def _prompt(directory: Path, pieces: list[str], *, model: str | None, namespace: str, limit: int) -> _Answer:
    from backprompt_db.pictures.subjects import picture_explanation
    from backprompt_db.pictures.terminal import terminal_view

    with quietly():
        explanation = explanation_of(directory, text_of(pieces), model=model, namespace=namespace)
    picture = picture_explanation(explanation)
    return _Answer(terminal_view(picture, max_rows=limit), picture, picture)


def _database(directory: Path, selection: Selection, *, by: By, depth: int | None, limit: int) -> _Answer:
    from backprompt_db.cli.forest_views import forest_fields, forest_picture, forest_table
    from backprompt_db.maintenance.existing import open_catalog
    from backprompt_db.maintenance.forest import Measure, forest
    from backprompt_db.maintenance.pruning import prune

    with open_catalog(directory) as catalog:
        trees, measure = forest(catalog, selection=selection), Measure(by.value)
    pruned = prune(trees, trees.weights(measure), limit=limit, max_depth=depth)
    shown = trees, pruned, measure
    return _Answer(forest_table(*shown), forest_fields(*shown), forest_picture(*shown))


def _save(picture: Picture, path: Path, *, max_rows: int) -> None:
    try:
        picture.save(path, max_rows=max_rows)
    except OSError as error:
        raise PromptError(f"{path} cannot be written: {error.strerror}", hint="Give another file.") from error
