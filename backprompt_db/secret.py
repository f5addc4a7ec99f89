"""The secret that digests are keyed with: where it is found, and which database it belongs to."""

from __future__ import annotations

import os
from pathlib import Path

from backprompt_db.errors import FormatError, UnsafeLocation
from backprompt_db.manifest import Manifest
from backprompt_db.store.digests import Digest, keyed_blake3, xxh3_128

VARIABLE = "BACKPROMPT_DB_SECRET"
"""The environment variable with the secret."""

FILE_VARIABLE = "BACKPROMPT_DB_SECRET_FILE"
"""The environment variable with the name of a file that holds the secret."""

_MIN_NBYTES = 16
_CONTEXT = "backprompt-db 2026 id of a secret, format 1"


def digest_of(manifest: Manifest, directory: Path) -> Digest:
    """Return what digests the chunks of the database in `directory`.

    Raises `FormatError` where the secret that it needs is not at hand, and where one is given that is not its own: with
    a wrong one every part would look forged, and a database without one may be what a forger has put in the place of
    another.
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

    Raises `FormatError` for one that is too short to keep anybody out, and where its file cannot be read, and
    `UnsafeLocation` for a file inside the directory, where everybody who could forge parts would find it.
    """
    secret, source = os.environ.get(VARIABLE, "").encode(errors="surrogateescape"), f"${VARIABLE}"
    if not secret and (name := os.environ.get(FILE_VARIABLE)):
        secret, source = _read(Path(name), directory), f"${FILE_VARIABLE}"
    elif not secret:
        return None
    if len(secret) < _MIN_NBYTES:  # an empty file too: it is no way to say that there is none
        raise FormatError(
            f"the secret in {source} has {len(secret)} bytes, {_MIN_NBYTES} are needed",
            hint="Make one with `openssl rand -hex 32`.",
        )
    return secret


def secret_id(secret: bytes) -> str:
    """Return what tells secrets apart, and tells nothing else about them: 16 bytes of BLAKE3, in hex."""
    import blake3

    return blake3.blake3(secret, derive_key_context=_CONTEXT).hexdigest(16)


def _read(file: Path, directory: Path) -> bytes:
    if file.resolve().is_relative_to(directory.resolve()):
        raise UnsafeLocation(f"the file of the secret, {file}, is inside the database", hint="Keep it elsewhere.")
    try:
        return file.read_bytes().strip()
    except OSError as error:
        raise FormatError(
            f"the file of the secret, {file}, cannot be read: {error.strerror}",
            hint=f"Correct ${FILE_VARIABLE}, or the file's permissions.",
        ) from error
