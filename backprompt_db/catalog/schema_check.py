"""Which revision of the schema a catalog has, and whether all in it is what this library makes, and nothing else.

SQLite runs whatever views and triggers a file brings along, and these may never end. Tables are known by their names:
what is in them is checked when it is read. Everything else is known by its definition.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256

from backprompt_db.errors import CatalogError, CatalogTooNew

HEAD = "0007"
"""The newest revision in `migrations/versions`. Revisions are numbers of four digits; a newer one is greater."""

_REVISION = re.compile("[0-9]{4}")
_VERSION = "alembic_version"

_OBJECTS = "SELECT type, name, sql FROM sqlite_master"
"""The table is SQLite's own: nothing can stand in its place."""

_TABLES = frozenset({
    _VERSION, "models", "tokenizers", "segments", "parents", "representations", "namespaces", "sums", "counts",
    "events", "evictions", "sources", "cuts", "encodings", "greedy_paths", "generations",
    "searchable", "unsearchable", "search_data", "search_idx", "search_config",
})  # fmt: skip
"""The last ones are there once somebody has asked for an index."""

_DIGESTS = {
    "ix_parents_parent_id": "b12d3e5c80b013a7fc082a41f81a66a8c1fd80bcdacf9c773b380f1c0935c720",
    "ix_representations_segment_id": "af4cf65d807ac19e563734404be949d84bf8a3bb076fdf44e697d9344a022a99",
    "ix_representations_created_at": "b7a878acd62057c8c565a4fbed09cfbbd0a5f4dcf54bdcb62db4d4a525e42ca5",
    "ix_evictions_at": "88d6b4a1ee5a557f55aa876475ebdf4bd2feca0b18ae3d7c29cf60a4e76dc5e8",
    "ix_generations_address": "70917d8559c0146ff50c85ac66c12a92c811e4adb1d1deb29e0fe45aafc25fb1",
    "representations_inserted": "1e507bf5db96ec7e5dd804293321e45f10a0e5fc4da3c5b5e25efea98eaff111",
    "representations_updated": "b562f13b19b9428ca9341249454e083da65b47a507594871ddfc226d832611ec",
    "representations_deleted": "5757bfa8e480bbb279543b3e239caec13529cd79143f9b1ca4eeb2ee92dead17",
}
"""SHA-256 of definitions as `_plain` returns them."""

_EARLIER_DIGESTS = {
    "representations_inserted": "639a8e9d77d3f32d4e5f471648ec7370c537c4f258a0367f9c1096c61113bffd",
    "representations_updated": "5c59a5fc49a0c2568d852085504062102fd5d06d14d8de948cd21b4d7bc3ab19",
    "representations_deleted": "fb05504f19cfb5dc6958d2f11e62332e0fa03b600c257612a580c9b27c63c92f",
}
"""Those of triggers before revision 0006."""

_SEARCH_DIGESTS = {
    "search": "199892e9eabb295b0a34b88ddeadf50d9962b29b2fb2cfa5e0410de2c8357402",
    "segments_inserted": "549c144926aeb050b34dcdfd9931dd6655e1c16f42e8ad5f6f3c09056cf56597",
}
"""Those of what is there once somebody has asked for an index."""

_INTERNAL = "sqlite_"
"""How the names begin that SQLite gives to indexes of keys and to its statistics, and to nothing that others make."""

_QUOTES = str.maketrans("", "", "\"'`")
_OWN_CHECK = "check(verdictin(packs,chains,refused,unchecked))"
_COMPUTED = ("as(", "check(", "default(", "/*", "--")
"""What only those tables have that compute something when they are used, or hide that behind a comment."""

_NUM_SHOWN = 3


def revision_of(read: Callable[[str], Iterable[tuple[object, ...]]]) -> str | None:
    """Return the revision of a catalog's schema; None for an empty file. `read` returns what a statement finds.

    Raises `CatalogTooNew` for one that is newer than this code, and `CatalogError` for an SQLite file that is not a
    catalog, and for a schema to which something was added, or that lacks something.
    """
    objects = list(read(_OBJECTS))
    tables = {str(name): definition for kind, name, definition in objects if kind == "table"}
    if not tables:
        return None
    if not _is_own(_VERSION, tables.get(_VERSION)):
        raise CatalogError(
            f"an SQLite file with the tables {', '.join(sorted(tables)[:5])} is not a catalog",
            hint="Give the path of a catalog, or of a file that does not exist yet.",
        )
    found = next(iter(read("SELECT version_num FROM alembic_version")), (None,))[0]
    revision = None if found is None else _known_revision(found)
    _require_own(objects, is_newest=revision == HEAD)
    return revision


def _known_revision(found: object) -> str:
    if not isinstance(found, str) or not _REVISION.fullmatch(found):
        raise CatalogError(
            f"the catalog's schema has no revision {found!r}",
            hint="Run `backprompt-db reindex`: it rebuilds the catalog from the store.",
        )
    if found > HEAD:
        raise CatalogTooNew(
            f"the catalog's schema has revision {found}, and this version knows revisions up to {HEAD}",
            hint="Upgrade backprompt-db; until then the store works without the catalog.",
        )
    return found


def _require_own(objects: Sequence[tuple[object, ...]], *, is_newest: bool) -> None:
    foreign = [
        f"the {kind} {name}" for kind, name, definition in objects if not _is_own(name, definition, is_newest=is_newest)
    ]
    if foreign:
        raise CatalogError(
            f"the catalog's schema has what this library does not make: {', '.join(foreign[:_NUM_SHOWN])}",
            hint="Find out who changed it; `backprompt-db reindex` moves it aside and builds another from the store.",
        )
    names = {name for _, name, _ in objects}
    missing = {*_DIGESTS, *(_SEARCH_DIGESTS if names & {*_SEARCH_DIGESTS} else ())} - names
    if is_newest and missing:
        raise CatalogError(
            f"the catalog's schema lacks {', '.join(sorted(missing)[:_NUM_SHOWN])}",
            hint="Run `backprompt-db reindex`: it moves the catalog aside and builds another from the store.",
        )


def _is_own(name: object, definition: object, *, is_newest: bool = True) -> bool:
    if not isinstance(name, str):
        return False
    if definition is None:  # an index that is part of its table
        return name.startswith(_INTERNAL)
    plain = _plain(str(definition))
    digest = _DIGESTS.get(name) or _SEARCH_DIGESTS.get(name)
    if digest is not None:
        own = {digest} if is_newest else {digest, _EARLIER_DIGESTS.get(name)}
        return sha256(plain.encode(errors="replace")).hexdigest() in own
    # SQLite goes by the definition, whatever kind stands beside it.
    is_known = name in _TABLES or name.startswith(_INTERNAL)
    return is_known and plain.startswith(f"createtable{name}(") and not _computes(plain)


def _plain(definition: str) -> str:
    """Return a definition without what makes no difference: spaces, quotes, upper and lower case."""
    return "".join(definition.split()).translate(_QUOTES).lower()


def _computes(plain: str) -> bool:
    rest = plain.replace(_OWN_CHECK, "")
    return any(word in rest for word in _COMPUTED)
