"""What a database is: `manifest.json`, written once and read before anything else is opened, and the secret."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.database.location import CACHE_TAG, CONFIG, JOURNAL, MANIFEST, MANIFEST_LOCK, STORE
from backprompt_db.errors import FormatError, FormatTooNew, StoreReadOnly, UnsafeLocation
from backprompt_db.prompt.representation import FORMAT
from backprompt_db.store.environment import LMDB_GENERATION
from backprompt_db.store.files import from_json
from backprompt_db.store.records import CHUNK_NBYTES, Digest, keyed_blake3, xxh3_128
from backprompt_db.system.files import read_small, replace_file

XXH3 = "xxh3-128"
"""The digest that finds damage."""

KEYED = "blake3-keyed"
"""The digest that only those can make who know the database's secret."""

_REPLACED = (CACHE_TAG, CONFIG, MANIFEST)
_UNFINISHED = (MANIFEST_LOCK, STORE, JOURNAL, *_REPLACED[:-1], *(f".{name}." for name in _REPLACED))
"""What a process that was killed while it created a database may leave; creation starts over."""

_CACHE_TAG = """Signature: 8a477f597d28d172789f06886806bc55
# This directory is a backprompt-db database. Everything in it can be computed again.
# For information about cache directory tags see https://bford.info/cachedir/
"""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the store is laid out by."""

    generation: int
    """LMDB's file format generation."""
    chunk_nbytes: int
    """The size of chunks, in bytes."""


_OURS = Geometry(LMDB_GENERATION, CHUNK_NBYTES)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The properties of a database that are fixed when it is created."""

    format: int = FORMAT
    """Version of addresses, parts and this directory."""
    fidelity: Fidelity = Fidelity.EXACT
    """How keys and values are stored."""
    digest: str = XXH3
    """What every chunk is digested with."""
    secret_id: str | None = None
    """Which secret keys the digests; None where they have no key."""
    lmdb: Geometry = _OURS
    created_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """UTC time of creation, ISO 8601."""


class _Header(msgspec.Struct):
    """What tells whether this version can read the rest; a newer one may know other values, of any type."""

    format: int = 0
    fidelity: object = Fidelity.EXACT
    digest: object = XXH3


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of `directory`; None where there is no directory, or an empty one.

    Raises `UnsafeLocation` for a file or a directory that is not a database, `FormatTooNew` for one that a newer
    version wrote, `FormatError` for a manifest that cannot be read.
    """
    try:
        content = _read(directory)
        return None if content is None else _from_json(content, directory)
    except NotADirectoryError:
        raise UnsafeLocation(f"{directory} is a file", hint="Give a directory for the database.") from None
    except PermissionError:
        raise StoreReadOnly(f"{directory} cannot be read", hint="Ask its owner for permission to read it.") from None
    except OSError as error:
        raise UnsafeLocation(f"{directory} cannot be read: {error}", hint="Give another directory.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{directory / MANIFEST} cannot be read ({error})", hint="Restore it from a backup."
        ) from None


def write_manifest(directory: Path, manifest: Manifest, *, mode: int = 0o600) -> None:
    """Write `manifest.json` and `CACHEDIR.TAG`, each whole or not at all, with the permissions `mode`."""
    fields = {name: value for name, value in asdict(manifest).items() if value is not None}
    replace_file(directory / CACHE_TAG, _CACHE_TAG, mode=mode)
    replace_file(directory / MANIFEST, json.dumps(fields, indent=2) + "\n", mode=mode)


def _read(directory: Path) -> bytes | None:
    """Return the bytes of the manifest; None where no database is, `UnsafeLocation` where something else is."""
    try:
        return read_small(directory / MANIFEST)
    except FileNotFoundError:
        names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    if MANIFEST in names:  # another process has just finished it
        return read_small(directory / MANIFEST)
    if not all(name.startswith(_UNFINISHED) for name in names):
        raise UnsafeLocation(
            f"{directory} holds files but no manifest.json: it is not a backprompt-db database",
            hint="Give an empty or a new directory.",
        )
    return None


