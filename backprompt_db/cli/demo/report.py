"""What the demo prints: a line for each step, the table, and which promises were broken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from backprompt_db.cli.demo.job import CONTENT_FREE, ChoiceResult, JobResult, Task, accuracy, gains
from backprompt_db.cli.demo.plain import PlainResult
from backprompt_db.cli.output import emit
from backprompt_db.views.console import bare_table
from backprompt_db.views.formatting import plural, size

_TOLERANCE = 1e-3
"""Largest difference of a log-probability from that of plain transformers, in nats, summed over a completion."""

_MEASURES = (
    "wall time", "of it scoring", "tokens asked for", "tokens computed", "representations found", "model calls",
    "on disk", "accuracy", "lm.best: wall time", "lm.best: tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """One process on the database, from outside."""

    name: str
    seconds: float
    result: JobResult
    nbytes_on_disk: int


@dataclass(frozen=True, slots=True)
class Choices:
    """The process that only looked for the best endpoints, from outside."""

    seconds: float
    result: ChoiceResult

    def agree_with(self, scores: list[list[float]]) -> bool:
        """Whether the endpoints are those that all scores say, or as good."""
        values = gains(scores)
        chosen = values[np.arange(len(values)), self.result.endpoints]
        return bool(np.allclose(chosen, values.max(axis=1), atol=_TOLERANCE)) and bool(
            np.allclose(chosen, self.result.gains, atol=_TOLERANCE)
        )


@dataclass(frozen=True, slots=True)
class Plain:
    """The process without a database, from outside."""

    seconds: float
    results: list[PlainResult]

    @property
    def start_seconds(self) -> float:
        """What the process needs before it scores: imports, and the model."""
        return self.seconds - sum(result.sampled_seconds for result in self.results)


def say(line: str) -> None:
    """Write one line to stderr: what is being done now."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(line)


def failures(runs: list[Run], choices: Choices, plain: Plain | None) -> list[str]:
    """Return the promises of the demo that were broken; empty when all is well."""
    first, second = (run.result for run in runs)
    promises = {
        "the second process loaded the model": not second.is_model_loaded,
        "the second process imported torch": not second.has_torch,
        "the second process called the model": not second.num_model_calls and not second.num_computed_tokens,
        "the two processes' scores differ": first.scores == second.scores,
        "lm.best found other endpoints than scoring all": choices.agree_with(first.scores),
    }
    if plain is not None:
        promises["the scores of plain transformers differ"] = _difference(first, plain) <= _TOLERANCE
    return [broken for broken, is_kept in promises.items() if not is_kept]


def _difference(ours: JobResult, plain: Plain) -> float:
    """Return the largest difference between our scores and those of both plain ways; NaN counts as infinite."""
    scores = np.asarray(ours.scores)[len(CONTENT_FREE) :]
    pairs = [(scores[: result.num_sampled], np.asarray(result.scores)) for result in plain.results]
    return max(float(np.nan_to_num(np.abs(own - other), nan=np.inf).max()) for own, other in pairs)


def show(task: Task, runs: list[Run], choices: Choices, plain: Plain | None, failed: list[str]) -> None:
    """Print the table and what follows from it to stdout, `failed` to stderr."""
    result = runs[0].result
    emit(
        _table(task, runs, choices, plain), "", _speed(runs, plain), _accuracy(task, result), _agreement(result, plain)
    )
    for line in failed:
        say(f"FAILED: {line}")


def _table(task: Task, runs: list[Run], choices: Choices, plain: Plain | None) -> Table:
    """Return a table with a column for each way to do the job. A row for each would not fit into 80 characters."""
    num_asked = f"{runs[0].result.num_asked_tokens:,}"
    table = bare_table(padding=(0, 2, 0, 0))
    table.add_column(f"{len(task.gold)} requests,\n{len(task.completions)} endpoints", vertical="bottom", no_wrap=True)
    first, second = (_run_cells(run, num_asked, task) for run in runs)
    columns = [[*first, _seconds(choices.seconds), f"{choices.result.num_computed_tokens:,}"], [*second, "-", "-"]]
    columns += [_plain_cells(result, plain.start_seconds, num_asked) for result in plain.results] if plain else []
    for heading, *_ in columns:
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for row in zip(_MEASURES, *(cells for _, *cells in columns), strict=True):
        table.add_row(*row)
    return table


def _run_cells(run: Run, num_asked: str, task: Task) -> list[str]:
    result = run.result
    return [
        run.name.replace(" ", "\n"), _seconds(run.seconds), _seconds(result.scoring_seconds), num_asked,
        f"{result.num_computed_tokens:,}", f"{result.num_hits:,}", f"{result.num_model_calls:,}",
        size(run.nbytes_on_disk), f"{accuracy(result.scores, task.gold, is_calibrated=True):.1%}",
    ]  # fmt: skip


def _plain_cells(result: PlainResult, start_seconds: float, num_asked: str) -> list[str]:
    return [
        f"transformers,\n{result.name},\nextrapolated\nfrom {plural(result.num_sampled, 'request')}",
        _seconds(start_seconds + result.scoring_seconds), _seconds(result.scoring_seconds), num_asked,
        f"{result.num_computed_tokens:,}", "-", f"{result.num_model_calls:,}", "-", "same", "-", "-",
    ]  # fmt: skip


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < 1000 else f"{seconds:,.0f} s"


def _speed(runs: list[Run], plain: Plain | None) -> str:
    first, second = runs
    ratios = [f"{first.seconds / second.seconds:,.0f} times less than the first"]
    for result in plain.results[-1:] if plain else ():  # nobody would compute full prompts again and again
        seconds = (plain.start_seconds if plain else 0.0) + result.scoring_seconds
        ratios.append(f"{seconds / second.seconds:,.0f} times less than transformers with {result.name}")
    return f"The second process took {second.seconds:.1f} s and loaded no model: {', '.join(ratios)}."


def _accuracy(task: Task, result: JobResult) -> str:
    calibrated, raw = (accuracy(result.scores, task.gold, is_calibrated=each) for each in (True, False))
    chance = 1 / len(task.completions)
    return (
        f"Accuracy: {calibrated:.1%} calibrated with {len(CONTENT_FREE)} more requests that say nothing, {raw:.1%} by "
        f"the largest log-probability, {chance:.1%} by chance."
    )


def _agreement(result: JobResult, plain: Plain | None) -> str:
    same = "Both processes' scores are identical bit for bit"
    if plain is None:
        return f"{same}."
    return f"{same}; those of transformers differ by at most {_difference(result, plain):.0e}."
