"""`pin` and `label`: marks that people put on representations."""

from __future__ import annotations

from typing import Annotated

import typer

from backprompt_db.cli.location import DbOption, open_quietly
from backprompt_db.cli.options import (
    AddressOption,
    ContainsOption,
    LabelOption,
    ModelOption,
    NamespaceOption,
    PrefixOption,
    RemoveMarkOption,
    selected,
)
from backprompt_db.cli.output import JsonOption, emit, emit_json
from backprompt_db.views.formatting import plural


def pin(
    *,
    db: DbOption = None,
    address: AddressOption = None,
    text_prefix: PrefixOption = None,
    contains: ContainsOption = None,
    label: LabelOption = None,
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    remove: RemoveMarkOption = False,
    as_json: JsonOption = False,
) -> None:
    """Protect representations, and all that they follow, from eviction. With --remove, stop protecting them."""
    from backprompt_db.operations import annotate

    selection = selected(
        address_prefix=address,
        text_prefix=text_prefix,
        text_contains=contains,
        label=label,
        model=model,
        namespace=namespace,
    )
    with open_quietly(db) as database:
        num_changed = annotate.pin(database, selection, is_pinned=not remove)
    _report(num_changed, "unpinned" if remove else "pinned", as_json=as_json)


def label(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The label.")],
    *,
    db: DbOption = None,
    address: AddressOption = None,
    text_prefix: PrefixOption = None,
    contains: ContainsOption = None,
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    remove: RemoveMarkOption = False,
    as_json: JsonOption = False,
) -> None:
    """Label what the options select, so that other commands can select it by --label. Each has one label at most.

    With --remove, the label NAME is taken off what the options select.
    """
    from backprompt_db.operations import annotate

    if not name:
        raise typer.BadParameter("a label has at least one character.")
    selection = selected(
        address_prefix=address,
        text_prefix=text_prefix,
        text_contains=contains,
        model=model,
        namespace=namespace,
        label=name if remove else None,
    )
    with open_quietly(db) as database:
        num_changed = annotate.label(database, selection, None if remove else name)
    _report(num_changed, "unlabelled" if remove else "labelled", as_json=as_json)


def _report(num_changed: int, what: str, *, as_json: bool) -> None:
    if as_json:
        emit_json({"num_representations": num_changed})
    else:
        emit(f"{plural(num_changed, 'representation')} {what}.")
