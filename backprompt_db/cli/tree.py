"""`tree`: a prompt as a graph, or the prompt trees of the whole database, in a terminal, as JSON or as a picture."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from backprompt_db.cli.explain import FileOption, explanation_of, text_of
from backprompt_db.cli.location import DbOption, directory_of, quietly
from backprompt_db.cli.options import LIMIT, LabelOption, ModelOption, NamespaceOption, selected
from backprompt_db.cli.output import JsonOption, emit, emit_json, short_name
from backprompt_db.errors import PromptError
from backprompt_db.operations.forest import Branch, Measure, forest, prune
from backprompt_db.views.console import bare_table, literal
from backprompt_db.views.formatting import age, plural, shortened
from backprompt_db.views.picture import MIN_ROWS, NUM_ROWS, Picture
from backprompt_db.views.scene import PicturedSegment, State, Unit
from backprompt_db.views.terminal import share_bar, terminal_view
from backprompt_db.views.wording import amount

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.text import Text

    from backprompt_db.catalog.records import Selection
    from backprompt_db.operations.forest import Forest, Hidden, Node, PrunedForest


_NUM_TEXT_CHARACTERS = 120
_NUM_DIGITS = 8
_UNITS = {Measure.TOKENS: Unit.TOKENS, Measure.NBYTES: Unit.BYTES, Measure.SAVED_SECONDS: Unit.SECONDS}
_NOUN = "representation"


_Pieces = Annotated[
    list[str] | None,
    typer.Argument(metavar="TEXT | --file FILE | -", help="The pieces of a prompt; - is stdin."),
]
_By = Annotated[
    Measure | None,
    typer.Option("--by", metavar="MEASURE", help="tokens, bytes, seconds (saved), or recency (of use: 1 for now)."),
]
_Depth = Annotated[int | None, typer.Option("--depth", metavar="N", min=0, help="Follow at most N branchings.")]
_Limit = Annotated[int, typer.Option("--limit", metavar="N", min=MIN_ROWS, help=LIMIT)]
_Svg = Annotated[
    Path | None, typer.Option("--svg", metavar="FILE", readable=False, help="Write a picture to this file, too.")
]


class _Answer(NamedTuple):
    for_people: RenderableType
    for_programs: object
    picture: Picture


def tree(
    pieces: _Pieces = None,
    *,
    db: DbOption = None,
    by: _By = None,
    depth: _Depth = None,
    limit: _Limit = NUM_ROWS,
    namespace: NamespaceOption = None,
    model: ModelOption = None,
    label: LabelOption = None,
    file: FileOption = None,
    svg: _Svg = None,
    as_json: JsonOption = False,
) -> None:
    """Draw a prompt, with what is stored of it and what is missing; without one, all that the database holds.

    The prompt is given as for explain. Of a database, the representations are shown that, together with all that
    follows them, hold the most; the others are counted where they are hidden. Nothing is computed, and no model is
    loaded.
    """
    del file  # it is among the pieces
    directory = directory_of(db)
    if pieces and (by, depth, label) != (None, None, None):
        raise PromptError("--by, --depth and --label are about the whole database", hint="Leave them out, or the text.")
    if pieces:
        answer = _prompt(directory, pieces, model=model, namespace=namespace or "", limit=limit)
    else:
        selection = selected(namespace=namespace, model=model, label=label)
        answer = _database(directory, selection, by=by or Measure.TOKENS, depth=depth, limit=limit)
    if svg is not None:
        _save(answer.picture, svg, max_rows=limit)
    if as_json:
        emit_json(answer.for_programs)
    else:
        emit(answer.for_people)


def _prompt(directory: Path, pieces: list[str], *, model: str | None, namespace: str, limit: int) -> _Answer:
    from backprompt_db.prompt.pictures import picture_explanation

    with quietly():
        explanation = explanation_of(directory, text_of(pieces), model=model, namespace=namespace)
    picture = picture_explanation(explanation)
    return _Answer(terminal_view(picture, max_rows=limit), picture, picture)


def _database(directory: Path, selection: Selection, *, by: Measure, depth: int | None, limit: int) -> _Answer:
    from backprompt_db.database.opening import open_catalog

    with open_catalog(directory) as catalog:
        trees = forest(catalog, selection=selection)
    shown = trees, prune(trees, trees.weights(by), limit=limit, max_depth=depth), by
    return _Answer(forest_table(*shown), forest_fields(*shown), forest_picture(*shown))


def _save(picture: Picture, path: Path, *, max_rows: int) -> None:
    try:
        picture.save(path, max_rows=max_rows)
    except OSError as error:
        raise PromptError(f"{path} cannot be written: {error.strerror}", hint="Give another file.") from error


class _Line(NamedTuple):
    """One line of the table: a node, or how much is hidden in its place."""

    content: Branch | Hidden
    guides: str
    below: str
    """The guides of what follows it."""
    begin: float
    """Where its share of the whole begins: within that of its parent."""


def forest_table(forest: Forest, pruned: PrunedForest, measure: Measure) -> Group:
    """Return what rich prints: trees whose lines have bars, each within that of its parent."""
    from rich.console import Group

    table, now = bare_table(expand=True), time.time()
    table.add_column("prompt", ratio=3, no_wrap=True, overflow="ellipsis")
    table.add_column("", ratio=2, min_width=8)
    for name in (measure.value, "own", "hits", "used"):
        table.add_column(name, no_wrap=True, justify="right")
    places = _places(forest)
    for line in _lines(pruned):
        content = line.content
        share = share_bar(pruned.total, line.begin, line.begin + content.total, state=_state(content))
        if isinstance(content, Branch):
            node = forest.nodes[content.node]
            own, hits, used = _amount(content.weight, measure), f"{node.num_hits:,}", age(node.used_at, now=now)
            table.add_row(
                _title(line, node, place=places[content.node]), share, _amount(content.total, measure), own, hits, used
            )
        else:
            hidden = f"{line.guides}… {content.num_nodes:,} more"
            table.add_row(literal(hidden), share, _amount(content.total, measure), style="dim")
    if not forest.nodes:
        return Group("The catalog lists no representations.")
    return Group(table, "", _summary(forest, pruned, measure))


def _state(content: Branch | Hidden) -> State:
    return State.STORED if isinstance(content, Branch) else State.UNKNOWN


def _places(forest: Forest) -> list[str]:
    """Return the namespace and model of each node without parents, where there are several; `""` for other nodes."""
    has_several = len({node.namespace for node in forest.nodes}) > 1, len({n.weights_id for n in forest.nodes}) > 1
    return ["" if node.parents else ", ".join(itertools.compress(_place(node), has_several)) for node in forest.nodes]


def _place(node: Node) -> tuple[str, str]:
    model = short_name(node.model_name)
    return node.namespace or "no namespace", f"{model} {node.weights_id.hex()[:_NUM_DIGITS]}"


def _title(line: _Line, node: Node, *, place: str) -> Text:
    """Return a node's line: guides, place, label, parents that the tree cannot show, and text."""
    num_parents = len(node.parents) + node.num_absent_parents
    absent = f", {node.num_absent_parents:,} absent" if node.num_absent_parents else ""
    parents = f"({plural(num_parents, 'parent')}{absent}) " if num_parents > 1 or absent else ""
    label = f"[{node.label}] " if node.label else ""
    where = f"{place}: " if place else ""
    return literal(f"{line.guides}{where}{label}{parents}{shortened(node.text, num_characters=_NUM_TEXT_CHARACTERS)}")