def _from_json(content: bytes, directory: Path) -> Manifest:
    header = from_json(content, _Header)
    if header.format < 1:
        raise ValueError("it names no format")
    if header.format > FORMAT:
        raise FormatTooNew(
            f"{directory} has format {header.format}, this version reads up to {FORMAT}",
            hint="Upgrade backprompt-db, or use another directory.",
        )
    if header.fidelity not in tuple(Fidelity) or header.digest not in (XXH3, KEYED):
        raise _unknown(directory, f"fidelity {header.fidelity!r} and digest {header.digest!r}")
    manifest = from_json(content, Manifest)
    if manifest.digest != (XXH3 if manifest.secret_id is None else KEYED) or manifest.lmdb != _OURS:
        store = f"LMDB's generation {manifest.lmdb.generation} with chunks of {manifest.lmdb.chunk_nbytes} bytes"
        raise _unknown(directory, f"digest {manifest.digest!r} and {store}")
    return manifest


def _unknown(directory: Path, what: str) -> FormatTooNew:
    return FormatTooNew(
        f"{directory} uses {what}, unknown to this version", hint="Upgrade backprompt-db, or use another directory."
    )


VARIABLE = "BACKPROMPT_DB_SECRET"
"""The environment variable with the secret."""

FILE_VARIABLE = "BACKPROMPT_DB_SECRET_FILE"
"""The environment variable with the name of a file that holds the secret."""

_MIN_NBYTES = 16
_CONTEXT = "backprompt-db 2026 id of a secret, format 1"


def digest_of(manifest: Manifest, directory: Path) -> Digest:
    """Return what digests the chunks of the database in `directory`.

    Raises `FormatError` where the secret of the database is not given, or another one is: with a wrong secret every
    part would look forged, and a database without one may be a forger's, in the place of the true one.
    """
    secret = find_secret(directory)
    given = None if secret is None else secret_id(secret)
    if given != manifest.secret_id:
        raise FormatError(f"{directory} {_difference(manifest, given)}", hint=_HINT)
    return xxh3_128 if secret is None else keyed_blake3(secret)


def _difference(manifest: Manifest, given: str | None) -> str:
    if manifest.secret_id is None:
        return "was made without a secret, and one is set: whoever may write there could have forged what is in it"
    return "was made with a secret, and none is set" if given is None else "was made with another secret than is set"


_HINT = f"Set or unset ${VARIABLE} or ${FILE_VARIABLE}, or give another directory."


def find_secret(directory: Path) -> bytes | None:
    """Return the secret that the environment gives for the database in `directory`; None where it gives none.

    Raises `FormatError` for one that is too short to be safe and for a file that cannot be read, and `UnsafeLocation`
    for a file inside the directory: whoever could forge parts would find it there.
    """
    secret, source = os.environ.get(VARIABLE, "").encode(errors="surrogateescape"), f"${VARIABLE}"
    if not secret and (name := os.environ.get(FILE_VARIABLE)):
        secret, source = _read_file(Path(name), directory), f"${FILE_VARIABLE}"
    elif not secret:
        return None
    if len(secret) < _MIN_NBYTES:  # an empty file too: it is no way to say that there is none
        raise FormatError(
            f"the secret in {source} has {len(secret)} bytes, {_MIN_NBYTES} are needed",
            hint="Make one with `openssl rand -hex 32`.",
        )
    return secret


def secret_id(secret: bytes) -> str:
    """Return the id of a secret, which tells nothing else about it: 16 bytes of BLAKE3, in hex."""
    import blake3

    return blake3.blake3(secret, derive_key_context=_CONTEXT).hexdigest(16)


def _read_file(file: Path, directory: Path) -> bytes:
    if file.resolve().is_relative_to(directory.resolve()):
        raise UnsafeLocation(f"the file of the secret, {file}, is inside the database", hint="Keep it elsewhere.")
    try:
        return read_small(file, through_link=True).strip()
    except OSError as error:
        raise FormatError(
            f"the file of the secret, {file}, cannot be read: {error.strerror}",
            hint=f"Correct ${FILE_VARIABLE}, or the file's permissions.",
        ) from error
