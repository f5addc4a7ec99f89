"""`init` and `config`: making a database, and changing what may be changed about it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from backprompt_db.cli.location import DbOption, directory_of, named_directory, open_quietly
from backprompt_db.cli.options import ForceOption, duration_seconds, size_nbytes
from backprompt_db.cli.output import JsonOption, emit, emit_json
from backprompt_db.views.console import grid, literal
from backprompt_db.views.formatting import duration, size

if TYPE_CHECKING:
    from backprompt_db.database.config import Config
    from backprompt_db.store.files import Sharing

_Number = TypeVar("_Number", int, float)

_NONE = "none"
_NUM_MEMBERS = 5
"""So many members of a group are named; of the others there is a count."""
_SHARED_HELP = "Who may use it: private, group[:NAME] or readers[:NAME]."


def _size_or_none(given: str) -> int:
    return 0 if given == _NONE else _positive(size_nbytes(given), given)


def _duration_or_none(given: str) -> float:
    return 0.0 if given == _NONE else _positive(duration_seconds(given), given)


def _positive(number: _Number, given: str) -> _Number:
    """Return a number that was given. From here on 0 stands for `none`, so a 0 that was given is refused."""
    if not number:
        raise typer.BadParameter(f"{given!r} leaves nothing: give more, or none for no limit.")
    return number


MaxSizeOption = Annotated[
    int | None,
    typer.Option(
        "--max-size", metavar="SIZE", parser=_size_or_none, help="The largest size of the database: 50GB; or none."
    ),
]
TimeToLiveOption = Annotated[
    float | None,
    typer.Option(
        "--ttl",
        metavar="DURATION",
        parser=_duration_or_none,
        help="Remove what is not used for longer than this: 30d; or none.",
    ),
]


def init(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", parser=named_directory, help="A new or an empty directory.")
    ],
    *,
    shared: Annotated[str, typer.Option("--shared", metavar="WITH", help=_SHARED_HELP)] = "private",
    max_size: MaxSizeOption = None,
    ttl: TimeToLiveOption = None,
    fidelity: Annotated[
        str, typer.Option("--fidelity", metavar="NAME", help="How keys and values are kept: exact, bfloat16 or int8.")
    ] = "exact",
) -> None:
    """Make a database: for yourself, for a group that reads and writes, or for a group that reads.

    Its files get their permissions whatever the umask. Without --max-size, its limit is 50 GB, or a quarter of the free
    space if that is less. With BACKPROMPT_DB_SECRET set, or BACKPROMPT_DB_SECRET_FILE, every part is authenticated.
    """
    from backprompt_db.codec.fidelity import Fidelity
    from backprompt_db.database.creating import create_database
    from backprompt_db.database.manifest import read_manifest
    from backprompt_db.errors import UnsafeLocation

    sharing, group = _parse_shared(shared)
    if fidelity not in tuple(Fidelity):
        raise typer.BadParameter(f"there is no fidelity {fidelity!r}: give exact, bfloat16 or int8.")
    place = directory_of(directory)
    if read_manifest(place) is not None:
        raise UnsafeLocation(f"there is a database in {place}", hint="`backprompt-db config` changes it.")
    limits = _limits(max_size, ttl)
    create_database(place, sharing=sharing, group=group, fidelity=Fidelity(fidelity), limits=limits)
    with open_quietly(place) as database:
        _ = database.catalog  # made now, so that other commands find one
    emit(literal(f"Made {place}: {sharing.value}."), literal(_who(place, sharing)), wrap=False)
    config(db=directory)


def config(
    *,
    db: DbOption = None,
    max_size: MaxSizeOption = None,
    ttl: TimeToLiveOption = None,
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace", metavar="DURATION", parser=duration_seconds, help="Evict what is younger than this last: 10s."
        ),
    ] = None,
    high_water: Annotated[
        float | None,
        typer.Option("--high-water", metavar="SHARE", help="Start to make room above this share of the limit."),
    ] = None,
    low_water: Annotated[
        float | None,
        typer.Option("--low-water", metavar="SHARE", help="Make room until this share of the limit is reached."),
    ] = None,
    shared: Annotated[str | None, typer.Option("--shared", metavar="WITH", help=_SHARED_HELP)] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what may be changed about a database, and change what is given. Processes that have it open follow.

    A --max-size below what is in use is refused without --force: the next writer would remove the rest. --shared gives
    all files the permissions that it asks for; only their owner, or root, may do that.
    """
    from backprompt_db.database.config import write_config

    directory = directory_of(db)
    given = {"grace_seconds": grace, "high_water": high_water, "low_water": low_water}
    changes = _limits(max_size, ttl) | {name: value for name, value in given.items() if value is not None}
    found = _known(directory, is_written_anew=bool(changes))
    if not force:
        _require_room(directory, dataclasses.replace(found, **changes), before=found)
    if shared is not None:
        changes["sharing"] = _share(directory, shared)
    if changes:
        found = dataclasses.replace(found, **changes)
        write_config(directory, found)
    if as_json:
        emit_json(found)
    else:
        if shared is not None:
            emit(literal(_who(directory, found.sharing)), wrap=False)
        emit(grid(_facts(found)))


