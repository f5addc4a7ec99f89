"""`graph`: an HTML page with the prompt trees of a database."""

from __future__ import annotations

import contextlib
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backprompt_db.cli.location import DbOption, directory_of
from backprompt_db.cli.options import (
    LIMIT,
    ContainsOption,
    LabelOption,
    ModelOption,
    NamespaceOption,
    OlderThanOption,
    PrefixOption,
    UsedWithinOption,
    selected,
)
from backprompt_db.cli.output import JsonOption, emit, emit_json, progress_bar
from backprompt_db.errors import StoreError
from backprompt_db.views.console import literal
from backprompt_db.views.formatting import plural, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from backprompt_db.catalog.records import Selection


def graph(
    *,
    db: DbOption = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", readable=False, help="The page to write. An older one is replaced.")
    ],
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    max_text: Annotated[
        int, typer.Option("--max-text", metavar="N", min=1, help="Characters of each text, from its beginning.")
    ] = 2_000,
    no_tokens: Annotated[bool, typer.Option("--no-tokens", help="Leave out log-probabilities of tokens.")] = False,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help=LIMIT)] = 100_000,
    text_prefix: PrefixOption = None,
    contains: ContainsOption = None,
    label: LabelOption = None,
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    used_within: UsedWithinOption = None,
    older_than: OlderThanOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write an HTML page that shows the newest prompts as a tree, or those that all given options select.

    It is one file that needs no network: zoom by clicks, keys and wheel, search all texts, and look at a segment's
    text, the log-probabilities of its tokens, its facts, parents and children. The width of a segment stands for
    tokens, bytes, seconds saved or last use. Whoever has the page has the texts.
    """
    selection = selected(
        text_prefix=text_prefix,
        text_contains=contains,
        label=label,
        model=model,
        namespace=namespace,
        used_within=used_within,
        older_than=older_than,
    )
    directory, out = directory_of(db), out.expanduser().absolute()
    contents = _contents(directory, selection, max_text=max_text, limit=limit, with_tokens=not no_tokens)
    _write(out, contents, title=f"Prompts in {directory.name}")
    _report(out, num_segments=len(contents["nodes"]["texts"]), as_json=as_json)
    if show:
        webbrowser.open(out.as_uri())


def _contents(directory: Path, selection: Selection, *, max_text: int, limit: int, with_tokens: bool) -> dict[str, Any]:
    from backprompt_db.database.opening import open_catalog, open_store
    from backprompt_db.operations.forest import forest
    from backprompt_db.operations.graph_page import affordable_text, page_contents, read_token_scores

    tokens = None
    with open_catalog(directory) as catalog:
        found = forest(catalog, selection=selection, limit=limit)
        max_text = affordable_text(found, max_text)
        if with_tokens and found.nodes:
            with contextlib.closing(open_store(directory)) as store:
                tokens = read_token_scores(store, catalog, found, max_text=max_text, watch=_watched)
    return page_contents(found, tokens, max_text=max_text)


def _watched(indexes: Sequence[int]) -> Iterable[int]:
    return progress_bar(indexes, "Reading log-probabilities", total=len(indexes))


def _write(out: Path, contents: dict[str, Any], *, title: str) -> None:
    from backprompt_db.system.files import replace_file
    from backprompt_db.views.page import html_page

    try:
        replace_file(out, html_page(contents, title=title))
    except OSError as error:
        raise StoreError(f"{out} cannot be written: {error.strerror}", hint="Give another file with --out.") from error


def _report(out: Path, *, num_segments: int, as_json: bool) -> None:
    nbytes = out.stat().st_size
    if as_json:
        emit_json({"file": out, "num_segments": num_segments, "nbytes": nbytes})
    else:
        emit(literal(f"{plural(num_segments, 'segment')}, {size(nbytes)}: {out.as_uri()}"), wrap=False)
