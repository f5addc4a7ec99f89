"""Signatures of what the catalog remembers and decides what is computed: digests that tell a record from a changed one.

They are made like the digests of parts. Those of a database with a secret are keyed with it, and nobody else can make
them; the others find damage, and values that somebody has edited.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a run of hits needs no SQLAlchemy
    from backprompt_db.catalog.catalog import Catalog
    from backprompt_db.catalog.records import Known
    from backprompt_db.catalog.remembered import Signed
    from backprompt_db.store.records import Digest

_CONTEXT = b"backprompt-db/catalog/1\0"


def signed(record: Known, digest: Digest) -> Known:
    """Return the record with its signature.

    What is said of a tokenizer is for people to read, and has none.
    """
    from backprompt_db.catalog.records import TokenizerRecord

    return record if isinstance(record, TokenizerRecord) else replace(record, signature=_signature(record, digest))


def is_genuine(record: Signed, digest: Digest) -> bool:
    """Whether the signature is that of just this record."""
    return record.signature is not None and hmac.compare_digest(record.signature, _signature(record, digest))


def changed_rows(catalog: Catalog, digest: Digest) -> dict[str, list[int]]:
    """Return the row ids, by table, of what is remembered and is not what was written.

    Rows without a signature are not among them: an earlier version may have written them.
    """
    changed: dict[str, list[int]] = {}
    for table, rowid, record in catalog.remembered():
        if record is None or (record.signature is not None and not is_genuine(record, digest)):
            changed.setdefault(table, []).append(rowid)
    return changed


def _signature(record: Signed, digest: Digest) -> bytes:
    fields: dict[str, Any] = {name: value for name, value in asdict(record).items() if name != "signature"}
    content = json.dumps([type(record).__name__, fields], sort_keys=True, default=bytes.hex)
    return digest(_CONTEXT, content.encode(errors="surrogatepass"))
