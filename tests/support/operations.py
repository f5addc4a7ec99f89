"""Prompts for a database to maintain, ways to look into it, and ways to damage it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb

import backprompt_db as bp
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import Totals
from backprompt_db.database.opening import open_catalog, open_existing
from backprompt_db.database.reconcile import Reindexing
from backprompt_db.operations.reindex import reindex
from backprompt_db.operations.verify import Verification, verify
from backprompt_db.prompt.ids import Address
from backprompt_db.store.contract import Blob, Key
from backprompt_db.store.environment import LMDB_GENERATION
from backprompt_db.store.lmdb import LmdbStore

FOREIGN = Address(b"\x5a" * 32)


def run_prompts(lm: bp.LanguageModel) -> None:
    """Four segments under one model, with all parts, and hits."""
    context = lm.text("Pick the endpoint for the request.\n")
    for request in ("Request: show me everyone", "Request: create an order", "'; DROP TABLE segments; --"):
        lm(context + request, keep="all")
    lm(context + "Request: create an order")


def catalog_of(directory: Path) -> Path:
    return directory / "catalog.sqlite"


def totals(directory: Path) -> Totals:
    with open_catalog(directory) as catalog:
        return catalog.totals()


def stored_keys(directory: Path) -> list[Key]:
    with contextlib.closing(LmdbStore(directory / "store")) as store:
        return [key for key, _ in store.keys()]


def verified(directory: Path) -> Verification:
    with open_existing(directory) as db:
        return verify(db)


def reindexed(directory: Path) -> Reindexing:
    with open_existing(directory) as db:
        return reindex(db)


@contextlib.contextmanager
def back_door(directory: Path) -> Iterator[Any]:
    """A write transaction on the store's records, behind the back of everything."""
    path = str(directory / "store")
    with (
        lmdb.open(path, map_size=1 << 30, lib_version=LMDB_GENERATION) as env,
        env.begin(write=True) as transaction,
    ):
        yield transaction


def flip_a_bit(directory: Path, key: Key) -> None:
    with back_door(directory) as transaction:
        record = key.address + key.part.value + bytes(4)
        value = bytearray(transaction.get(record))
        value[len(value) // 2] ^= 1
        transaction.put(record, bytes(value))


def remove_blob(directory: Path, key: Key) -> None:
    with contextlib.closing(LmdbStore(directory / "store")) as store:
        assert store.delete([key]) == 1


def remove_row(directory: Path, key: Key) -> None:
    with Catalog.open(catalog_of(directory)) as catalog:
        catalog.forget([key])


def put_blob(directory: Path, key: Key, blob: bytes) -> None:
    with contextlib.closing(LmdbStore(directory / "store")) as store:
        assert store.put([Blob(key, blob)]) == [key]


def read_blob(directory: Path, key: Key) -> bytes:
    with contextlib.closing(LmdbStore(directory / "store")) as store:
        blob = store.get(key)
    assert blob is not None
    return bytes(blob)
