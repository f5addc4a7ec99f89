"""How strings become tokens: start tokens, seams, and cuts that change nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import deepcopy
from itertools import chain, pairwise
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import backprompt_db as bp
from backprompt_db.compute.tokens import SegmentTokenizer, definition, start_ids
from backprompt_db.errors import InvalidText, UnsupportedModel
from backprompt_db.prompt.text import Text
from tests.conftest import CORPUS, train_tokenizer
from tests.support.tokenizers import KINDS, tokenizer_of

WORDS = st.sampled_from(["the", " quick", " fox", "\n", "  ", "endpoint", " GET", "é", "🙂", ".", " request", "7"])
STRINGS = st.lists(WORDS, min_size=1, max_size=60).map("".join)


@pytest.fixture(scope="module")
def prefixing_tokenizer() -> PreTrainedTokenizerFast:
    """Like SentencePiece: every string begins with a space, and merges know no words."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>"], show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="module")
def tokenizer_with_two_start_tokens() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> </s> $A", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


def pieces_of(string: str, cuts: list[int]) -> list[str]:
    return [string[first:last] for first, last in pairwise([0, *cuts, len(string)])]


def run_tokens(tokenizer: Any, pieces: list[str]) -> list[int]:
    """The tokens that a prompt of these pieces is run with."""
    text = sum(map(Text, pieces), Text(""))
    return list(chain.from_iterable(SegmentTokenizer(tokenizer).encode(text.segments()).values()))


def test_a_tokenizer_without_special_tokens_puts_nothing_before_a_prompt(tokenizer: Any) -> None:
    assert start_ids(tokenizer) == []


def test_a_bos_token_comes_before_first_segments_only(tokenizer_with_bos: Any) -> None:
    encoded = SegmentTokenizer(tokenizer_with_bos).encode((Text("the") + " fox").segments())
    first, second = encoded.values()
    assert first[0] == tokenizer_with_bos.bos_token_id
    assert tokenizer_with_bos.bos_token_id not in [*first[1:], *second]


def test_a_start_token_that_the_prompt_writes_itself_is_not_put_there_twice(tokenizer_with_bos: Any) -> None:
    bos = tokenizer_with_bos.bos_token_id
    assert run_tokens(tokenizer_with_bos, ["<s>the"]) == run_tokens(tokenizer_with_bos, ["the"])
    assert run_tokens(tokenizer_with_bos, ["<s>", "the"])[:2].count(bos) == 1
    assert run_tokens(tokenizer_with_bos, ["the", "<s>"])[-1] == bos


def test_cuts_never_part_the_start_tokens_that_a_string_writes(tokenizer_with_two_start_tokens: Any) -> None:
    string = "<s></s>the quick brown fox"
    tokenizer = SegmentTokenizer(tokenizer_with_two_start_tokens)
    assert tokenizer.start_ids == [0, 1]
    assert tokenizer.exact_cuts(string, [3, 7, 10]) == [7, 10]
    for cuts in ([], tokenizer.cuts(string, 1)):
        ids = run_tokens(tokenizer_with_two_start_tokens, pieces_of(string, cuts))
        assert ids == tokenizer_with_two_start_tokens(string, add_special_tokens=False)["input_ids"]
    assert len(tokenizer.cuts(string, 1)) > 3


def test_only_the_cuts_that_change_tokens_are_left_out(tokenizer: Any, prefixing_tokenizer: Any) -> None:
    string = "the endpoint of the dog"
    assert SegmentTokenizer(tokenizer).exact_cuts(string, [3, 9, 12, 15]) == [3, 12, 15]
    # What follows a cut is given a space, which is right after special tokens alone.
    assert SegmentTokenizer(prefixing_tokenizer).exact_cuts("the<s>dog<s>fox", [3, 5, 6, 9]) == [3, 6, 9]
    assert SegmentTokenizer(prefixing_tokenizer).exact_cuts("the dog<s>fox", [3, 4, 7]) == [7]


