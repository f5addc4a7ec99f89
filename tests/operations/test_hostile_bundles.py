"""Bundles that are damaged or hostile: nothing of them is stored from the first thing on that is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tarfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.codec.blob import encode
from backprompt_db.database.database import MEMORY
from backprompt_db.errors import FormatError, FormatTooNew
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from tests.support.blobs import int8_arrays
from tests.support.bundles import (
    blobs,
    bundle_of,
    chain,
    closed,
    compact,
    description,
    entry,
    files,
    imported,
    index,
    part_name,
    stored,
    tar_of,
)


@pytest.fixture
def empty() -> Iterator[bp.Database]:
    with bp.open(MEMORY) as db:
        yield db


PARTS = blobs(chain("a", "b"))
GOOD, (KEY, BLOB) = PARTS[:3], PARTS[3]
"""The parts of the first segment, then the first part of the second, in whose place something hostile comes."""

NAME = part_name(KEY)
HUGE = (1 << 33) - 1
INDEX = 1
FOURTH = 2 + 3
"""Where in a bundle the index is, and where the part in question."""


def instead(hostile: bytes, *, place: int = FOURTH) -> bytes:
    """A good bundle with something else in the place of one member, by default that of a part."""
    members: list[tuple[str, bytes] | bytes] = list(bundle_of(PARTS))
    members[place] = hostile
    return tar_of(members)


def of_blob(blob: bytes, key: Key = KEY) -> bytes:
    """A bundle that is right but for one blob, which has the right size and digest."""
    return tar_of(bundle_of([*GOOD, (key, blob)]))


def altered(**fields: object) -> bytes:
    """The part in question, whose metadata says something else."""
    header, data = taken_apart(BLOB)
    metadata = json.loads(header["__metadata__"]["backprompt-db"]) | fields
    header["__metadata__"]["backprompt-db"] = re.sub(r'"1e999"', "1e999", json.dumps(metadata))
    return with_header(header, data)


def taken_apart(blob: bytes) -> tuple[Any, bytes]:
    length = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def with_header(header: object, data: bytes) -> bytes:
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


def retyped(dtype: str) -> bytes:
    length = int.from_bytes(BLOB[:8], "little")
    return BLOB[:8] + BLOB[8 : 8 + length].replace(b'"I32"', f'"{dtype}"'.encode()) + BLOB[8 + length :]


def pax(content: bytes = b"11 path=ab\n", **fields: Any) -> bytes:
    return entry("././@PaxHeader", content, **({"type": tarfile.XHDTYPE} | fields))


C = chain("c")[0]
HOSTILE_MEMBERS = {
    "a name that leaves the directory": (instead(entry(f"../{NAME}", BLOB)), "should come, not"),
    "an absolute name": (instead(entry(f"/{NAME}", BLOB)), "should come, not"),
    "a name with a detour": (instead(entry(f"./{NAME}", BLOB)), "should come, not"),
    "a name in capitals": (instead(entry(NAME.upper(), BLOB)), "should come, not"),
    "a name that is not ASCII": (instead(entry("ä" * 20, BLOB)), "header of a file is damaged"),
    "a symbolic link": (instead(entry(NAME, type=tarfile.SYMTYPE, linkname="/etc/passwd")), "not a regular file"),
    "a hard link": (instead(entry(NAME, type=tarfile.LNKTYPE, linkname=part_name(GOOD[0][0]))), "not a regular file"),
    "a link in disguise": (instead(entry(NAME, BLOB, linkname="x")), "not a regular file"),
    "a directory": (instead(entry(NAME, type=tarfile.DIRTYPE)), "not a regular file"),
    "a directory of old": (instead(entry(f"{NAME}/", type=tarfile.AREGTYPE)), "not a regular file"),
    "a pipe": (instead(entry(NAME, type=tarfile.FIFOTYPE)), "not a regular file"),
    "a device": (instead(entry(NAME, type=tarfile.CHRTYPE, devmajor=1, devminor=5)), "not a regular file"),
    "a sparse file": (instead(entry(NAME, BLOB, type=tarfile.GNUTYPE_SPARSE)), "not a regular file"),
    "a contiguous file": (instead(entry(NAME, BLOB, type=tarfile.CONTTYPE)), "not a regular file"),
    "an extension header": (instead(pax() + entry(NAME, BLOB)), "not a regular file"),
    "a global extension header": (instead(pax(type=tarfile.XGLTYPE)), "not a regular file"),
    "an extension header of 8 GiB": (instead(pax(size=HUGE)), "not a regular file"),
    "a thousand extension headers": (instead(pax() * 1000 + entry(NAME, BLOB)), "not a regular file"),
    "a long name of 8 GiB": (instead(entry("x", type=tarfile.GNUTYPE_LONGNAME, size=HUGE)), "not a regular file"),
    "a long link": (instead(entry("x", type=tarfile.GNUTYPE_LONGLINK, size=5)), "not a regular file"),
    "an unknown type": (instead(entry(NAME, BLOB, type=b"Q")), "not a regular file"),
    "a size of 2^63": (instead(entry(NAME, size=2**63)), "claims 9,223,372,036,854,775,808 bytes"),
    "a size below zero": (instead(entry(NAME, size=-512)), "claims -512 bytes"),
    "another size than the index says": (instead(entry(NAME, BLOB + b"x")), "should come, not"),
    "a part that came": (instead(entry(part_name(GOOD[0][0]), GOOD[0][1])), "should come, not"),
    "an end too early": (instead(entry(*bundle_of(PARTS)[-1])), "should come, not 'end.json'"),
    "an index too early": (instead(entry(*index(PARTS, number=2))), "should come, not 'index-000002.jsonl'"),
    "a damaged header": (instead(bytes([1]) * 512), "header of a file is damaged"),
    "zeros": (instead(bytes(512)), "ends early"),
    "a safetensors header of 2^63": (of_blob((2**63).to_bytes(8, "little") + bytes(64)), "its header claims"),
    "a header longer than the part": (of_blob((1 << 20).to_bytes(8, "little") + bytes(64)), "shorter than what"),
    "a blob of seven bytes": (of_blob(b"1234567"), "shorter than what"),
    "a hundred thousand tensors": (of_blob(with_header({str(n): {} for n in range(10**5)}, b"")), "more than four"),
    "zeros for a blob": (of_blob(bytes(4096)), "not JSON"),
    "another dtype": (of_blob(retyped("F32")), "input_ids is F32"),
    "a dtype that parts do not have": (of_blob(retyped("I16")), "dtype that parts do not have"),
    "bytes after the arrays": (of_blob(BLOB + bytes(8)), "8 bytes belong to no array"),
    "a part without its end": (of_blob(BLOB[:-4]), "malformed|belong"),
    "a part of another address": (of_blob(blobs([C])[0][1]), f"scores part of {C.address.hex()}"),
    "another part of the same address": (of_blob(PARTS[4][1]), "is the logits part of"),
    "bytes that do not match their digest": (instead(entry(NAME, BLOB[:-1] + b"x")), "do not match their digest"),
    "forever to compute": (of_blob(altered(compute_seconds="1e999")), "nothing takes inf seconds"),
    "NaN to compute": (of_blob(altered(compute_seconds="nan")), "nothing takes nan seconds"),
    "less than nothing to compute": (of_blob(altered(compute_seconds=-1)), "nothing takes -1.0 seconds"),
    "tokens that are not there": (of_blob(altered(num_tokens=4)), "does not have 4 tokens"),
    "no number of tokens": (of_blob(altered(num_tokens=2**62)), "does not have 4,611,686,018,427,387,904"),
    "a part of a newer version": (of_blob(altered(format=2)), "format 2"),
    "int8 where all is exact": (
        of_blob(
            encode(Part.KV, int8_arrays((2, 1, 1, 2), (2, 1, 1, 2)), replace(C, num_tokens=1)), Key(C.address, Part.KV)
        ),
        "keys and values are I8, which exact ones are not",
    ),
}


@pytest.mark.parametrize("what", HOSTILE_MEMBERS)
def test_in_the_place_of_a_part_is_refused(what: str, empty: bp.Database) -> None:
    bundle, message = HOSTILE_MEMBERS[what]
    with pytest.raises(FormatError, match=message):
        imported(empty, bundle)
    assert stored(empty) == dict(GOOD)


def of_index(content: bytes) -> bytes:
    members = bundle_of(PARTS)
    return tar_of(closed([members[0], (members[INDEX][0], content), *members[2:-1]]))


def of_lines(**changes: Any) -> bytes:
    return of_index(index(PARTS, **changes)[1])


def of_entry(**changes: Any) -> bytes:
    """A bundle in whose index the entry of one part says something else."""
    line = json.loads(index(PARTS[:1])[1])
    line["representation"]["parts"][0] |= changes
    return of_index(compact(line))


def with_field(field: bytes) -> bytes:
    """A bundle in whose index each representation begins with something more."""
    return of_index(index(PARTS)[1].replace(b'{"address"', b"{" + field + b',"address"'))


TWICE = [*PARTS, *GOOD]
TWO_GROUPS = [description(), index(GOOD), *files(GOOD), index(GOOD, number=2), *files(GOOD)]
MODEL = {"weights_id": "77" * 32, "name": "x", "architecture": "x", "dtype": "x", "num_layers": 1, "num_kv_heads": 1,
         "head_dim": 1, "vocab_size": 1, "max_positions": None}  # fmt: skip


def of_model(**changes: Any) -> bytes:
    return tar_of(closed([description(), ("index-000001.jsonl", compact({"model": MODEL | changes}))]))


HOSTILE_INDEXES = {
    "a representation twice": (tar_of(bundle_of(TWICE)), "comes twice"),
    "a part twice": (tar_of(bundle_of([*GOOD, GOOD[0]])), "each of its parts once"),
    "a representation without parts": (of_lines(parts=[]), r"length >= 1 - at `\$.representation.parts"),
    "brackets": (of_index(b"[" * 10**5), "cannot be read"),
    "a list": (of_index(b"[]"), "Expected `object`, got `array`"),
    "a line without end": (of_index(b" " * (1 << 18)), "too long"),
    "empty lines": (of_index(b"\n" * 10**5), "cannot be read"),
    "no JSON": (of_index(b"\xff\xfe"), "cannot be read"),
    "NaN": (of_lines(label=float("nan")), "JSON is malformed"),
    "a number of 10,000 digits": (of_index(b'{"representation": ' + b"1" * 10000 + b"}"), "cannot be read"),
    "a name twice": (of_index(b'{"model": 1, "model": 2}'), "cannot be read"),
    "a good name twice": (with_field(b'"label":"a"'), "appears twice"),
    "an unknown name twice": (with_field(b'"x":1,"x":1'), "appears twice"),
    "bytes that are no text": (with_field(b'"x":"\xed\xa0\x80"'), "utf-8"),
    "two things in a line": (of_index(b'{"model": {}, "tokenizer": {}}'), "cannot be read"),
    "something unknown": (of_index(b'{"note": {}}'), "cannot be read"),
    "nothing": (of_index(b'{"representation": {}}'), "cannot be read"),
    "an index of 16 MiB": (of_index(bytes(1 << 24)), "claims 16,777,216 bytes"),
    "a short address": (of_lines(address="00"), "0-9a-f.*64.* at `.*address`"),
    "an address in capitals": (of_lines(address=KEY.address.hex().upper()), "0-9a-f.*64.* at `.*address`"),
    "an address and a line's end": (of_lines(address=KEY.address.hex() + "\n"), "length <= 64 - at `.*address`"),
    "a number for a label": (of_lines(label=1), "Expected `str . null`, got `int`"),
    "a label that is no text": (of_lines(label="\ud800"), "cannot be read"),
    "a label without end": (of_lines(label="x" * 5000), "length <= 4096 - at `.*label`"),
    "a number for a pin": (of_lines(is_pinned=1), "is_pinned"),
    "true for a size": (of_entry(nbytes=True), "Expected `int`, got `bool` - at `.*nbytes`"),
    "a size below zero": (of_entry(nbytes=-1), "Expected `int` >= 0 - at `.*nbytes`"),
    "a size beyond tar": (of_entry(nbytes=1 << 33), "Expected `int` <= 8589934591 - at `.*nbytes`"),
    "a digest of another length": (of_entry(xxh3_128="00"), "0-9a-f.*32.* at `.*xxh3_128`"),
    "a part that there is not": (of_entry(part="weights"), "each of its parts once, and no others"),
    "a list for a part": (of_entry(part=[]), "cannot be read"),
    "a model without name": (of_model(name=None), "Expected `str`, got `null` - at `.*name`"),
    "a model of a huge size": (of_model(vocab_size=2**63), "Expected `int` <= 9007199254740992 - at `.*vocab_size`"),
    "a bundle that begins with something else": (tar_of(bundle_of(PARTS)[1:]), "does not begin with bundle.json"),
    "a beginning of 8 GiB": (instead(entry("bundle.json", size=HUGE), place=0), "does not begin with bundle.json"),
    "a newer bundle": (tar_of(bundle_of(PARTS, format=2)), "format 2.*Upgrade"),
    "a bundle of no format": (tar_of(bundle_of(PARTS, format=True)), "Expected `int`, got `bool` - at `.*format`"),
    "a bundle of unknown fidelity": (tar_of(bundle_of(PARTS, fidelity="int4")), "int4, unknown to this version"),
    "another archive": (tar_of([("etc/passwd", b"root")]), "does not begin with bundle.json"),
    "an empty archive": (tar_of([]), "ends early"),
    "no index": (tar_of(closed([description(), *files(PARTS)])), "index-000001.jsonl should come"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_INDEXES)
def test_before_the_parts_is_refused(what: str, empty: bp.Database) -> None:
    bundle, message = HOSTILE_INDEXES[what]
    with pytest.raises(FormatError, match=message):
        imported(empty, bundle)
    assert stored(empty) == {}


def of_end(**changes: Any) -> bytes:
    members = bundle_of(PARTS)
    end = json.loads(members[-1][1]) | changes
    return tar_of([*members[:-1], ("end.json", compact(end))])


HOSTILE_ENDS = {
    "another number of parts": (of_end(num_parts=7), "does not fit"),
    "another digest": (of_end(xxh3_128="00" * 16), "does not fit"),
    "no end": (tar_of(bundle_of(PARTS)[:-1]), "ends early"),
    "a part that nothing announced": (tar_of([*bundle_of(PARTS)[:-1], ("x", b"x")]), "should come, not 'x'"),
    "a part after the end": (tar_of([*bundle_of(PARTS), ("x", b"x")]), "something follows"),
    "garbage after the end": (tar_of(bundle_of(PARTS)) + b"garbage", "something follows"),
    "another bundle": (tar_of(bundle_of(PARTS)) * 2, "something follows"),
    "zeros without end": (tar_of(bundle_of(PARTS)) + bytes(2 << 20), "something follows"),
    "a second group with the same": (tar_of(closed(TWO_GROUPS)), "comes twice"),
}


@pytest.mark.parametrize("what", HOSTILE_ENDS)
def test_at_the_end_is_refused_and_the_parts_are_kept(what: str, empty: bp.Database) -> None:
    bundle, message = HOSTILE_ENDS[what]
    with pytest.raises(FormatError, match=message):
        imported(empty, bundle)
    assert stored(empty) == dict(GOOD if "second" in what else PARTS)


class TestDamage:
    @given(st.data())
    def test_a_flipped_bit_is_found_wherever_it_means_something(self, data: st.DataObject) -> None:
        bundle, originals = _bundle(), dict(blobs(chain("a", "b")))
        place = data.draw(st.integers(0, len(bundle) - 1024 - 1))
        damaged = bytearray(bundle)
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
        with bp.open(MEMORY) as db:
            # The checksum of a tar header can be written in several ways, and is no part of what it sums up.
            with contextlib.suppress(FormatError) if place in _checksums(bundle) else pytest.raises(FormatError):
                imported(db, bytes(damaged))
                assert stored(db) == originals
            assert stored(db).items() <= originals.items()

    @given(st.data())
    def test_a_bundle_that_ends_early_is_an_error_and_what_came_is_kept(self, data: st.DataObject) -> None:
        bundle = _bundle()
        num_kept = data.draw(st.integers(0, len(bundle) - 1024 - 1))
        with bp.open(MEMORY) as db:
            with pytest.raises(FormatError, match="ends early"):
                imported(db, bundle[:num_kept])
            came = stored(db)
            assert set(came) == {key for key, end in _ends(bundle).items() if end <= num_kept}
            assert imported(db, bundle).num_known == len(came)
            assert stored(db) == dict(blobs(chain("a", "b")))

    def test_says_how_much_was_stored(self, empty: bp.Database) -> None:
        with pytest.raises(FormatError, match=r"ends early.*\. Before that, 6 parts were stored") as caught:
            imported(empty, _bundle()[: -1024 - 600])
        assert "import it again" in caught.value.hint

    def test_zeros_after_the_end_are_nothing_and_their_lack_neither(self, empty: bp.Database) -> None:
        for bundle in (_bundle() + bytes(10240), _bundle()[:-1024], _bundle()[:-512]):
            assert imported(empty, bundle).num_orphaned == 0

    @given(st.binary(max_size=2000))
    def test_any_bytes_are_refused(self, content: bytes) -> None:
        with bp.open(MEMORY) as db, pytest.raises(FormatError):
            imported(db, content)


def _bundle() -> bytes:
    return tar_of(bundle_of(blobs(chain("a", "b"))))


def _checksums(bundle: bytes) -> set[int]:
    """Where the checksums of headers are."""
    with tarfile.open(fileobj=io.BytesIO(bundle)) as archive:
        return {each.offset + place for each in archive for place in range(148, 156)}


def _ends(bundle: bytes) -> dict[Key, int]:
    """Where each part ends in a bundle."""
    names = {part_name(key): key for key, _ in blobs(chain("a", "b"))}
    with tarfile.open(fileobj=io.BytesIO(bundle)) as archive:
        return {names[each.name]: each.offset_data + each.size for each in archive if each.name in names}


@pytest.mark.parametrize("claimed", [HUGE, 1 << 31])
def test_a_bomb_costs_no_memory(claimed: int, empty: bp.Database) -> None:
    """A part that claims gigabytes, in its header too, of which there are a few bytes."""
    key, blob = blobs(chain("a"), [Part.LOGITS])[0]
    header, _ = taken_apart(blob)
    nbytes = 4 * ((claimed - 4096) // 4)
    header["logits"] |= {"shape": [nbytes // 4], "data_offsets": [0, nbytes]}
    beginning = with_header(header, b"")
    line = json.loads(index([(key, b"")])[1])
    line["representation"]["parts"][0]["nbytes"] = len(beginning) + nbytes
    member = entry(part_name(key), beginning, size=len(beginning) + nbytes)
    bundle = tar_of([description(), ("index-000001.jsonl", compact(line)), member])
    tracemalloc.start()
    with pytest.raises(FormatError, match="ends early"):
        imported(empty, bundle)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_an_orphan_is_left_out_and_counted(empty: bp.Database) -> None:
    orphans = blobs(chain("a", "b", "c")[1:])
    done = imported(empty, tar_of(bundle_of(orphans)))
    assert (done.num_stored, done.num_orphaned) == (4, 2)
    assert Part.KV not in {key.part for key in stored(empty)}


def test_a_newer_part_says_so(empty: bp.Database) -> None:
    with pytest.raises(FormatTooNew, match="Upgrade"):
        imported(empty, of_blob(altered(format=2)))


def test_what_a_model_is_called_elsewhere_changes_no_name_here(open_db: Any) -> None:
    db = open_db()
    imported(db, of_model(name="first"))
    imported(db, of_model(name="second"))
    assert [model.name for model in db.catalog.models()] == ["first"]
