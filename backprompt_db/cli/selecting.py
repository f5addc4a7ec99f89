"""The options that select representations, of all commands that work on some of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from backprompt_db.cli.options import duration_seconds, size_nbytes

if TYPE_CHECKING:
    from backprompt_db.catalog import Selection

PrefixOption = Annotated[
    str | None, typer.Option("--text-prefix", metavar="TEXT", help="Prompts that begin with this, from where it ends.")
]
ContainsOption = Annotated[
    str | None, typer.Option("--contains", metavar="TEXT", help="Segments whose own text contains this.")
]
GrepOption = Annotated[
    str | None,
    typer.Option("--grep", metavar="TEXT", help="Segments whose own text contains this, whatever the case of letters."),
]
AddressOption = Annotated[
    str | None, typer.Option("--address", metavar="DIGITS", help="The first hex digits of an address.")
]
LabelOption = Annotated[str | None, typer.Option("--label", metavar="LABEL", help="What has this label.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="A model's name, or 8 digits or more of its weights id.")
]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", metavar="NAME", help="One namespace; '' is the default one.")
]
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
    typer.Option("--larger-than", metavar="SIZE", parser=size_nbytes, help="Of more stored bytes than this: 10MB."),
]
SmallerThanOption = Annotated[
    int | None,
    typer.Option("--smaller-than", metavar="SIZE", parser=size_nbytes, help="Of fewer stored bytes than this."),
]


def selected(
    *,
    used_within: float | None = None,
    older_than: float | None = None,
    larger_than: int | None = None,
    smaller_than: int | None = None,
    **conditions: str | None,
) -> Selection:
    """Return the selection that the options mean; the others are named as the fields of `Selection`."""
    from backprompt_db.catalog import Selection

    now = time.time()
    return Selection(
        used_before=None if older_than is None else now - older_than,
        used_after=None if used_within is None else now - used_within,
        larger_than=larger_than,
        smaller_than=smaller_than,
        **conditions,
    )
