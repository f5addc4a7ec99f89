"""The names of values never change within a format, and nothing but what they are made of changes them."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprompt_db.errors import InvalidText, PromptError
from backprompt_db.prompt.ids import (
    Address,
    ModelIds,
    SegmentId,
    TokenizerId,
    WeightsId,
    address,
    namespace_id,
    segment_id,
)

GOLDEN: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "data" / "golden_keys.json").read_text(encoding="ascii")
)
IDS = st.binary(min_size=32, max_size=32).map(SegmentId)
STRINGS = st.text(st.characters(exclude_categories=["Cs"]))
STARTS = st.none() | st.integers(0, 2**63 - 1)


def string_of(vector: dict[str, Any], name: str) -> str:
    return str(vector[name]) * int(vector.get("times", 1))


def expected_segment_id(string: str, parents: list[bytes], start: int | None) -> bytes:
    """The byte layout of format 1, written a second time."""
    unique = sorted(set(parents))
    text = string.encode()
    return hashlib.sha256(
        b"backprompt-db/segment/1\0"
        + struct.pack(">I", len(unique))
        + b"".join(unique)
        + struct.pack(">qQ", -1 if start is None else start, len(text))
        + text
    ).digest()


def expected_namespace_id(name: str) -> bytes:
    return hashlib.sha256(
        b"backprompt-db/namespace/1\0" + struct.pack(">Q", len(name.encode())) + name.encode()
    ).digest()


@pytest.mark.parametrize("vector", GOLDEN["segments"], ids=lambda vector: vector["about"])
def test_a_segment_id_is_the_frozen_one(vector: dict[str, Any]) -> None:
    parents = [bytes.fromhex(parent) for parent in vector["parents"]]
    string, start = string_of(vector, "string"), vector["start"]
    assert expected_segment_id(string, parents, start).hex() == vector["segment_id"]
    assert segment_id(string, parents=map(SegmentId, parents), start=start).hex() == vector["segment_id"]


@pytest.mark.parametrize("vector", GOLDEN["namespaces"], ids=lambda vector: vector["about"])
def test_a_namespace_id_is_the_frozen_one(vector: dict[str, Any]) -> None:
    found = namespace_id(string_of(vector, "namespace"))
    assert found is not None
    assert found.hex() == vector["namespace_id"] == expected_namespace_id(string_of(vector, "namespace")).hex()


@pytest.mark.parametrize("vector", GOLDEN["addresses"], ids=lambda vector: vector["about"])
def test_an_address_is_the_frozen_one(vector: dict[str, Any]) -> None:
    pieces = [bytes.fromhex(vector[name]) for name in ("segment_id", "weights_id", "tokenizer_id")]
    assert hashlib.sha256(b"backprompt-db/address/1\0" + b"".join(pieces)).hexdigest() == vector["address"]
    segment, weights, tokenizer = pieces
    found: Address = address(SegmentId(segment), WeightsId(weights), TokenizerId(tokenizer))
    assert found.hex() == vector["address"]


def test_the_frozen_names_are_all_different() -> None:
    same_on_purpose = {"two parents in the other order", "a parent named twice"}
    names = [vector["segment_id"] for vector in GOLDEN["segments"] if vector["about"] not in same_on_purpose]
    names += [vector["namespace_id"] for vector in GOLDEN["namespaces"]]
    names += [vector["address"] for vector in GOLDEN["addresses"]]
    assert len(set(names)) == len(names)


@given(STRINGS, st.lists(IDS, max_size=5), STARTS)
def test_a_segment_id_follows_the_layout(string: str, parents: list[SegmentId], start: int | None) -> None:
    expected = expected_segment_id(string, list(parents), start)
    assert segment_id(string, parents=parents, start=start) == expected


@given(STRINGS, st.lists(IDS, max_size=5), st.randoms())
def test_parents_are_a_set(string: str, parents: list[SegmentId], random: Any) -> None:
    shuffled = parents + parents[:2]
    random.shuffle(shuffled)
    assert segment_id(string, parents=shuffled) == segment_id(string, parents=parents)


def test_nothing_is_normalised() -> None:
    assert segment_id("\u00e9") != segment_id("e\u0301")
    assert segment_id("a\r\n") != segment_id("a\n")


def test_no_start_is_not_start_zero() -> None:
    assert segment_id("a") != segment_id("a", start=0)


def test_the_default_namespace_has_no_id() -> None:
    assert namespace_id("") is None


@pytest.mark.parametrize("string", ["\ud800", "a\udfffb", "ok\udc80"])
def test_a_lone_surrogate_is_refused_by_its_place(string: str) -> None:
    place = next(i for i, character in enumerate(string) if "\ud800" <= character <= "\udfff")
    for name in (segment_id, namespace_id):
        with pytest.raises(InvalidText, match=rf"U\+D[8-F].. *\) at character {place}"):
            name(string)


@pytest.mark.parametrize("start", [-1, -(2**63), 2**63, 1.5, "0"])
def test_a_start_that_is_no_position_is_refused(start: Any) -> None:
    with pytest.raises(PromptError, match="is not a position id"):
        segment_id("a", start=start)


def test_ids_of_a_model_are_shown_by_their_first_digits() -> None:
    assert repr(ModelIds(WeightsId(b"w" * 32), TokenizerId(b"t" * 32))) == "ModelIds(777777777777, 747474747474)"
