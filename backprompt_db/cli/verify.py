"""`verify` and `reindex`: finding what is wrong in a database, and making its catalog agree with its store."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from backprompt_db.cli.location import DbOption, open_quietly
from backprompt_db.cli.options import DTYPE, LOADED_MODEL
from backprompt_db.cli.output import JsonOption, emit, emit_json, json_value, progress_bar
from backprompt_db.views.console import literal
from backprompt_db.views.formatting import plural, size

if TYPE_CHECKING:
    from backprompt_db.database.database import Database
    from backprompt_db.database.reconcile import Reindexing
    from backprompt_db.operations.inspection import Problem
    from backprompt_db.operations.recompute import Recomputation
    from backprompt_db.operations.verify import Checks, Verification


_Each = TypeVar("_Each")


def share(percentage: str) -> float:
    """Return the share that a percentage stands for.

    >>> share("1%"), share("0.5 %")
    (0.01, 0.005)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", percentage)
    part = float(found[1]) / 100 if found else 0.0
    if not 0 < part <= 1:
        raise typer.BadParameter(f"{percentage!r} is not a percentage above 0% and up to 100%, such as 1% or 0.1%.")
    return part


def _of_recompute(*names: str, help: str, **settings: Any) -> Any:  # noqa: A002 - typer's own name
    return typer.Option(*names, help=help, rich_help_panel="Options of --recompute", **settings)


_Structure = Annotated[
    bool, typer.Option("--structure", help="Check that records, sizes and the catalog fit together. Reads no data.")
]
_Data = Annotated[bool, typer.Option("--data", help="Read everything: check digests, formats and addresses.")]
_Sample = Annotated[
    float | None,
    typer.Option("--sample", metavar="SHARE", parser=share, help="Do what --data does with a random share, like 1%."),
]
_Recompute = Annotated[
    float | None,
    typer.Option(
        "--recompute",
        metavar="SHARE",
        parser=share,
        help="Run a model again on a share, like 0.1%, and compare.",
    ),
]
_Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", min=0, help="Choose the same sample as a run that printed this seed."),
]
_Model = Annotated[str | None, _of_recompute("--model", metavar="MODEL", help=LOADED_MODEL)]
_Dtype = Annotated[str | None, _of_recompute("--dtype", metavar="NAME", help=DTYPE)]
_MaxError = Annotated[
    float | None,
    _of_recompute("--max-error", metavar="X", min=0, help="The largest error with which values count as the same."),
]
_Remove = Annotated[bool, _of_recompute("--remove", help="Remove the parts that the model computes differently.")]


def verify(
    *,
    db: DbOption = None,
    structure: _Structure = False,
    data: _Data = False,
    sample: _Sample = None,
    seed: _Seed = None,
    recompute: _Recompute = None,
    model: _Model = None,
    dtype: _Dtype = None,
    max_error: _MaxError = None,
    remove: _Remove = False,
    as_json: JsonOption = False,
) -> None:
    """Check what is stored: without options, the structure and all data.

    Parts that cannot be used are removed, and computed again when they are needed. Digests show whether values are
    those that were written; only --recompute shows whether they were right when they were written.

    Exit codes: 0 if nothing is wrong, else the sum of 1 (data), 4 (structure), 8 (the catalog disagrees) and 16 (the
    model gives something else). 2 is an error, as for every command.
    """
    from backprompt_db.operations.verify import Checks, Found

    _refuse_what_does_not_fit(is_double=data and sample is not None, lacks_model=(recompute is None) != (model is None))
    is_default = not (structure or data or sample or recompute)
    checks = Checks(structure=structure or is_default, share=sample or float(data or is_default))
    checks = checks if seed is None else dataclasses.replace(checks, seed=seed)
    with open_quietly(db) as database:
        found = _check(database, checks)
        again = None
        if recompute is not None and model is not None:
            again = _recompute(database, model, dtype=dtype, share=recompute, seed=checks.seed, max_error=max_error)
            for problem in again.problems if remove else ():
                _discard(database, problem)
    code = found.found | (again.found if again is not None else Found.NOTHING)
    if as_json:
        emit_json(json_value(found) | {"seed": checks.seed, "recomputation": json_value(again), "exit_code": int(code)})
    else:
        _print(checks, found, again, is_removed=remove)
    raise typer.Exit(int(code))


