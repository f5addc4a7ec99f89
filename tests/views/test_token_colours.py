"""A result in a notebook: every token with its surprise, where it came from, and what would come next."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import backprompt_db as bp
from backprompt_db.prompt.ids import ModelIds
from backprompt_db.prompt.representation import Array
from backprompt_db.prompt.text import ModelRepr
from backprompt_db.views.token_colours import NUM_TOKENS
from tests.conftest import tiny_gpt2, train_tokenizer
from tests.support.explanations import CONTEXT, ENDING, HOSTILE, REQUEST, prompt, run
from tests.support.pictures import ReadTokens

_MARKS = re.compile("[↵→◌]")


def read(result: ModelRepr) -> ReadTokens:
    return ReadTokens(result._repr_html_())


def plain(tokens: ReadTokens) -> str:
    """The text that the tokens join to, without what makes blanks visible."""
    return _MARKS.sub("", "".join(token.text for token in tokens.tokens)).replace("·", " ")


class TestTokens:
    def test_they_join_to_the_text_and_say_their_ids_and_log_probabilities(self, lm: bp.LanguageModel) -> None:
        result = run(lm)
        tokens = read(result)
        assert plain(tokens) == CONTEXT + REQUEST + ENDING
        for token, token_id, logprob in zip(tokens.tokens, result.input_ids, result.token_logprobs, strict=True):
            known = "undefined" if logprob.isnan() else f"log-probability {logprob:.3f}, {math.exp(logprob):.2%}"
            assert token.title == f"token {token_id}: {known}"

    def test_what_surprises_more_has_more_colour_and_what_nothing_predicts_has_a_frame(
        self, lm: bp.LanguageModel
    ) -> None:
        result = run(lm)
        first, *others = read(result).tokens
        assert "dotted" in first.style
        assert "rgba" not in first.style
        depths = [float(re.findall(r"rgba\(.*,(.*)\)", token.style)[0]) for token in others]
        nats = (-result.token_logprobs[1:]).clamp(0, 8).tolist()
        assert depths == pytest.approx([each / 8 * 0.75 for each in nats], abs=0.006)

    def test_segments_that_were_found_are_told_from_those_that_were_computed(self, lm: bp.LanguageModel) -> None:
        run(lm)
        tokens = read(prompt(lm, CONTEXT, REQUEST, "\nAnswer:")())
        assert [segment["data-state"] for segment in tokens.segments] == ["cached", "cached", "computed"]
        assert ["solid" in segment["style"] for segment in tokens.segments] == [True, True, False]
        assert [segment["title"] for segment in tokens.segments][1:] == ["segment 1: cached", "segment 2: computed"]
        assert {token.state for token in tokens.tokens if token.segment == 2} == {"computed"}

    def test_blanks_are_visible_and_a_space_before_a_word_stays_one(self, lm: bp.LanguageModel) -> None:
        shown = "".join(token.text for token in read(run(lm, "one  two \tthree\n")).tokens)
        assert shown.endswith("three↵\n")
        assert "→\t" in shown
        assert "·" in shown
        assert " three" not in shown
        assert "the endpoint" in "".join(token.text for token in read(run(lm, CONTEXT)).tokens)

    def test_a_character_of_several_tokens_is_shown_once(self, lm: bp.LanguageModel) -> None:
        tokens = read(run(lm, "a 🙂 b"))
        assert plain(tokens) == "a 🙂 b"
        assert sum(token.text == "◌" for token in tokens.tokens) > 0

    def test_start_tokens_have_their_names(self, gpt2: Any, tokenizer_with_bos: Any, db: bp.Database) -> None:
        tokens = read(run(bp.LanguageModel(gpt2, tokenizer_with_bos, db=db)))
        assert tokens.tokens[0].text == "<s>"

    def test_whatever_texts_hold_is_shown_and_means_nothing(self, lm: bp.LanguageModel) -> None:
        tokens = read(run(lm, HOSTILE + "<img src=x onerror=alert(1)>"))
        assert tokens.tags == {"div", "small", "span"}
        assert "".join(tokens.texts).count("<script>alert(1)</script>") == 1
        assert not any(character in text for text in tokens.texts for character in "\x1b\u202e")

    def test_a_tokenizer_that_has_changed_is_not_asked(self, lm: bp.LanguageModel, tokenizer: Any) -> None:
        result = run(lm)
        stale = ModelRepr(
            **{**vars(result), "ids": (result.ids[0], type(result.ids[1])(b"another tokenizer's".ljust(32)))}
        )
        assert [token.text for token in read(stale).tokens] == [f"[{token_id}]" for token_id in result.input_ids]


class SlowTokenizer:
    """A tokenizer that only knows what its tokens decode to: one for each byte."""

    is_fast = False
    special_tokens_map: ClassVar[dict[str, str]] = {}

    def __len__(self) -> int:
        return 256

    def __call__(self, texts: str | list[str], **_: object) -> dict[str, Any]:
        ids = [list(text.encode()) for text in ([texts] if isinstance(texts, str) else texts)]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}

    def get_vocab(self) -> dict[str, int]:
        return {f"<{number}>": number for number in range(256)}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{each}>" for each in ids]

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class TestWhereTokensComeFrom:
    def test_without_a_catalog_the_tokenizer_is_asked(self, gpt2: Any) -> None:
        tokenizer = train_tokenizer()
        tokenizer.add_tokens(["another token that no other tokenizer has"])
        with bp.open(":memory:") as db:
            assert plain(read(run(bp.LanguageModel(gpt2, tokenizer, db=db)))) == CONTEXT + REQUEST + ENDING

    def test_a_slow_tokenizer_is_asked_what_each_token_decodes_to(self, gpt2: Any, db: bp.Database) -> None:
        tokens = read(run(bp.LanguageModel(gpt2, SlowTokenizer(), db=db), "naïve"))
        assert [token.text for token in tokens.tokens] == ["n", "a", "\ufffd", "\ufffd", "v", "e"]


class TestSummary:
    def test_totals_and_averages_are_of_all_tokens_that_something_predicts(self, lm: bp.LanguageModel) -> None:
        result = (lm.text(CONTEXT) + bp.parallel("one\n", "two\n") + ENDING)()
        defined = result.token_logprobs[~result.token_logprobs.isnan()].double()
        summary = read(result).texts[0]
        assert summary.startswith(f"{len(result.input_ids)} tokens: 0 cached, {len(result.input_ids)} computed")
        assert f"log-probability {defined.sum():,.2f}" in summary
        assert f"{-defined.mean():.3f} nats per token" in summary
        assert f"perplexity {math.exp(-defined.mean()):,.2f}" in summary
        assert summary.endswith("2 tokens that nothing predicts")

    def test_one_token_that_nothing_predicts_has_no_averages(self, lm: bp.LanguageModel) -> None:
        assert read(run(lm, "a")).texts[0] == "1 token: 0 cached, 1 computed · 1 token that nothing predicts"

    def test_the_likeliest_next_tokens_are_those_of_the_logits(self, lm: bp.LanguageModel) -> None:
        result = run(lm)
        expected = [f"token {token}: log-probability {p:.3f}, {math.exp(p):.2%}" for token, p in result.top_k(8)]
        assert [title for title, _ in read(result).next] == expected

    def test_after_parallel_branches_there_is_no_next_token(self, lm: bp.LanguageModel) -> None:
        assert read((lm.text(CONTEXT) + bp.parallel("one\n", "two\n"))()).next == []


class TestCost:
    def test_a_hit_is_shown_when_neither_tokenizer_nor_weights_are_there_any_more(self, tmp_path: Path) -> None:
        tokenizer = train_tokenizer()
        tokenizer.add_tokens(["a token that no other tokenizer has"])
        tiny_gpt2().save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        with bp.open(tmp_path / "db") as db:
            run(bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db))
        with bp.open(tmp_path / "db") as db:
            lm = bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db)
            result = prompt(lm)()
            (tmp_path / "model").rename(tmp_path / "moved")
            assert plain(read(result)) == CONTEXT + REQUEST + ENDING
            assert not lm.is_loaded

    def test_of_very_many_tokens_the_first_and_the_last_are_shown(self, lm: bp.LanguageModel) -> None:
        num_tokens = [3_000, 4_000, 6_000]
        result = made_up(lm, num_tokens)
        html = result._repr_html_()
        tokens = ReadTokens(html)
        assert len(tokens.tokens) == NUM_TOKENS
        assert f"… {sum(num_tokens) - NUM_TOKENS:,} tokens not shown …" in tokens.texts
        assert [token.segment for token in tokens.tokens].count(0) == 3_000
        assert tokens.tokens[-1].segment == 2
        assert tokens.texts[0].startswith("13,000 tokens")
        assert len(html) < 2_000_000

    def test_a_hidden_segment_has_no_place(self, lm: bp.LanguageModel) -> None:
        tokens = read(made_up(lm, [6_000, 10, 6_000]))
        assert {token.segment for token in tokens.tokens} == {0, 2}
        assert len(tokens.tokens) == NUM_TOKENS
        assert "… 2,010 tokens not shown …" in tokens.texts

    def test_what_is_hidden_may_begin_where_a_segment_does(self, lm: bp.LanguageModel) -> None:
        for num_tokens, segments in (([5_000, 3_000, 9_000], {0, 2}), ([5_000, 3_000, 5_000], {0, 2})):
            tokens = read(made_up(lm, num_tokens))
            assert {token.segment for token in tokens.tokens} == segments
            assert tokens.texts.count(f"… {sum(num_tokens) - NUM_TOKENS:,} tokens not shown …") == 1


def made_up(lm: bp.LanguageModel, num_tokens: list[int]) -> ModelRepr:
    """A result with so many tokens in its segments, which no model has computed."""
    text = prompt(lm, *(f"piece {number}" for number in range(len(num_tokens))))
    return ModelRepr(
        text=text,
        segments=tuple(text.segments()),
        scores=tuple(
            {
                "input_ids": Array.from_numpy(np.full(count, 70, dtype=np.int32)),
                "token_logprobs": Array.from_numpy(np.full(count, -1.5, dtype=np.float32)),
            }
            for count in num_tokens
        ),
        last_logits=None,
        num_cached_tokens=sum(num_tokens),
        num_computed_tokens=0,
        is_computed=(False,) * len(num_tokens),
        ids=ModelIds(lm.weights_id, lm.tokenizer_id),
    )
