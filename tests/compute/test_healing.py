"""What is concatenated is run with the tokens of the joined string, wherever it is cut."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.compute.engine import Engine
from backprompt_db.compute.healing import Healed, Healer
from backprompt_db.compute.inference.kv_cache import CACHE_KEYWORD
from backprompt_db.compute.plan import Wanted
from backprompt_db.compute.tokens import SegmentTokenizer
from backprompt_db.errors import PromptError
from backprompt_db.prompt.ids import TokenizerId
from tests.conftest import plain_logprobs, tiny_gpt2
from tests.support.catalogs import BAD_LISTS, put
from tests.support.tokenizers import KINDS, TEXTS, tokenizer_of

CONTEXT = "Pick the endpoint for the request.\nGET /users lists users. POST /orders creates an order.\n\nThe answer: "


@dataclass(frozen=True)
class Source:
    """A tokenizer without a model."""

    tokenizer: SegmentTokenizer

    @property
    def tokenizer_id(self) -> TokenizerId:
        return self.tokenizer.id


@pytest.fixture(scope="module")
def healers() -> Iterator[dict[str, Healer]]:
    with bp.open(":memory:") as db:
        yield {kind: Healer(Source(SegmentTokenizer(tokenizer_of(kind))), db.model_metadata) for kind in KINDS}


def chain(pieces: list[str], **options: Any) -> bp.Text:
    return sum((bp.Text(piece) for piece in pieces), bp.Text("", **options))


def healed(healer: Healer, text: bp.Text) -> Healed:
    (found,) = healer.heal([text], namespace="")
    return found


def tokens(healer: Healer, text: bp.Text) -> list[int]:
    """The tokens of the segments in which a text is run, each tokenised alone."""
    segments = healed(healer, text).segments
    assert "".join(segment.string for segment in segments) == "".join(each.string for each in text.segments())
    return [each for ids in healer._source.tokenizer.encode(segments).values() for each in ids]


def cut(string: str, places: list[int]) -> list[str]:
    return [string[begin:end] for begin, end in itertools.pairwise(sorted({0, *places, len(string)}))]


@st.composite
def pieces(draw: st.DrawFn) -> list[str]:
    """A few hundred characters of text in several scripts, cut at random."""
    texts = draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4))
    begin = draw(st.integers(0, min(60, len("".join(texts)) - 2)))
    string = "".join(texts)[begin : begin + draw(st.integers(2, 300))]
    extra = draw(st.sampled_from(["", " ", "\n\n", "   ", "<sep>", " <|im_end|>", "\r\n", "'", "\u0301", "🙂"]))
    string += extra + draw(st.sampled_from(["", " Review", "s", "ll", " 1", "\n", "é"]))
    return cut(string, draw(st.lists(st.integers(1, max(1, len(string) - 1)), min_size=1, max_size=8)))


@pytest.mark.parametrize("kind", KINDS)
class TestTokens:
    @given(pieces=pieces())
    def test_they_are_those_of_the_joined_string(
        self, healers: dict[str, Healer], kind: str, pieces: list[str]
    ) -> None:
        tokenizer = tokenizer_of(kind)
        joined = "".join(pieces)
        alone = tokenizer(joined, add_special_tokens=False)["input_ids"]
        if alone:
            start = healers[kind]._source.tokenizer.start_ids
            expected = alone if alone[: len(start)] == start else [*start, *alone]
            assert tokens(healers[kind], chain(pieces)) == expected

    @given(texts=st.permutations(TEXTS), places=st.lists(st.integers(1, 600), min_size=1, max_size=12))
    def test_they_are_in_long_texts_too(
        self, healers: dict[str, Healer], kind: str, texts: list[str], places: list[int]
    ) -> None:
        joined = "".join([*texts, *reversed(texts)])
        pieces = cut(joined, [*places, *(len(joined) - place for place in places)])
        alone = tokenizer_of(kind)(joined, add_special_tokens=False)["input_ids"]
        assert tokens(healers[kind], chain(pieces))[-len(alone) :] == alone

    @given(pieces=pieces(), number=st.integers(0, 8))
    def test_brackets_do_not_matter(
        self, healers: dict[str, Healer], kind: str, pieces: list[str], number: int
    ) -> None:
        left, right = chain(pieces[:number]), chain(pieces[number:])
        assert healed(healers[kind], left + right).tips == healed(healers[kind], chain(pieces)).tips

    @given(pieces=pieces())
    def test_what_is_healed_at_once_is_what_grows_piece_by_piece(
        self, healers: dict[str, Healer], kind: str, pieces: list[str]
    ) -> None:
        for end in range(1, len(pieces) + 1):
            grown = healed(healers[kind], chain(pieces[:end]))
        with bp.open(":memory:") as db:
            fresh = Healer(healers[kind]._source, db.model_metadata)
            assert healed(fresh, chain(pieces)).tips == grown.tips


def plain(lm: bp.LanguageModel, string: str) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """The oracle: tokens of the joined string, their log-probabilities, and the last logits."""
    ids = torch.tensor(lm.tokenizer(string)["input_ids"])
    return (ids.tolist(), *plain_logprobs(lm.model, ids))


def logprob(lm: bp.LanguageModel, string: str) -> float:
    return float(plain(lm, string)[1][1:].double().sum())


class TestNumbers:
    @given(pieces=pieces())
    def test_any_cut_gives_the_scores_and_logits_of_the_joined_string(
        self, make_lm: Callable[..., bp.LanguageModel], pieces: list[str]
    ) -> None:
        with bp.open(":memory:") as db:
            lm = make_lm(tiny_gpt2(n_positions=1024), db=db)
            for end in {1, len(pieces) // 2 or 1, len(pieces)}:
                result = lm(chain(pieces[:end]))
                ids, logprobs, logits = plain(lm, "".join(pieces[:end]))
                assert result.input_ids.tolist() == ids
                torch.testing.assert_close(result.token_logprobs, logprobs, atol=1e-4, rtol=0, equal_nan=True)
                torch.testing.assert_close(result.logits, logits, atol=1e-3, rtol=1e-4)

    def test_a_score_is_that_of_both_less_that_of_the_prompt(self, lm: bp.LanguageModel) -> None:
        completions = ["Request", "\nRequest", " list", "list", "\n", "9", "\n\n more"]
        together = lm.score(CONTEXT, completions)
        for completion, score in zip(completions, together, strict=True):
            assert score == pytest.approx(logprob(lm, CONTEXT + completion) - logprob(lm, CONTEXT), abs=1e-4)

    def test_a_score_does_not_depend_on_what_else_is_asked(self, make_lm: Callable[..., bp.LanguageModel]) -> None:
        completions = ["Request", "\nRequest", " list", "\n"]
        together = make_lm().score(CONTEXT, completions)
        alone = [make_lm().score(CONTEXT, [completion])[0] for completion in completions]
        np.testing.assert_allclose(together, alone, atol=1e-4)

    def test_a_completion_in_the_first_token_of_a_text_is_refused(self, lm: bp.LanguageModel) -> None:
        with pytest.raises(PromptError, match="first token of the prompt crosses the seam"):
            lm.score("P", ["ick the endpoint"])

    def test_generating_goes_on_from_the_joined_string(self, lm: bp.LanguageModel) -> None:
        joined = lm.generate(CONTEXT + "Request: show me everyone", max_new_tokens=5, do_sample=False)
        pieces = lm.generate(
            lm.text(CONTEXT) + "Requ" + "est: show me every" + "one", max_new_tokens=5, do_sample=False
        )
        assert pieces.token_ids.tolist() == joined.token_ids.tolist()

    def test_a_continuation_is_stored_only_if_the_joined_string_has_its_tokens(self, lm: bp.LanguageModel) -> None:
        results = [lm.generate(CONTEXT + end, max_new_tokens=4, do_sample=False) for end in ("list", "", "\n", "9 10")]
        for result in results:
            computed = result.text().num_computed_tokens
            assert result.is_stored == (computed == 0)
        kept = lm.generate(lm.text(CONTEXT, seams="keep") + "li", max_new_tokens=4, do_sample=False)
        assert kept.is_stored == (kept.text().num_computed_tokens == 0)

    def test_an_eager_prompt_is_scored_without_running_what_is_scored(self, lm: bp.LanguageModel) -> None:
        prompt = lm.text(CONTEXT, eager=True)
        before = lm.counters.num_computed_tokens
        lm.score(prompt, ["Request", " list"])
        assert lm.counters.num_computed_tokens - before < 12

    def test_past_key_values_have_the_tokens_of_the_joined_string(self, lm: bp.LanguageModel) -> None:
        result = (lm.text(CONTEXT) + "Requ" + "est")()
        cache = result.past_key_values
        assert cache.get_seq_length() == len(plain(lm, CONTEXT + "Request")[0])
        next_ids = torch.tensor([lm.tokenizer(" two")["input_ids"]])
        with torch.no_grad():
            logits = lm.model(next_ids, **{CACHE_KEYWORD: cache}).logits[0, -1]
        torch.testing.assert_close(logits, plain(lm, CONTEXT + "Request two")[2], atol=1e-3, rtol=1e-4)

    def test_chat_and_split_keep_their_pieces(self, lm: bp.LanguageModel) -> None:
        text = lm.text(CONTEXT * 3, split=8)
        assert [segment.string for segment in healed(lm._healer, text).segments] == [
            segment.string for segment in text.segments()
        ]


class TestShared:
    def test_a_context_is_computed_once_for_a_hundred_continuations(self, lm: bp.LanguageModel) -> None:
        context = lm.text(CONTEXT)
        num_tokens = context().num_computed_tokens
        before, num_asked = lm.counters.num_computed_tokens, 0
        for number in range(100):
            num_asked += len((context + f"list {number}")().input_ids)
        computed = lm.counters.num_computed_tokens - before
        assert num_asked - 100 * num_tokens < computed <= num_asked - 100 * num_tokens + 100 * 4

    def test_what_was_taken_out_of_a_longer_segment_is_right(self, lm: bp.LanguageModel) -> None:
        lm(CONTEXT)
        num_calls = lm.counters.num_model_calls
        (donated,) = healed(lm._healer, lm.text(CONTEXT) + "list").donors
        result = (lm.text(CONTEXT) + "list")()
        assert lm.counters.num_model_calls == num_calls + 2, "the logits after the beginning, and the rest"
        ids, logprobs, logits = plain(lm, CONTEXT + "list")
        assert result.input_ids.tolist() == ids
        torch.testing.assert_close(result.token_logprobs, logprobs, atol=1e-4, rtol=0, equal_nan=True)
        torch.testing.assert_close(result.logits, logits, atol=1e-3, rtol=1e-4)
        assert result.num_computed_tokens < 8
        alone = lm(donated.string)
        assert alone.num_computed_tokens == 0
        torch.testing.assert_close(alone.logits, plain(lm, donated.string)[2], atol=1e-3, rtol=1e-4)

    def test_what_nobody_asked_for_is_not_kept_in_memory(
        self, lm: bp.LanguageModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        represent, kept = Engine.represent, []

        def noted(engine: Engine, wanted: Wanted, **options: Any) -> Any:
            call = represent(engine, wanted, **options)
            kept.append(set(call.found) - {(segment, part) for segment, parts in call.taken.items() for part in parts})
            return call

        monkeypatch.setattr(Engine, "represent", noted)
        lm(CONTEXT)
        assert (lm.text(CONTEXT) + "list")().num_computed_tokens < 8
        assert kept == [set(), set()]

    @pytest.mark.parametrize("order", [[0, 1], [1, 0]])
    def test_in_one_call_it_is_computed_once_too(self, lm: bp.LanguageModel, order: list[int]) -> None:
        texts = [lm.text(CONTEXT), lm.text(CONTEXT) + "list"]
        results = lm([texts[number] for number in order])
        assert lm.counters.num_computed_tokens < len(plain(lm, CONTEXT)[0]) + 8
        for result in results:
            ids, logprobs, _ = plain(lm, str(result.text))
            assert result.input_ids.tolist() == ids
            torch.testing.assert_close(result.token_logprobs, logprobs, atol=1e-4, rtol=0, equal_nan=True)

    def test_it_may_be_longer_than_a_buffer(self, make_lm: Callable[..., bp.LanguageModel]) -> None:
        lm = make_lm(tiny_gpt2(n_positions=4096))
        context = CONTEXT * 80
        num_tokens = lm(context).num_computed_tokens
        assert num_tokens > 2048
        result = (lm.text(context) + "list")()
        assert result.num_computed_tokens < 8
        torch.testing.assert_close(result.logits, plain(lm, context + "list")[2], atol=1e-3, rtol=1e-4)

    def test_clean_seams_keep_the_pieces(self, lm: bp.LanguageModel) -> None:
        text = lm.text("Pick the endpoint.") + " Request: list" + " users"
        assert healed(lm._healer, text).tips == text.tips()

    def test_a_hit_needs_no_tokenizer(self, make_lm: Callable[..., bp.LanguageModel], tmp_path: Path) -> None:
        with bp.open(tmp_path / "db") as db:
            lm = make_lm(db=db)
            first = (lm.text(CONTEXT) + "list")()
        with bp.open(tmp_path / "db") as db:
            again = Healer(NoTokenizer(lm.tokenizer_id), db.model_metadata)
            assert healed(again, chain([CONTEXT, "list"])).tips[0] == first.segments[-1]

    @pytest.mark.parametrize("offsets", ["[0]", "[5, 3]", "[3, 3]", "[100000]", "[-1]"])
    def test_a_record_that_cannot_be_is_found_out_again(
        self, make_lm: Callable[..., bp.LanguageModel], tmp_path: Path, offsets: str
    ) -> None:
        with bp.open(tmp_path / "db") as db:
            tips = (make_lm(db=db).text(CONTEXT) + "list")().segments
        with contextlib.closing(sqlite3.connect(tmp_path / "db" / "catalog.sqlite")) as catalog, catalog:
            assert catalog.execute("UPDATE cuts SET offsets = ?", (offsets,)).rowcount == 1
        with bp.open(tmp_path / "db") as db:
            again = (make_lm(db=db).text(CONTEXT) + "list")()
            assert (again.segments, again.num_computed_tokens) == (tips, 0)

    @given(found=BAD_LISTS)
    @example(found="5")
    @example(found="[4000]")
    @example(found="[3, 2]")
    def test_no_record_changes_a_text(
        self, lm: bp.LanguageModel, make_lm: Callable[..., bp.LanguageModel], found: object
    ) -> None:
        def strings(lm: bp.LanguageModel) -> list[list[str]]:
            texts = lm.text(CONTEXT) + "list", lm.text(CONTEXT * 2, split=8)
            return [[segment.string for segment in result.segments] for result in lm(texts)]

        expected = strings(lm)
        assert lm.db.directory is not None
        put(lm.db.directory / "catalog.sqlite", "cuts", "offsets", found)
        assert strings(make_lm(db=lm.db)) == expected

    def test_what_is_scored_with_branches_is_scored_in_its_pieces(self, lm: bp.LanguageModel) -> None:
        prompt, completion = lm.text(CONTEXT) + "list", bp.Text(" users", start=200) + "?"
        kept = lm.score(lm.text("", seams="keep") + prompt, [completion])
        assert lm.score(prompt, [completion]) == pytest.approx(kept)


class Forgetful(dict[bytes, tuple[int, ...]]):
    """What another thread clears between any two looks."""

    def __contains__(self, key: object) -> bool:
        is_there = super().__contains__(key)
        self.clear()
        return is_there


def test_what_another_thread_forgets_is_found_out_again(db: bp.Database, tokenizer: Any) -> None:
    healer = Healer(Source(SegmentTokenizer(tokenizer)), db.model_metadata)
    pieces = [CONTEXT, "list", " users", " and more"]
    expected = [healed(healer, chain(pieces[:length])).tips for length in (2, 3, 4)]
    with bp.open(":memory:") as other:
        forgetting = Healer(Source(SegmentTokenizer(tokenizer)), other.model_metadata)
        forgetting._remembered = Forgetful()
        for length in (2, 2, 3, 4, 4):
            assert healed(forgetting, chain(pieces[:length])).tips == expected[length - 2]


@dataclass(frozen=True)
class NoTokenizer:
    """A source whose tokenizer must not be loaded."""

    tokenizer_id: TokenizerId

    @property
    def tokenizer(self) -> SegmentTokenizer:
        raise AssertionError("the tokenizer was loaded")


class TestRules:
    def test_kept_pieces_have_the_tokens_that_they_have_alone(self, lm: bp.LanguageModel) -> None:
        result = (lm.text("The quick brown fo", seams="keep") + "x jumps")()
        assert result.input_ids.tolist() == [
            each for piece in ("The quick brown fo", "x jumps") for each in lm.tokenizer(piece)["input_ids"]
        ]

    @pytest.mark.parametrize("text", [bp.Text("the endpo") + "int", bp.Text("the endpo") + bp.parallel("int", " or")])
    def test_an_error_has_both_spellings(self, lm: bp.LanguageModel, text: bp.Text) -> None:
        with pytest.raises(PromptError, match=r"a token crosses a seam: 'the endpo' \+ 'int'.* joined .*oint"):
            lm(lm.text("", seams="error") + text)

    def test_no_error_where_no_token_crosses(self, lm: bp.LanguageModel) -> None:
        text = lm.text("Pick the endpoint.", seams="error") + " Request"
        assert text().input_ids.tolist() == lm.tokenizer("Pick the endpoint. Request")["input_ids"]

    def test_pieces_that_contradict_each_other_are_refused(self, lm: bp.LanguageModel) -> None:
        with pytest.raises(PromptError, match="in different ways"):
            lm.text("a", seams="keep") + lm.text("b", seams="error")
        with pytest.raises(PromptError, match="seams='mend' is no rule"):
            lm.text("a", seams="mend")

    def test_seams_are_shown_as_text(self, lm: bp.LanguageModel) -> None:
        (seam,) = (lm.text("Pick the endp") + "oint for").seams()
        assert "".join(seam.tokens_apart) == "".join(seam.tokens_joined) == "Pick the endpoint for"
        assert seam.moved == " endp"

    def test_a_tokenizer_that_no_cut_suits_runs_one_piece_and_says_so(
        self, db: bp.Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        tokenizer = tokenizer_of("sentencepiece BPE")
        lm = bp.LanguageModel(tiny_gpt2(), tokenizer, db=db)
        text = lm.text("The quick brown fox jumps over the lazy dog, and the dog doesn't mind at all. ") + "Review"
        assert text().input_ids.tolist() == tokenizer(str(text))["input_ids"]
        assert [record.levelno for record in caplog.records if "run as one piece" in record.message] == [
            logging.WARNING
        ]
