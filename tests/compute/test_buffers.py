"""Buffers of keys and values between passes: what they hold is right, and little of them is air."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.compute.inference.kv_cache import KVBuffer, KVShape, acquire_prefix, release_prefix
from backprompt_db.database.memory_cache import MemoryCache
from backprompt_db.prompt.ids import Address
from tests.conftest import plain_logprobs

SHAPE = KVShape(num_layers=2, num_kv_heads=1, key_dim=2, value_dim=3, dtype=torch.float32)
LONGEST = 256

CHAINS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 5, 40])), max_size=4)
"""Segments, each a name and a number of tokens."""


def assert_right(lm: bp.LanguageModel, text: bp.Text) -> None:
    result = text()
    logprobs, _ = plain_logprobs(lm.model, result.input_ids)
    assert torch.allclose(result.token_logprobs, logprobs, atol=1e-4, equal_nan=True)


def buffers(lm: bp.LanguageModel) -> list[KVBuffer]:
    return lm.db.memory.grouped()


def contents(chain: list[tuple[int, int]]) -> list[tuple[Address, int]]:
    """What a buffer lists: the name of a segment says also what is before it."""
    names = [bytes(name for name, _ in chain[: number + 1]) for number in range(len(chain))]
    lengths = [num_tokens for _, num_tokens in chain]
    return [
        (Address(b"%r %r" % (name, lengths[: len(name)])), length) for name, length in zip(names, lengths, strict=True)
    ]


def fill(buffer: KVBuffer, added: list[tuple[Address, int]]) -> None:
    """Append numbers that tell segments apart, as a pass would."""
    for address, num_tokens in added:
        for whole in (buffer.keys, buffer.values):
            whole[:, :, :, buffer.length : buffer.length + num_tokens] = float(hash(address) % 9973)
        buffer.length += num_tokens


def assert_filled(buffer: KVBuffer) -> None:
    begin = 0
    for address, num_tokens in buffer.contents:
        for whole in (buffer.keys, buffer.values):
            assert (whole[:, :, :, begin : begin + num_tokens] == float(hash(address) % 9973)).all()
        begin += num_tokens
    assert buffer.length == begin <= buffer.capacity


@given(
    st.lists(st.tuples(CHAINS, st.lists(st.integers(0, 3), max_size=2)), max_size=25), st.sampled_from([10**4, 10**6])
)
def test_a_buffer_holds_what_it_lists(
    passes: list[tuple[list[tuple[int, int]], list[int]]], budget_nbytes: int
) -> None:
    memory = MemoryCache(budget_nbytes)
    for chain, new in passes:
        context = contents(chain)
        computed = contents([*chain, *((name, 5) for name in new)])[len(chain) :]
        room = 5 * len(new)
        buffer = acquire_prefix(memory, SHAPE, context, room=room, longest=LONGEST, device=torch.device("cpu"))
        assert buffer.contents == context[: len(buffer.contents)]
        assert_filled(buffer)
        assert buffer.capacity >= sum(num_tokens for _, num_tokens in context) + room
        rest = context[len(buffer.contents) :]
        fill(buffer, rest)
        buffer.contents += rest
        fill(buffer, computed)
        buffer.follow(computed, num_followed=max(0, len(computed) - 1))
        assert_filled(buffer)
        release_prefix(memory, buffer)
        assert memory.nbytes == sum(each.nbytes for each in memory.grouped()) <= budget_nbytes


def test_unrelated_short_prompts_leave_one_buffer(lm: bp.LanguageModel) -> None:
    for number in range(12):
        assert_right(lm, lm.text(f"prompt {number}"))
        (only,) = buffers(lm)
    assert lm.db.memory.nbytes < 2 * only.nbytes


@pytest.mark.parametrize("keep", ["auto", "all"])
def test_short_prompts_with_one_prefix_hold_one_copy_of_it(make_lm: Any, db: bp.Database, keep: str) -> None:
    lm = make_lm(db=db, keep=keep)
    prefix = lm.text("Pick.\n")
    for number in range(12):
        assert_right(lm, prefix + f"a request that is longer than its prefix, {number}")
        (only,) = buffers(lm)
        assert only.contents[0][1] == len(lm.tokenizer("Pick.\n")["input_ids"])


def test_contexts_that_take_turns_fill_half_of_their_buffers(lm: bp.LanguageModel) -> None:
    contexts = [lm.text(f"{number}: pick the endpoint for the request.\n") for number in range(6)]
    for number in range(3):
        for context in contexts:
            assert_right(lm, context + f"request {number}")
    *others, _ = sorted(buffers(lm), key=lambda buffer: buffer.capacity)
    assert len(others) == len(contexts) - 1
    for buffer in others:
        assert 2 * sum(num_tokens for _, num_tokens in buffer.contents) >= buffer.capacity


def test_short_prompts_push_no_long_prefix_out(make_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bp.open(tmp_path / "db", memory_nbytes=600_000) as db:
        lm = make_lm(db=db)
        document = lm.text("The quick brown fox jumps over the lazy dog. " * 6)
        assert_right(lm, document + "first")
        for number in range(12):
            assert_right(lm, lm.text(f"prompt {number}\n") + "request")
        db.flush()
        monkeypatch.setattr(db, "load", lambda *_: pytest.fail("keys and values were read again"))
        assert_right(lm, document + "second")
