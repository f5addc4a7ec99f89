"""The catalog's schema, made of its declaration when the site is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_PAGE = "formats.md"
_PLACE = "<!-- catalog schema -->"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the schema in its place on its page."""
    return markdown.replace(_PLACE, "\n".join(_tables())) if page.file.src_uri == _PAGE else markdown


def _tables() -> Iterator[str]:
    from backprompt_db.catalog.schema import Base

    for mapper in sorted(Base.registry.mappers, key=lambda mapper: str(mapper.local_table)):
        about = " ".join((mapper.class_.__doc__ or "").split())
        yield f"### {mapper.local_table}\n\n{about}\n\n| column | type | |\n|---|---|---|"
        for column in mapper.local_table.columns:
            yield f"| `{column.name}` | {column.type} | {', '.join(_facts(column))} |"
        yield ""


def _facts(column: Any) -> Iterator[str]:
    if column.primary_key:
        yield "primary key"
    for key in column.foreign_keys:
        yield f"in `{key.target_fullname}`"
    if column.index:
        yield "index"
    if column.nullable:
        yield "may be null"
