"""Seals on what the catalog says of models, their files, long strings and prompts, in a database with a secret.

Unlike the rest of the catalog, these records decide what is computed and what is found: whoever could forge them could
have one model answer with another one's values.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import asdict, replace
from typing import Any

from backprompt_db.catalog.records import CutsRecord, GreedyPath, Known, ModelRecord, Source, TokenizerRecord
from backprompt_db.store.digests import Digest

_CONTEXT = b"backprompt-db/catalog/1\0"

Sealed = ModelRecord | Source | CutsRecord | GreedyPath
"""What has a signature."""


def sealed(record: Known, digest: Digest) -> Known:
    """Return the record with a signature that only those can make who have the keyed `digest`.

    What is said of a tokenizer is for people to read, and has none.
    """
    return record if isinstance(record, TokenizerRecord) else replace(record, signature=_signature(record, digest))


def is_genuine(record: Sealed, digest: Digest) -> bool:
    """Whether the signature is that of just this record."""
    return record.signature is not None and hmac.compare_digest(record.signature, _signature(record, digest))


def _signature(record: Sealed, digest: Digest) -> bytes:
    fields: dict[str, Any] = {name: value for name, value in asdict(record).items() if name != "signature"}
    content = json.dumps([type(record).__name__, fields], sort_keys=True, default=bytes.hex)
    return digest(_CONTEXT, content.encode(errors="surrogatepass"))