def _amount(weight: float, measure: Measure) -> str:
    """Return a weight in few characters: the column's heading names the unit."""
    if measure is Measure.RECENCY:
        return f"{weight:,.2f}"
    return f"{weight:,}" if measure is Measure.TOKENS else amount(weight, _UNITS[measure])


def _summary(forest: Forest, pruned: PrunedForest, measure: Measure) -> str:
    """Return how much there is. A sum of how recently things were used would mean nothing."""
    parts = [plural(len(forest.nodes), _NOUN)]
    if measure is not Measure.RECENCY:
        parts.append(amount(pruned.total, _UNITS[measure]) + " saved" * (measure is Measure.SAVED_SECONDS))
    return ", ".join(parts)


def _lines(pruned: PrunedForest) -> Iterator[_Line]:
    """Yield the lines from top to bottom. An only child stands below its parent without indentation."""
    stack = _entries(pruned.roots, pruned.hidden, below="", begin=0, are_roots=True)[::-1]
    while stack:
        line = stack.pop()
        yield line
        if isinstance(line.content, Branch):
            branch, begin = line.content, line.begin + line.content.weight
            stack += _entries(branch.children, branch.hidden, below=line.below, begin=begin)[::-1]


def _entries(
    branches: Sequence[Branch], hidden: Hidden, *, below: str, begin: float, are_roots: bool = False
) -> list[_Line]:
    contents: list[Branch | Hidden] = [*branches, *([hidden] if hidden.num_nodes else [])]
    is_flat = are_roots or len(contents) == 1
    lines = []
    for number, content in enumerate(contents, start=1):
        own, further = ("", "") if is_flat else ("└─ ", "   ") if number == len(contents) else ("├─ ", "│  ")
        lines.append(_Line(content, below + own, below + further, begin))
        begin += content.total
    return lines


