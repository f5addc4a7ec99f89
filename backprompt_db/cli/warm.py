"""`warm`: compute and store what many prompts need, or say what that would take."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backprompt_db.cli.location import DbOption, directory_of, quietly
from backprompt_db.cli.options import DTYPE, LIMIT, LOADED_MODEL, DryRunOption, RunNamespaceOption
from backprompt_db.cli.output import JsonOption, emit, emit_json, json_value
from backprompt_db.cli.prompts import Prompts, template_of, unescaped
from backprompt_db.cli.rows import Form, num_lines, rows
from backprompt_db.errors import ModelMismatch, PromptError
from backprompt_db.views.console import literal
from backprompt_db.views.formatting import duration, plural

if TYPE_CHECKING:
    from backprompt_db.cli.rows import Place
    from backprompt_db.compute.batch.run_plan import RunPlan, Warmed
    from backprompt_db.database.database import Database
    from backprompt_db.model import LanguageModel
    from backprompt_db.prompt.text import Text

_LEFT_OUT, _INTERRUPTED = 1, 130
_NUM_SHOWN = 20


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that was left out, and why."""

    file: str
    line: int
    problem: str

    @classmethod
    def at(cls, place: Place, problem: str) -> LeftOut:
        """Return what is left out at a place."""
        return cls(place.file, place.line, problem)


_Model = Annotated[str, typer.Argument(metavar="MODEL", help=LOADED_MODEL)]
_Files = Annotated[
    list[Path],
    typer.Argument(metavar="FILE", readable=False, help="JSON lines, CSV, TSV, or a prompt on each line; - is stdin."),
]
_Template = Annotated[
    list[str] | None,
    typer.Option("--template", metavar="TEXT", help=r"The prompt: {name} is a column, \n a line break. Repeatable."),
]
_Separator = Annotated[
    str | None, typer.Option("--separator", metavar="TEXT", help="Cut the template here, and nowhere else.")
]
_Completion = Annotated[
    list[str] | None,
    typer.Option("--completion", metavar="TEXT", help="Score this completion after each prompt. Repeatable."),
]
_Completions = Annotated[
    Path | None,
    typer.Option(
        "--completions",
        metavar="FILE",
        readable=False,
        help="A file of completions, in a format that prompts can have.",
    ),
]
_Form = Annotated[
    Form | None,
    typer.Option("--format", metavar="FORM", help="jsonl, csv, tsv or lines, if the files' names do not say it."),
]
_Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="PART", help="Keep this part of prompts: scores, logits or kv. Repeatable."),
]
_Dtype = Annotated[str | None, typer.Option("--dtype", metavar="NAME", help=DTYPE)]
_Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help=LIMIT)]
_BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, help="How many prompts are computed together.")
]
_SkipErrors = Annotated[
    bool, typer.Option("--skip-errors", help="Leave out rows that cannot be used, and exit with 0 all the same.")
]


