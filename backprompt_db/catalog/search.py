"""Which texts contain a string, whatever the case of its letters, in an open transaction.

Without an index, every text is looked at: 100,000 texts of 250 characters take 0.2 s. With it, that takes 10 ms. Making
the index takes as long as some forty searches without it, and it takes more room than the texts, so it is made only
when somebody asks for it. From then on, recording marks new segments, and no more; they are looked at one by one until
somebody brings the index up to date.

The index is an FTS5 table of trigrams, without their places and without the texts: it names candidates, whose texts are
then looked at. Its entries stay true for ever, because a segment's id is the digest of its text. FTS5 hides what is
deleted but keeps it for a while. So to remove something for good, the whole index is emptied and made anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from sqlalchemy import Connection, exc

from backprompt_db.errors import CatalogError
from backprompt_db.prompt.ids import SegmentId, utf8

_NUM_CHARACTERS = 3
_MAX_TRIGRAMS = 32
TEXTS_PER_BATCH = 500

_CREATE = (
    "CREATE TABLE searchable (number INTEGER PRIMARY KEY, segment_id BLOB NOT NULL UNIQUE)",
    "CREATE TABLE unsearchable (segment_id BLOB PRIMARY KEY) WITHOUT ROWID",
    "CREATE VIRTUAL TABLE search USING fts5"
    "(trigrams, content = '', columnsize = 0, detail = none, tokenize = 'trigram case_sensitive 1')",
    "CREATE TRIGGER segments_inserted AFTER INSERT ON segments BEGIN"
    " INSERT INTO unsearchable VALUES (NEW.id) ON CONFLICT DO NOTHING; END",
    "INSERT INTO unsearchable SELECT id FROM segments",
)
_CLEAR = (
    "INSERT INTO search(search) VALUES ('delete-all')",
    "DELETE FROM searchable",
    "DELETE FROM unsearchable",
    "INSERT INTO unsearchable SELECT id FROM segments",
)
_HAS_INDEX = "SELECT count(*) FROM sqlite_master WHERE name = 'search'"
_IS_STALE = "SELECT EXISTS (SELECT 1 FROM searchable WHERE segment_id NOT IN (SELECT id FROM segments))"

_NUM_UNINDEXED = "SELECT count(*) FROM unsearchable"
_PAGE = (
    "SELECT waiting.segment_id, CASE WHEN id IS NOT NULL AND number IS NULL THEN folded(text) END"
    " FROM unsearchable AS waiting LEFT JOIN segments ON id = waiting.segment_id"
    " LEFT JOIN searchable ON searchable.segment_id = waiting.segment_id LIMIT ?"
)
_LAST_NUMBER = "SELECT coalesce(max(number), 0) FROM searchable"
_ADD = "INSERT INTO search (rowid, trigrams) VALUES (?, ?)"
_ADDED = "INSERT INTO searchable (number, segment_id) VALUES (?, ?)"
_DONE = "DELETE FROM unsearchable WHERE segment_id = ?"

_IN_ANY = "SELECT id FROM segments WHERE instr(folded(text), ?)"
# CROSS, because SQLite would go through all texts.
_IN_UNINDEXED = "SELECT id FROM unsearchable CROSS JOIN segments ON id = segment_id WHERE instr(folded(text), ?)"
_IN_INDEXED = (
    "SELECT id FROM search JOIN searchable ON number = search.rowid JOIN segments ON id = segment_id"
    " WHERE search MATCH ? AND instr(folded(text), ?)"
)


def segments_with(connection: Connection, string: str) -> set[SegmentId]:
    """Return the segments whose own text contains `string` in any case; raise `InvalidText` if it has no UTF-8."""
    utf8(string)
    wanted = folded(string)
    if len(wanted) < _NUM_CHARACTERS or not has_index(connection):
        return _ids(connection, _IN_ANY, wanted)
    in_index = _ids(connection, _IN_INDEXED, _trigrams(wanted), wanted)
    return in_index | _ids(connection, _IN_UNINDEXED, wanted)


def _ids(connection: Connection, statement: str, *values: str) -> set[SegmentId]:
    return set(connection.exec_driver_sql(statement, values).scalars())


def _trigrams(wanted: str) -> str:
    """Return an FTS5 query for the texts that have all trigrams of a string, or the first 32 of them."""
    places = range(len(wanted) - _NUM_CHARACTERS + 1)
    trigrams = dict.fromkeys(wanted[place : place + _NUM_CHARACTERS].replace('"', '""') for place in places)
    return " AND ".join(f'"{trigram}"' for trigram in itertools.islice(trigrams, _MAX_TRIGRAMS))


def has_index(connection: Connection) -> bool:
    """Whether somebody has asked for an index."""
    return bool(connection.exec_driver_sql(_HAS_INDEX).scalar_one())


def num_unindexed(connection: Connection) -> int:
    """Return how many texts are not in the index, which must be there."""
    return int(connection.exec_driver_sql(_NUM_UNINDEXED).scalar_one())


def create_index(connection: Connection) -> None:
    """Make an empty index unless there is one. Raises `CatalogError` if this SQLite has no FTS5 with trigrams."""
    if has_index(connection):
        return
    try:
        for statement in _CREATE:
            connection.exec_driver_sql(statement)
    except exc.OperationalError as error:
        raise CatalogError(
            f"this SQLite can make no index of texts: {error.orig}", hint="Search without one; every text is looked at."
        ) from error


def index_some(connection: Connection) -> int:
    """Add some texts to the index and return how many, 0 when no more are left."""
    page = connection.exec_driver_sql(_PAGE, (TEXTS_PER_BATCH,)).all()
    last = connection.exec_driver_sql(_LAST_NUMBER).scalar_one()
    # A segment without a text here is gone, or was gone for a while and is in the index already.
    new = [(number, *row) for number, row in enumerate((row for row in page if row[1] is not None), start=last + 1)]
    _run(connection, _ADD, [(number, text) for number, _, text in new])
    _run(connection, _ADDED, [(number, segment_id) for number, segment_id, _ in new])
    _run(connection, _DONE, [(segment_id,) for segment_id, _ in page])
    return len(page)


def _run(connection: Connection, statement: str, rows: list[tuple[object, ...]]) -> None:
    if rows:
        connection.exec_driver_sql(statement, rows)


def clear(connection: Connection) -> None:
    """Empty the index, if there is one: all texts are to be entered anew."""
    if has_index(connection):
        for statement in _CLEAR:
            connection.exec_driver_sql(statement)


def clear_stale(connection: Connection) -> None:
    """Empty the index if it has entries of texts that are gone."""
    if has_index(connection) and connection.exec_driver_sql(_IS_STALE).scalar_one():
        clear(connection)


_DOTTED_I = "\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}"
_SIGMA, _FINAL_SIGMA = "\N{GREEK SMALL LETTER SIGMA}", "\N{GREEK SMALL LETTER FINAL SIGMA}"


def folded(text: str) -> str:
    """Return a text of the same length in which letters that differ only in case are the same.

    >>> folded("Écho, ÉCHO")
    'écho, écho'
    """
    # One letter becomes two in lower case, another becomes what depends on the next one. FTS5 stops at a zero.
    lower = text.replace(_DOTTED_I, "i").lower()
    return lower.replace(_FINAL_SIGMA, _SIGMA).replace("\0", "\1")


def occurrences(text: str, string: str) -> Iterator[tuple[int, int]]:
    """Yield where `string` begins and ends in a text, from left to right, whatever its case.

    >>> list(occurrences("Buy, or BUY", "buy"))
    [(0, 3), (8, 11)]
    """
    inside, wanted = folded(text), folded(string)
    begin = inside.find(wanted)
    while wanted and begin >= 0:
        end = begin + len(wanted)
        yield begin, end
        begin = inside.find(wanted, end)