def forest_fields(forest: Forest, pruned: PrunedForest, measure: Measure) -> dict[str, Any]:
    """Return what --json prints: the nodes that are shown, each followed by those below it."""
    return {
        "by": measure.value,
        "num_representations": len(forest.nodes),
        "total": pruned.total,
        "nodes": [_node_fields(forest, branch) for branch in pruned.branches()],
        "hidden": pruned.hidden,
    }


def _node_fields(forest: Forest, branch: Branch) -> dict[str, Any]:
    node = forest.nodes[branch.node]
    return {
        "address": node.address,
        "segment_id": node.segment_id,
        "weights_id": node.weights_id,
        "model_name": node.model_name,
        "namespace": node.namespace,
        "text": node.text,
        "parents": [forest.nodes[parent].address for parent in node.parents],
        "num_absent_parents": node.num_absent_parents,
        "depth": branch.depth,
        "total": branch.total,
        "own": branch.weight,
        "num_tokens": node.num_tokens,
        "nbytes": node.nbytes,
        "num_hits": node.num_hits,
        "saved_seconds": node.saved_seconds,
        "used_at": node.used_at,
        "is_pinned": node.is_pinned,
        "label": node.label,
        "hidden": branch.hidden,
    }


def forest_picture(forest: Forest, pruned: PrunedForest, measure: Measure) -> Picture:
    """Return a picture of the nodes that are shown. For recency it is in tokens: recency cannot be summed up."""
    shown = _parents_first(forest, [branch.node for branch in pruned.branches()])
    measure = Measure.TOKENS if measure is Measure.RECENCY else measure
    weights, numbers = forest.weights(measure), {node: number for number, node in enumerate(shown)}
    num_hidden = len(forest.nodes) - len(shown)
    return Picture(
        segments=tuple(_pictured(forest.nodes[each], weights[each], numbers) for each in shown),
        unit=_UNITS[measure],
        remarks=(f"{num_hidden:,} of {plural(len(forest.nodes), _NOUN)} are not shown",) if num_hidden else (),
    )


def _parents_first(forest: Forest, nodes: Sequence[int]) -> list[int]:
    """Return nodes in their order, but parents before children."""
    wanted, done = frozenset(nodes), dict[int, None]()
    for each in nodes:
        stack = [each]
        while stack:
            waiting = [parent for parent in forest.nodes[stack[-1]].parents if parent in wanted and parent not in done]
            if waiting:
                stack += waiting
            else:
                done[stack.pop()] = None
    return list(done)


def _pictured(node: Node, weight: float, numbers: Mapping[int, int]) -> PicturedSegment:
    return PicturedSegment(
        text=node.text,
        parents=tuple(numbers[parent] for parent in node.parents if parent in numbers),
        state=State.STORED,
        size=weight,
        num_tokens=node.num_tokens,
        nbytes=sum(node.nbytes.values()),
        seconds=node.compute_seconds,
    )
