"""Options that several commands share, each with one help text, and how lengths of time and sizes are given."""

from __future__ import annotations

import re
import time
from typing import Annotated

import typer

from backprompt_db.catalog.records import Selection

_NUMBER = re.compile(r"(\d{1,18})(?:\.(\d{1,18}))?\s*([a-z]*)", re.ASCII | re.IGNORECASE)
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31536000}
_NBYTES = {"": 1, "b": 1}
_NBYTES |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", start=1)}
_NBYTES |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)}


def duration_seconds(duration: str) -> float:
    """Return the seconds in a length of time, which is a number with its unit.

    >>> duration_seconds("90s"), duration_seconds("90min"), duration_seconds("1.5 h"), duration_seconds("30d")
    (90.0, 5400.0, 5400.0, 2592000.0)
    """
    found = _NUMBER.fullmatch(duration.strip())
    if found is None or found[3].lower() not in _SECONDS:
        raise typer.BadParameter(f"{duration!r} is not a length of time, such as 30s, 90min, 12h, 30d, 2w or 1y.")
    return float(f"{found[1]}.{found[2] or 0}") * _SECONDS[found[3].lower()]


def size_nbytes(size: str) -> int:
    """Return the bytes in a size: a plain number is bytes, GB is 10^9 bytes, GiB is 2^30.

    >>> size_nbytes("4096"), size_nbytes("50GB"), size_nbytes("1.5 KiB"), size_nbytes("8 GiB")
    (4096, 50000000000, 1536, 8589934592)
    """
    found = _NUMBER.fullmatch(size.strip())
    if found is None or found[3].lower() not in _NBYTES:
        raise typer.BadParameter(f"{size!r} is not a size, such as 4096 (bytes), 300MB, 50GB or 8GiB.")
    whole, fraction = found[1], found[2] or ""
    # In whole numbers: a float would round sizes beyond 2^53.
    return int(whole + fraction) * _NBYTES[found[3].lower()] // int("1" + "0" * len(fraction))


PrefixOption = Annotated[
    str | None, typer.Option("--text-prefix", metavar="TEXT", help="Prompts that begin with this, from where it ends.")
]
ContainsOption = Annotated[
    str | None, typer.Option("--contains", metavar="TEXT", help="Segments whose own text contains this.")
]
GrepOption = Annotated[
    str | None,
    typer.Option("--grep", metavar="TEXT", help="Segments whose own text contains this, in lower or upper case."),
]
AddressOption = Annotated[
    str | None, typer.Option("--address", metavar="DIGITS", help="The first hex digits of an address.")
]
LabelOption = Annotated[str | None, typer.Option("--label", metavar="LABEL", help="Representations with this label.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="A model's name, or at least 8 digits of its weights id.")
]
_namespace = typer.Option("--namespace", metavar="NAME", help="One namespace; '' is the default one.")
NamespaceOption = Annotated[str | None, _namespace]
RunNamespaceOption = Annotated[str, _namespace]
"""The namespace that prompts are run in, which is the default one if none is given."""

UsedWithinOption = Annotated[
    float | None,
    typer.Option(
        "--used-within", metavar="DURATION", parser=duration_seconds, help="Last used, or made, within this: 12h, 30d."
    ),
]
OlderThanOption = Annotated[
    float | None,
    typer.Option("--older-than", metavar="DURATION", parser=duration_seconds, help="Not used for longer than this."),
]
LargerThanOption = Annotated[
    int | None,
    typer.Option("--larger-than", metavar="SIZE", parser=size_nbytes, help="Stored in more bytes than this: 10MB."),
]
SmallerThanOption = Annotated[
    int | None,
    typer.Option("--smaller-than", metavar="SIZE", parser=size_nbytes, help="Stored in fewer bytes than this."),
]

LOADED_MODEL = "A causal language model's name or directory."
"""What names a model that a command loads; `ModelOption` names one that the database knows."""

DTYPE = "The dtype to use the model in, if not its own."

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what this would do, and do nothing.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Do it although something is overwritten or removed.")]
RemoveMarkOption = Annotated[bool, typer.Option("--remove", help="Take the mark off instead.")]

LIMIT = "Take no more than N of them."


def selected(
    *,
    used_within: float | None = None,
    older_than: float | None = None,
    larger_than: int | None = None,
    smaller_than: int | None = None,
    **conditions: str | None,
) -> Selection:
    """Return what the options select together; `conditions` have the names of the fields of `Selection`."""
    now = time.time()
    return Selection(
        used_before=None if older_than is None else now - older_than,
        used_after=None if used_within is None else now - used_within,
        larger_than=larger_than,
        smaller_than=smaller_than,
        **conditions,
    )
