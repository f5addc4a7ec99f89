"""A reader of databases and bundles, written from `docs/formats.md` alone. It must import nothing of the library.

Where it cannot read what the library writes, the page is wrong, or the format has changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import blake3
import lmdb
import numpy as np
import xxhash

PARTS = {b"s": "scores", b"l": "logits", b"k": "kv", b"c": "continuations"}
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I8": "|i1"}
KEY_CONTEXT = "backprompt-db 2026 secret of a database, format 1"
ID_CONTEXT = "backprompt-db 2026 id of a secret, format 1"

Digest = Callable[[bytes], bytes]


class Unreadable(Exception):
    """Something is not as the page says."""


class StoredPart(NamedTuple):
    """One part: what it says of itself, and its arrays, BF16 as the bits."""

    address: bytes
    name: str
    about: dict[str, Any]
    arrays: dict[str, np.ndarray[Any, Any]]
    dtypes: dict[str, str]


def read_database(directory: Path, *, secret: bytes | None = None) -> list[StoredPart]:
    """Return all parts of a database, in the order of their keys."""
    manifest = json.loads((directory / "manifest.json").read_bytes())
    require(manifest["format"] == 1, "format")
    require(manifest["fidelity"] in ("exact", "bfloat16", "int8"), "fidelity")
    require(manifest["lmdb"] == {"generation": 0, "chunk_nbytes": 1_048_560}, "geometry")
    digest = digest_of(manifest, secret)
    options = {"readonly": True, "create": False, "lib_version": 0}
    with lmdb.Environment(str(directory / "store"), **options) as store, store.begin() as transaction:  # type: ignore[arg-type]
        records = [(bytes(key), bytes(value)) for key, value in transaction.cursor()]
    return [part(key[:32], PARTS[key[32:33]], blob) for key, blob in blobs(records, digest)]


def digest_of(manifest: dict[str, Any], secret: bytes | None) -> Digest:
    """Return what records are digested with."""
    if secret is None:
        require(manifest["digest"] == "xxh3-128" and "secret_id" not in manifest, "digest")
        return lambda data: xxhash.xxh3_128(data, seed=0).digest()
    require(manifest["digest"] == "blake3-keyed", "digest")
    require(manifest["secret_id"] == blake3.blake3(secret, derive_key_context=ID_CONTEXT).hexdigest(16), "secret")
    key = blake3.blake3(secret, derive_key_context=KEY_CONTEXT).digest()
    return lambda data: blake3.blake3(data, key=key).digest(16)


def blobs(records: list[tuple[bytes, bytes]], digest: Digest) -> Iterator[tuple[bytes, bytes]]:
    """Yield the key of each head with its blob, put together of its chunks."""
    by_key = dict(records)
    for key, head in records:
        require(len(key) == 37, "key")
        if key[33:] != bytes(4):
            continue
        body, own = head[:-16], head[-16:]
        require(digest(key + body) == own, "digest of a head")
        num_chunks, nbytes = struct.unpack_from(">IQ", body)
        blob = body[12:]
        if num_chunks:
            digests = [blob[16 * number : 16 * number + 16] for number in range(num_chunks)]
            chunks = [by_key[key[:33] + struct.pack(">I", number)] for number in range(1, num_chunks + 1)]
            require(
                [digest(chunk) for chunk in chunks] == digests and len(blob) == 16 * num_chunks, "digest of a chunk"
            )
            require({len(chunk) for chunk in chunks[:-1]} <= {1_048_560}, "length of a chunk")
            blob = b"".join(chunks)
        require(len(blob) == nbytes, "length of a blob")
        yield key[:33], blob


def part(address: bytes, name: str, blob: bytes) -> StoredPart:
    """Return a part out of its safetensors blob, which must be the one that its address is the name of."""
    (length,) = struct.unpack_from("<Q", blob)
    header = json.loads(blob[8 : 8 + length])
    data = blob[8 + length :]
    about = json.loads(header.pop("__metadata__")["backprompt-db"])
    require(about["format"] == 1 and about["part"] == name, "metadata")
    require(address_of(about) == address, "address")
    arrays = {}
    for array, place in header.items():
        begin, end = place["data_offsets"]
        arrays[array] = np.frombuffer(data[begin:end], DTYPES[place["dtype"]]).reshape(place["shape"])
    require(name != "continuations" or is_tree(*(arrays[each].tolist() for each in sorted(arrays))), "tree")
    return StoredPart(address, name, about, arrays, {array: place["dtype"] for array, place in header.items()})


def is_tree(ids: list[int], parents: list[int], logprobs: list[float]) -> bool:
    """Whether continuations are a tree of tokens, each with a log-probability."""
    return (
        len(ids) == len(parents) == len(logprobs) == len(set(zip(parents, ids, strict=True)))
        and all(-1 <= parent < number for number, parent in enumerate(parents))
        and all(logprob <= 0.001 for logprob in logprobs)
    )


def address_of(about: dict[str, Any]) -> bytes:
    """Return the address that follows from a part's metadata."""
    parents = [bytes.fromhex(parent) for parent in about["parents"]]
    require(parents == sorted(set(parents)), "order of parents")
    start = -1 if about["start"] is None else about["start"]
    text = about["text"].encode()
    segment = hashlib.sha256(
        b"backprompt-db/segment/1\0"
        + struct.pack(">I", len(parents))
        + b"".join(parents)
        + struct.pack(">qQ", start, len(text))
        + text
    ).digest()
    ids = bytes.fromhex(about["weights_id"]) + bytes.fromhex(about["tokenizer_id"])
    return hashlib.sha256(b"backprompt-db/address/1\0" + segment + ids).digest()