def warm(
    model: _Model,
    files: _Files,
    *,
    db: DbOption = None,
    template: _Template = None,
    separator: _Separator = None,
    completion: _Completion = None,
    completions: _Completions = None,
    form: _Form = None,
    keep: _Keep = None,
    namespace: RunNamespaceOption = "",
    dtype: _Dtype = None,
    limit: _Limit = None,
    batch_size: _BatchSize = 64,
    skip_errors: _SkipErrors = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    r"""Compute and store what running many prompts needs; with completions, what scoring them after each prompt needs.

    What is stored already is skipped: after Ctrl-C, the same command goes on where it was. --dry-run prints the time,
    memory and bytes that it would take.

    A template is cut into segments before each {column}, with the white space before it, so that prompts share all up
    to the first column in which they differ: put columns that vary least first. Each of several --template is a
    segment as it is. Programs find what is stored when their segments are the same: backprompt_db.Template makes them.
    Without a template, the prompt is the column prompt, completion, text or line, or the only one.

    Exit codes: 1 if rows were left out, unless --skip-errors; 130 after Ctrl-C.
    """
    prompts = Prompts(rows(files, form), template_of(template or [], separator), skip_errors=skip_errors)
    endings = _endings(completion or [], completions)
    options: dict[str, Any] = {"batch_size": batch_size, **({"keep": keep} if keep else {})}
    with quietly(), _opened(db, namespace) as database:
        lm = _loaded(model, database, dtype=dtype)
        texts = islice(prompts, limit)
        if dry_run:
            done: RunPlan | Warmed = lm.plan(texts, endings, **options)
        else:
            done = _run(lm, texts, endings, options, total=_total(files, limit))
    left_out = _left_out(prompts, done)
    _report(done, left_out, num_left_out=prompts.num_broken + done.num_too_long, as_json=as_json)
    raise typer.Exit(_LEFT_OUT if left_out and not skip_errors else 0)


def _opened(db: Path | None, namespace: str) -> Database:
    from backprompt_db.database.opening import open_database

    return open_database(directory_of(db), namespace=namespace)


def _loaded(model: str, database: Database, *, dtype: str | None) -> LanguageModel:
    from backprompt_db.model import LanguageModel

    arguments: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        return LanguageModel.from_pretrained(model, db=database, progress=False, **arguments)
    except (OSError, ValueError, AttributeError) as error:  # what transformers raises for a wrong name, path or dtype
        if isinstance(error, PromptError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelMismatch(
            f"{model} cannot be loaded: {reason}", hint="Give a causal language model's name or path."
        ) from error


def _endings(given: list[str], path: Path | None) -> list[Text] | None:
    """Return the completions to score, None where nothing is to be scored."""
    from backprompt_db.prompt.text import Text

    if not given and path is None:
        return None
    return [Text(unescaped(each)) for each in given] + list(Prompts(rows([path] if path else [], None), None))


def _run(
    lm: LanguageModel,
    texts: Iterable[Text],
    completions: list[Text] | None,
    options: dict[str, Any],
    *,
    total: int | None,
) -> Warmed:
    try:
        with closing(_behind_bar(texts, lm, total=total, step=options["batch_size"])) as shown:
            return lm.warm(shown, completions, **options)
    except KeyboardInterrupt:
        num_tokens = lm.counters.num_computed_tokens
        typer.echo(f"interrupted: {plural(num_tokens, 'token')} computed and stored", err=True)
        typer.echo("hint: Run the same command again: it goes on where it was.", err=True)
        raise typer.Exit(_INTERRUPTED) from None


def _total(files: list[Path], limit: int | None) -> int | None:
    num_prompts = num_lines(files) if sys.stderr.isatty() else None
    return min((each for each in (num_prompts, limit) if each is not None), default=None)


def _behind_bar(
    texts: Iterable[Text], lm: LanguageModel, *, total: int | None, step: int
) -> Generator[Text, None, None]:
    """Yield texts behind a bar with the tokens per second and the time left. `step` texts are run at a time."""
    if not sys.stderr.isatty():
        yield from texts
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    began = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Warming", total=total, rate="")
        for number, text in enumerate(texts):
            rate = lm.counters.num_computed_tokens / (time.monotonic() - began)
            progress.update(task, completed=number // step * step, rate=f"{rate:,.0f} tokens/s")
            yield text


def _left_out(prompts: Prompts, done: RunPlan | Warmed) -> list[LeftOut]:
    """Return the first rows that were left out: first those that are broken, then those that are too long."""
    broken = [LeftOut.at(each.place, each.problem) for each in prompts.broken]
    return broken + [
        LeftOut.at(
            prompts.place_of(each.number),
            f"the prompt needs {each.num_positions:,} positions, the model has {each.max_positions:,}",
        )
        for each in done.too_long
    ]


def _report(done: RunPlan | Warmed, left_out: list[LeftOut], *, num_left_out: int, as_json: bool) -> None:
    from backprompt_db.compute.batch.run_plan import RunPlan

    if as_json:
        emit_json(json_value(done) | {"num_left_out": num_left_out, "left_out": json_value(left_out)})
        return
    emit(done if isinstance(done, RunPlan) else _summary(done))
    for each in left_out[:_NUM_SHOWN]:
        emit(literal(f"left out: {each.file}, line {each.line:,}: {each.problem}"))
    if num_left_out > _NUM_SHOWN:
        emit(f"... and {num_left_out - _NUM_SHOWN:,} more; --json lists a thousand.")


def _summary(done: Warmed) -> str:
    pace = f", {done.tokens_per_second:,.0f} tokens/s" if done.num_computed_tokens else ""
    return (
        f"{plural(done.num_texts, 'prompt')}, {done.num_stored_texts:,} of which were stored already:"
        f" {plural(done.num_computed_tokens, 'token')} computed in {plural(done.num_passes, 'pass')}"
        f" ({duration(done.seconds)}{pace})."
    )
