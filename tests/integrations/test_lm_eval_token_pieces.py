"""The pieces that a request becomes have exactly the tokens that the harness's own model would run."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from backprompt_db.cli.demo.smollm2 import smollm2_directory
from backprompt_db.compute.tokens import SegmentTokenizer
from backprompt_db.integrations.lm_eval.token_pieces import PieceFinder
from backprompt_db.prompt.text import Text
from tests.support.harness import SHOTS, prefixing_tokenizer, tokenizing

WORDS = st.sampled_from(
    [
        "the",
        " quick",
        "fox",
        "\n",
        "\n\n",
        " ",
        "  ",
        "endpoint",
        " GET",
        "é",
        "🙂",
        "你好",
        ".",
        "</s>",
        "7",
        "A",
        "ing",
    ]
)
STRINGS = st.lists(WORDS, min_size=1, max_size=40).map("".join) | st.text(min_size=1, max_size=20)


@pytest.fixture(scope="module")
def smollm2_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(smollm2_directory())


@pytest.fixture(params=["byte-level", "with bos", "prefixing", "smollm2"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Any, tokenizer_with_bos: Any) -> Any:
    if request.param == "smollm2":
        return request.getfixturevalue("smollm2_tokenizer")
    return {"byte-level": tokenizer, "with bos": tokenizer_with_bos}.get(request.param) or prefixing_tokenizer()


def run_tokens(tokenizer: Any, pieces: list[str]) -> list[int]:
    """The tokens that a prompt of these pieces is run with."""
    text = sum(map(Text, pieces), Text(""))
    return list(chain.from_iterable(SegmentTokenizer(tokenizer).encode(text.segments()).values()))


@given(context=STRINGS, continuation=STRINGS)
def test_the_pieces_of_a_request_have_the_tokens_of_the_hf_model(
    any_tokenizer: Any, context: str, continuation: str
) -> None:
    assume(context.strip())
    before, after = tokenizing(any_tokenizer)._encode_pair(context, continuation)
    assume(before and after)
    found = PieceFinder(any_tokenizer).divide(before + after, cut=len(before))
    if found is None:  # no string begins with the continuation's tokens, or ends with the context's
        decoded = any_tokenizer.decode(after)
        alone = any_tokenizer.encode(decoded, add_special_tokens=False)
        context_alone = any_tokenizer.encode(any_tokenizer.decode(before), add_special_tokens=False)
        assert alone != after or context_alone != before
    else:
        assert run_tokens(any_tokenizer, found[0]) == before
        assert run_tokens(any_tokenizer, [*found[0], *found[1]]) == before + after


@given(st.lists(st.text("ab \n.Q:", min_size=1, max_size=30), min_size=1, max_size=6), st.integers(1, 40))
def test_plain_text_can_be_cut_anywhere_a_word_begins(
    tokenizer: Any, smollm2_tokenizer: Any, lines: list[str], place: int
) -> None:
    string = "Q: " + "\n\n".join(lines)
    for each in (tokenizer, smollm2_tokenizer):
        ids = each.encode(string)
        cut = 1 + place % max(1, len(ids) - 1)
        assume(cut < len(ids))
        found = PieceFinder(each).divide(ids, cut=cut)
        if found is not None:
            assert run_tokens(each, found[0]) == ids[:cut]
            assert "".join([*found[0], *found[1]]) == string


def test_pieces_end_between_examples(smollm2_tokenizer: Any) -> None:
    ids = smollm2_tokenizer.encode(SHOTS + "Question: Which one?\nAnswer: GET")
    pieces, (completion,) = PieceFinder(smollm2_tokenizer).divide(ids, cut=len(ids) - 1) or ([], [""])
    assert [piece.strip("\n").count("Question") for piece in pieces] == [1, 1, 1, 1]
    assert "".join(pieces) + completion == SHOTS + "Question: Which one?\nAnswer: GET"


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
def test_what_follows_does_not_move_the_places_before_it(smollm2_tokenizer: Any, separator: str) -> None:
    shots = separator.join(["the quick brown fox jumps over the lazy dog and runs away again"] * 30)
    divided = []
    for ending in (" Which one?", separator + "Another question, and a much longer one.", ""):
        ids = smollm2_tokenizer.encode(shots + ending)
        before, _ = PieceFinder(smollm2_tokenizer).divide(ids, cut=len(ids)) or ([], [])
        divided.append(before)
    shared = min(map(len, divided)) - 1
    assert shared >= 1
    assert divided[0][:shared] == divided[1][:shared] == divided[2][:shared]


def test_half_of_a_character_has_no_pieces(tokenizer: Any) -> None:
    ids = tokenizer.encode("a🙂b")
    assert len(ids) == 6
    assert PieceFinder(tokenizer).divide(ids, cut=2) is None
    assert PieceFinder(tokenizer).divide(ids, cut=5) == (["a🙂"], ["b"])


def test_a_prompt_without_its_start_tokens_has_no_pieces(tokenizer_with_bos: Any) -> None:
    ids = tokenizer_with_bos.encode("the quick fox")
    assert PieceFinder(tokenizer_with_bos).divide(ids, cut=len(ids)) == (["the quick fox"], [])
    assert PieceFinder(tokenizer_with_bos).divide(ids[1:], cut=len(ids) - 1) is None


def test_a_start_token_alone_is_a_piece_under_its_name(tokenizer_with_bos: Any) -> None:
    ids = [tokenizer_with_bos.bos_token_id, *tokenizer_with_bos.encode("the fox")]
    found = PieceFinder(tokenizer_with_bos).divide(ids, cut=1)
    assert found is not None
    assert found[0] == ["<s>"]
    assert run_tokens(tokenizer_with_bos, [*found[0], *found[1]]) == ids