def values(part: StoredPart, name: str) -> np.ndarray[Any, Any]:
    """Return keys or values as F32, with the rounding of a lossy database undone."""
    array = part.arrays[name]
    if part.dtypes[name] == "BF16":
        array = np.left_shift(array, 16, dtype="<u4").view("<f4")
    if part.dtypes[name] == "I8":
        array = array.astype("<f4") * part.arrays[f"{name}_scale"][..., None]
    return array


def read_bundle(file: Path) -> list[StoredPart]:
    """Return the parts of a bundle, in the order of their index."""
    whole = xxhash.xxh3_128()
    found: list[StoredPart] = []
    expected: list[tuple[str, dict[str, Any]]] = []
    with tarfile.open(file, "r:") as bundle:
        for member in bundle:
            content = (bundle.extractfile(member) or io.BytesIO()).read()
            if member.name == "end.json":
                end = json.loads(content)
                require(end == {"num_parts": len(found), "xxh3_128": whole.hexdigest()} and not expected, "end")
                return found
            whole.update(member.name.encode("ascii") + b"\0" + xxhash.xxh3_128(content).digest())
            if member.name == "bundle.json":
                require(json.loads(content)["format"] == 1, "format of a bundle")
            elif member.name.startswith("index-"):
                require(not expected, "parts before the next index")
                expected = list(index(content))
            else:
                name, line = expected.pop(0)
                require((member.name, len(content)) == (name, line["nbytes"]), "order of parts")
                require(xxhash.xxh3_128(content).hexdigest() == line["xxh3_128"], "digest of a part")
                found.append(part(bytes.fromhex(name.partition("/")[0]), line["part"], content))
    raise Unreadable("the bundle was cut off")


def index(content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the file names of the parts that come next, each with what the index says of it."""
    for line in content.splitlines():
        for each in json.loads(line).get("representation", {}).get("parts", []):
            yield f"{json.loads(line)['representation']['address']}/{each['part']}.safetensors", each


def require(is_so: object, what: str) -> None:
    """Raise where something is not as the page says."""
    if not is_so:
        raise Unreadable(what)
