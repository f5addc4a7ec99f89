"""Bundles made by hand, as docs/formats.md describes them, and parts that follow each other to put into them."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import xxhash

import backprompt_db as bp
from backprompt_db.codec.blob import encode
from backprompt_db.database.writer import NewPart
from backprompt_db.operations.bundles.transfer import export_bundle, import_bundle
from backprompt_db.prompt.ids import SegmentId, TokenizerId, WeightsId
from backprompt_db.prompt.representation import OWN_PARTS, Array, Origin, Part
from backprompt_db.store.contract import Key
from tests.support.blobs import array, tree

Members = list[tuple[str, bytes]]
"""Name and content of each file of a bundle."""

SUBJECTS = "Pick the endpoint for the request.\n", "Translate the sentence.\n"
REQUESTS = "Request: list users", "Request: create an order"
IDS = WeightsId(b"w" * 32), TokenizerId(b"t" * 32)


def chain(*texts: str, parents: Sequence[SegmentId] = ()) -> list[Origin]:
    """Segments of which each follows the one before."""
    origins: list[Origin] = []
    for text in texts:
        before = (origins[-1].segment_id,) if origins else tuple(parents)
        origins.append(Origin(text, before, None, *IDS, 3, 0.5))
    return origins


def arrays_of(origin: Origin, part: Part) -> dict[str, Array]:
    """Arrays that only this part has."""
    fill, num_tokens = sum(origin.address) % 251, origin.num_tokens
    if part is Part.SCORES:
        return {
            "input_ids": array("I32", num_tokens, fill=fill),
            "token_logprobs": array("F32", num_tokens, fill=fill),
        }
    if part is Part.CONTINUATIONS:
        return tree([fill, 7, 7], [-1, 0, 1], [-1.0, -0.5, 0.0])
    if part is Part.LOGITS:
        return {"logits": array("F32", 5, fill=fill)}
    return {name: array("F32", 2, 1, num_tokens, 2, fill=fill) for name in ("keys", "values")}


def new_parts(origins: Iterable[Origin], parts: Iterable[Part] = OWN_PARTS) -> list[NewPart]:
    return [
        NewPart(Key(origin.address, part), arrays_of(origin, part), origin)
        for origin, part in itertools.product(origins, list(parts))
    ]


def blobs(origins: Iterable[Origin], parts: Iterable[Part] = OWN_PARTS) -> list[tuple[Key, bytes]]:
    """Keys and bytes of parts."""
    return [(each.key, encode(each.key.part, each.arrays, each.origin)) for each in new_parts(origins, parts)]


def stored(db: bp.Database) -> dict[Key, bytes]:
    """Everything that a database holds."""
    return {key: bytes(db.store.get(key) or b"") for key, _ in db.store.keys()}


def exported(db: bp.Database, **options: Any) -> bytes:
    stream = io.BytesIO()
    export_bundle(db, stream, **options)
    return stream.getvalue()


def imported(db: bp.Database, bundle: bytes) -> Any:
    return import_bundle(db, io.BytesIO(bundle))


def part_name(key: Key) -> str:
    return f"{key.address.hex()}/{key.part.name.lower()}.safetensors"


def compact(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def description(**changes: Any) -> tuple[str, bytes]:
    fields = {"format": 1, "fidelity": "exact", "created_at": "2026-01-01T00:00:00+00:00"} | changes
    return "bundle.json", compact(fields)


def index(found: Sequence[tuple[Key, bytes]], *, number: int = 1, **changes: Any) -> tuple[str, bytes]:
    """The index of parts; what `changes` says stands in every line of a representation."""
    lines = [
        {
            "representation": {
                "address": address.hex(),
                "parts": [
                    {
                        "part": key.part.name.lower(),
                        "nbytes": len(blob),
                        "xxh3_128": xxhash.xxh3_128_hexdigest(blob),
                    }
                    for key, blob in group
                ],
                "label": None,
                "is_pinned": False,
            }
            | changes
        }
        for address, group in itertools.groupby(found, key=lambda each: each[0].address)
    ]
    return f"index-{number:06}.jsonl", b"".join(map(compact, lines))


def files(found: Sequence[tuple[Key, bytes]]) -> Members:
    return [(part_name(key), blob) for key, blob in found]


def closed(members: Members) -> Members:
    """Members with the end that fits them."""
    state, num_parts = xxhash.xxh3_128(), sum(name.endswith(".safetensors") for name, _ in members)
    for name, content in members:
        state.update(name.encode() + b"\0" + xxhash.xxh3_128_digest(content))
    end = {"num_parts": num_parts, "xxh3_128": state.hexdigest()}
    return [*members, ("end.json", compact(end))]


def bundle_of(found: Sequence[tuple[Key, bytes]], **changes: Any) -> Members:
    """The members of a bundle in one group; what `changes` says stands in its description."""
    return closed([description(**changes), index(found), *files(found)])


def entry(name: str, content: bytes = b"", **fields: Any) -> bytes:
    """One member of a tar file, by the library; `fields` stand in its header, whatever the content is."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    for field, value in fields.items():
        setattr(header, field, value)
    return header.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def tar_of(members: Iterable[tuple[str, bytes] | bytes]) -> bytes:
    """A tar file of members, or of bytes that stand for some."""
    pieces = [each if isinstance(each, bytes) else entry(*each) for each in members]
    return b"".join(pieces) + bytes(1024)


def members_of(bundle: bytes) -> Members:
    """What the tar library finds in a bundle."""
    with tarfile.open(fileobj=io.BytesIO(bundle)) as archive:
        assert all(member.isreg() for member in archive)
        return [(member.name, archive.extractfile(member).read()) for member in archive.getmembers()]  # type: ignore[union-attr]


def run_prompts(lm: bp.LanguageModel) -> None:
    """Two subjects with two requests each: eighteen parts."""
    for subject in SUBJECTS:
        context = lm.text(subject)
        for request in REQUESTS:
            lm(context + request, keep="all")


def path_of(lm: bp.LanguageModel) -> Path:
    assert lm.db.directory is not None
    return lm.db.directory