def _refuse_what_does_not_fit(*, is_double: bool, lacks_model: bool) -> None:
    if is_double:
        raise typer.BadParameter("--data reads everything, --sample a share of it: give one of them.")
    if lacks_model:
        raise typer.BadParameter("--recompute and --model go together: `ls --models` lists what the database has.")


def _check(database: Database, checks: Checks) -> Verification:
    from backprompt_db.operations.verify import verify as check

    total = sum(1 for _ in database.store.keys()) if sys.stderr.isatty() else 0
    return check(
        database, checks=checks, progress=lambda found: progress_bar(found, "Verifying", total=total * checks.share)
    )


def _recompute(
    database: Database, name: str, *, dtype: str | None, share: float, seed: int, max_error: float | None
) -> Recomputation:
    from backprompt_db.compute.answers import pretrained_recomputer
    from backprompt_db.operations.recompute import recompute

    model = pretrained_recomputer(name, dtype=dtype)
    return recompute(database, model, share=share, seed=seed, max_error=max_error, progress=_recomputing)


def _recomputing(targets: Sequence[_Each]) -> Iterable[_Each]:
    return progress_bar(targets, "Computing", total=len(targets))


def _discard(database: Database, problem: Problem) -> None:
    from backprompt_db.store.contract import Key

    if problem.address is not None and problem.part is not None:
        database.discard(Key(problem.address, problem.part))


def _print(checks: Checks, found: Verification, again: Recomputation | None, *, is_removed: bool) -> None:
    lines = [_line(problem) for problem in (*found.problems, *(again.problems if again else ()))]
    lines += [problem for problem in (found.store_problem, found.catalog_problem) if problem is not None]
    lines += [
        f"changed: {plural(number, 'row')} of {table} in the catalog" for table, number in found.changed_rows.items()
    ]
    emit(*map(literal, lines), wrap=False)
    if checks.share:
        emit(f"{plural(found.num_parts, 'part')} read, {size(found.nbytes)}: {_verdict(found)}.")
    elif checks.structure:
        emit(f"The structure was checked: {_verdict(found)}.")
    if again is not None:
        _print_recomputation(again, is_removed=is_removed)
    if 0 < checks.share < 1 or again is not None:
        emit(f"The same is chosen with --seed {checks.seed}.")
    if not found.is_clean:
        emit("What was lost is computed again when it is asked for. Run `backprompt-db reindex` to mend the catalog.")


def _verdict(found: Verification) -> str:
    return "no problems" if found.is_clean else f"{len(found.problems):,} with problems"


def _print_recomputation(again: Recomputation, *, is_removed: bool) -> None:
    errors = ", ".join(f"{part.name.lower()} {error:.1e}" for part, error in again.max_errors.items())
    emit(
        f"{plural(again.num_representations, 'representation')} computed again,"
        f" {plural(again.num_parts, 'part')} compared: "
        f"{len(again.problems) or 'none'} of them different. Largest errors, where {again.tolerance:g} is allowed: "
        f"{errors or 'none'}."
    )
    if again.num_left_out:
        emit(f"{again.num_left_out:,} left out: the text before them is not stored any more.")
    if again.problems:
        what = "They were removed" if is_removed else "With --remove they are removed"
        emit(f"{what} and computed again. What was computed from them may be wrong too: check 100% next.")


def _line(problem: Problem) -> str:
    if problem.address is None or problem.part is None:
        return f"{problem.kind.value}: {problem.detail}"
    return f"{problem.kind.value}: {problem.part.name.lower()} of {problem.address.hex()}: {problem.detail}"


def reindex(*, db: DbOption = None, as_json: JsonOption = False) -> None:
    """Make the catalog agree with the store: add what is missing there, remove what is no longer stored.

    Hits, pins and labels of what stays are kept. A damaged catalog is moved aside and built again.
    """
    from backprompt_db.operations.reindex import reindex as rebuild

    with open_quietly(db) as database:
        done = rebuild(database)
    if as_json:
        emit_json(done)
    else:
        _print_reindexing(done)


def _print_reindexing(done: Reindexing) -> None:
    if done.moved_aside is not None:
        emit(literal(f"The damaged catalog is now {done.moved_aside}."), wrap=False)
    emit(f"{plural(done.num_added, 'part')} added, {done.num_forgotten:,} forgotten.")
    if done.num_unreadable:
        emit(
            f"{plural(done.num_unreadable, 'part')} cannot be used; `backprompt-db verify` tells why and removes them."
        )
    if done.num_changed_rows:
        emit(f"{plural(done.num_changed_rows, 'changed row')} forgotten: what they said is found out again.")