def _limits(max_size: int | None, ttl: float | None) -> dict[str, Any]:
    """Return the limits that were given, under their names in a configuration, where `none` is None."""
    given = {"max_nbytes": max_size, "ttl_seconds": ttl}
    return {name: value or None for name, value in given.items() if value is not None}


def _require_room(directory: Path, limits: Config, *, before: Config) -> None:
    """Raise `BadParameter` for a new limit for which the next writer would remove something, or nobody knows.

    Raises what mends it where this user may not look.
    """
    from backprompt_db.database.config import sharing_of
    from backprompt_db.database.location import access_problem
    from backprompt_db.operations.disk_usage import room_of

    if limits.max_nbytes is None or limits.max_nbytes == before.max_nbytes:
        return
    room = room_of(directory)
    if room.live_nbytes is None:
        if (problem := access_problem(directory, sharing_of(directory), readonly=True)) is not None:
            raise problem
        raise typer.BadParameter(
            f"it cannot be told whether something must be removed: {room.store_problem}. Give --force to set it anyway."
        )
    most_nbytes = int(limits.high_water * limits.max_nbytes)
    if room.live_nbytes > most_nbytes:
        raise typer.BadParameter(
            f"{size(room.live_nbytes)} are in use, and the next writer would remove what goes beyond"
            f" {size(most_nbytes)}: give a larger --max-size, or --force; `evict --dry-run` shows what goes first."
        )


def _known(directory: Path, *, is_written_anew: bool) -> Config:
    """Return the configuration of a database. If it cannot be read, but is written anew, return the default one."""
    from backprompt_db.database.config import default_config, read_config
    from backprompt_db.database.opening import manifest_of
    from backprompt_db.errors import FormatError

    manifest_of(directory)
    try:
        return read_config(directory)
    except FormatError:
        if not is_written_anew:
            raise
        return default_config(directory)


def _parse_shared(shared: str) -> tuple[Sharing, str | None]:
    from backprompt_db.store.files import Sharing

    way, _, group = shared.partition(":")
    if way not in tuple(Sharing) or (group and way == Sharing.PRIVATE):
        raise typer.BadParameter(f"{shared!r} is not private, group, group:NAME, readers or readers:NAME.")
    return Sharing(way), group or None


def _share(directory: Path, shared: str) -> Sharing:
    from backprompt_db.operations.doctor_checks import share

    sharing, group = _parse_shared(shared)
    share(directory, sharing, group=group)
    return sharing


def _who(directory: Path, sharing: Sharing) -> str:
    """Return a sentence about who can read and write a database."""
    from backprompt_db.store.files import Sharing
    from backprompt_db.system.platform import group_members, group_name, user_name

    status = directory.stat()
    owner, members = user_name(status.st_uid), _listed(group_members(status.st_gid))
    group = f"the members of the group {group_name(status.st_gid)} ({members})"
    if sharing is Sharing.PRIVATE:
        return f"Only {owner} can read and write it."
    if sharing is Sharing.GROUP:
        return f"{owner} and {group} can read and write it."
    return f"{owner} can read and write it, and {group} can read it."


def _listed(names: list[str]) -> str:
    if len(names) > _NUM_MEMBERS:
        return f"{', '.join(names[:_NUM_MEMBERS])} and {len(names) - _NUM_MEMBERS:,} more"
    return ", ".join(names) or "none are listed"


def _facts(found: Config) -> dict[str, str]:
    return {
        "shared": found.sharing.value,
        "max size": "no limit" if found.max_nbytes is None else size(found.max_nbytes),
        "room is made": f"above {found.high_water:.0%} of it, until {found.low_water:.0%}",
        "time to live": "for ever" if found.ttl_seconds is None else duration(found.ttl_seconds),
        "grace": duration(found.grace_seconds),
    }
