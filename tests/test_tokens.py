"""How strings become tokens: start tokens, seams, and cuts that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.compute.tokens import SegmentTokenizer, start_ids
from backprompt_db.errors import InvalidText, UnsupportedModel
from backprompt_db.text import Text

from .conftest import CORPUS

WORDS = st.sampled_from(["the", " quick", " fox", "\n", "  ", "endpoint", " GET", "é", "🙂", ".", " request", "7"])
STRINGS = st.lists(WORDS, min_size=1, max_size=60).map("".join)


def test_a_tokenizer_without_special_tokens_puts_nothing_before_a_prompt(tokenizer: Any) -> None:
    assert start_ids(tokenizer) == []


def test_a_bos_token_comes_before_first_segments_only(tokenizer_with_bos: Any) -> None:
    encoded = SegmentTokenizer(tokenizer_with_bos).encode((Text("the") + " fox").segments())
    first, second = encoded.values()
    assert first[0] == tokenizer_with_bos.bos_token_id
    assert tokenizer_with_bos.bos_token_id not in [*first[1:], *second]


def test_a_text_that_merges_across_a_seam_lists_it(lm: bp.LanguageModel) -> None:
    (seam,) = (lm.text("the endpo") + "int" + " of").seams()
    assert (seam.left, seam.right) == ("the endpo", "int")
    assert "".join(seam.tokens_apart) == "".join(seam.tokens_joined)
    assert len(seam.tokens_joined) < len(seam.tokens_apart)


def test_a_text_cut_at_words_has_no_seams(lm: bp.LanguageModel) -> None:
    assert (lm.text("the quick") + " brown" + " fox").seams() == []


def test_seams_are_found_between_every_branch_and_what_follows(lm: bp.LanguageModel) -> None:
    text = lm.text("the") + bp.parallel(" endpo", " fox") + "int"
    assert [seam.left for seam in text.seams()] == [" endpo"]


def test_a_piece_without_tokens_is_refused(tokenizer: Any) -> None:
    from copy import deepcopy

    from tokenizers import normalizers

    stripping = deepcopy(tokenizer)
    stripping.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(InvalidText, match="no tokens"):
        SegmentTokenizer(stripping).encode((Text("the") + " ").segments())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(string=STRINGS, size=st.integers(1, 20))
def test_cut_pieces_have_exactly_the_tokens_of_the_whole_string(tokenizer: Any, string: str, size: int) -> None:
    cuts = SegmentTokenizer(tokenizer).cuts(string, size)
    pieces = [string[first:last] for first, last in pairwise([0, *cuts, len(string)])]
    ids = [token for piece in pieces for token in tokenizer(piece)["input_ids"]]
    assert "".join(pieces) == string
    assert all(pieces)
    assert ids == tokenizer(string)["input_ids"]


def test_long_strings_with_a_common_beginning_share_it(lm: bp.LanguageModel) -> None:
    common = "".join(CORPUS)
    first, second = (lm.text(common + end, split=16) for end in (" one end", " and another end, longer than the first"))
    lm(first)
    result = lm(second)
    assert len(first.segments()) > 5
    assert result.num_cached_tokens > 0.5 * len(result.input_ids)
    assert result.input_ids.tolist() == lm.tokenizer(str(second))["input_ids"]


def test_cuts_are_remembered_so_that_the_tokenizer_is_not_needed(
    lm: bp.LanguageModel, make_lm: Callable[..., bp.LanguageModel]
) -> None:
    text = lm.text("".join(CORPUS), split=16)
    again = make_lm(db=lm.db).text("".join(CORPUS), split=16)
    assert [s.string for s in text.segments()] == [s.string for s in again.segments()]


def test_a_short_string_is_not_cut(lm: bp.LanguageModel) -> None:
    assert len(lm.text("the quick brown fox", split=100).segments()) == 1
    assert not lm.text("", split=100)


def test_a_tokenizer_that_rewrites_what_it_wraps_is_refused(tokenizer: Any) -> None:
    class Rewriting:
        is_fast = False
        special_tokens_map: ClassVar[dict[str, str]] = {}

        def __len__(self) -> int:
            return 5

        def __call__(self, text: str | list[str], *, add_special_tokens: bool, **_: object) -> dict[str, Any]:
            ids = [1, 2, 3] if add_special_tokens else [4]
            return {"input_ids": ids if isinstance(text, str) else [ids for _ in text]}

    with pytest.raises(UnsupportedModel, match="special tokens"):
        SegmentTokenizer(Rewriting())
    with pytest.raises(bp.errors.PromptError, match="split"):
        bp.LanguageModel.text(object.__new__(bp.LanguageModel), "text", split=0)


def test_a_tokenizer_that_is_changed_in_place_is_another_key(
    gpt2: Any, tokenizer: Any, make_lm: Callable[..., bp.LanguageModel], db: bp.Database
) -> None:
    from copy import deepcopy

    from tokenizers import normalizers

    lm = bp.LanguageModel(gpt2, deepcopy(tokenizer), db=db)
    before = lm("The Quick Brown Fox")
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    after = lm("The Quick Brown Fox")
    assert after.num_cached_tokens == 0
    assert after.input_ids.tolist() == tokenizer("the quick brown fox")["input_ids"] != before.input_ids.tolist()