@given(string=STRINGS, data=st.data())
def test_pieces_between_exact_cuts_have_the_tokens_of_the_whole_string(
    tokenizer: Any, prefixing_tokenizer: Any, string: str, data: st.DataObject
) -> None:
    places = st.lists(st.integers(1, max(1, len(string) - 1)), unique=True).map(sorted)
    string += "."
    asked = data.draw(places)
    for each in (tokenizer, prefixing_tokenizer):
        cuts = SegmentTokenizer(each).exact_cuts(string, asked)
        ids = [token for piece in pieces_of(string, cuts) for token in each(piece)["input_ids"]]
        assert ids == each(string)["input_ids"]
        assert set(cuts) <= set(asked)


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
    stripping = deepcopy(tokenizer)
    stripping.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(InvalidText, match="no tokens"):
        SegmentTokenizer(stripping).encode((Text("the") + " ").segments())


@given(string=STRINGS, size=st.integers(1, 20))
def test_cut_pieces_have_exactly_the_tokens_of_the_whole_string(tokenizer: Any, string: str, size: int) -> None:
    pieces = pieces_of(string, SegmentTokenizer(tokenizer).cuts(string, size))
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


@pytest.mark.parametrize("split", [0, -1, 2.5, "8"])
def test_a_split_that_is_no_number_of_tokens_is_refused(lm: bp.LanguageModel, split: Any) -> None:
    with pytest.raises(bp.errors.PromptError, match="split"):
        lm.text("text", split=split)


def test_a_tokenizer_that_is_changed_in_place_is_another_key(
    gpt2: Any, tokenizer: Any, make_lm: Callable[..., bp.LanguageModel], db: bp.Database
) -> None:
    lm = bp.LanguageModel(gpt2, deepcopy(tokenizer), db=db)
    before = lm("The Quick Brown Fox")
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    after = lm("The Quick Brown Fox")
    assert after.num_cached_tokens == 0
    assert after.input_ids.tolist() == tokenizer("the quick brown fox")["input_ids"] != before.input_ids.tolist()


class InterruptedTokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]  # transformers is untyped
    """A tokenizer that another thread uses each time when it has been told how to truncate, before it encodes."""

    meanwhile: ClassVar[Callable[[], object]]

    def set_truncation_and_padding(self, *given: Any, **named: Any) -> None:
        super().set_truncation_and_padding(*given, **named)
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=InterruptedTokenizer.meanwhile)
            thread.start()
            thread.join()


def pad(tokenizer: Any) -> None:
    tokenizer(["the", "the quick brown fox"], padding="max_length", max_length=100)


def truncate(tokenizer: Any) -> None:
    tokenizer("the quick brown fox", truncation=True, max_length=2)


def add_special_tokens(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra {len(tokenizer)}>"]})


@pytest.mark.parametrize("use", [pad, truncate, add_special_tokens])
def test_what_another_thread_does_with_the_tokenizer_changes_no_tokens(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, use: Callable[[Any], None]
) -> None:
    shared = InterruptedTokenizer(tokenizer_object=tokenizer.backend_tokenizer, pad_token="</s>")
    monkeypatch.setattr(InterruptedTokenizer, "meanwhile", lambda: use(shared), raising=False)
    known, string = SegmentTokenizer(shared), "the quick brown fox jumps over the dog"
    for number in range(3):
        known.id  # noqa: B018 - read at the beginning of each call
        (ids,) = known.encode(Text(string + str(number)).segments()).values()
        assert ids == tokenizer(string + str(number))["input_ids"]
        assert known.cuts(string, 2) == SegmentTokenizer(tokenizer).cuts(string, 2)


def test_padding_and_truncation_that_a_user_has_set_stay_set(tokenizer: Any) -> None:
    used = deepcopy(tokenizer)
    used.backend_tokenizer.enable_truncation(3)
    used.backend_tokenizer.enable_padding(length=5)
    known = SegmentTokenizer(used)
    assert known.id == SegmentTokenizer(tokenizer).id
    assert list(known.encode(Text("the quick brown fox jumps").segments()).values()) == [
        tokenizer("the quick brown fox jumps")["input_ids"]
    ]
    assert used.backend_tokenizer.truncation["max_length"] == 3
    assert used.backend_tokenizer.padding["length"] == 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_id_is_that_of_the_tokenizer_as_it_was_given(kind: str) -> None:
    given = tokenizer_of(kind)
    known = SegmentTokenizer(given)
    assert known.definition() == definition(given, start_ids(given))
