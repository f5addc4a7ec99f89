"""`lm.best`: the completions that sorting all scores gives, from fewer tokens, and learned once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.compute.best import Chooser
from backprompt_db.compute.inference import head
from backprompt_db.errors import ContextLengthExceeded, PromptError
from tests.support.families import by_name
from tests.support.tokenizers import tokenizer_of

MakeLM = Callable[..., bp.LanguageModel]

CONTEXT = "Pick the endpoint for the request.\n"
REQUESTS = [f"Request: {what}\nEndpoint:" for what in ("show me everyone", "create an order", "the lazy dog")]
LABELS = [
    f" {verb} /{place}{rest}"
    for verb in ("GET", "POST")
    for place in ("users", "orders", "dog")
    for rest in ("", "/all", "/{id} x")
]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> bp.LanguageModel:
    """A model on a database in memory, for laws that a database with contents must obey too."""
    from tests.conftest import tiny_gpt2

    return bp.LanguageModel(tiny_gpt2(), tokenizer, db=bp.open(":memory:"))


def assert_best(found: Sequence[bp.Best], values: np.ndarray, *, k: int) -> None:
    """Check that `found` are the `k` largest values in order; equal but for rounding, they may change places."""
    assert len({each.index for each in found}) == len(found) == min(k, len(values))
    np.testing.assert_allclose([each.value for each in found], -np.sort(-values)[:k], atol=TOLERANCE)
    np.testing.assert_allclose([each.value for each in found], values[[each.index for each in found]], atol=TOLERANCE)


def in_new_process(lm: bp.LanguageModel, make_lm: MakeLM) -> bp.LanguageModel:
    lm.db.flush()
    return make_lm(db=lm.db)


class TestSameAsSortingScores:
    @given(
        labels=st.lists(st.sampled_from([*LABELS, " a", " the", "\n", " GET", "GET /users"]), min_size=1, max_size=14),
        k=st.integers(1, 6),
        normalize=st.sampled_from([None, "tokens", "bytes", "weights"]),
        seed=st.integers(0, 1000),
        prior=st.sampled_from([0.0, 3.0]),
    )
    @settings(max_examples=25)
    def test_for_any_labels_and_ranking(
        self, shared: bp.LanguageModel, labels: list[str], k: int, normalize: str | None, seed: int, prior: float
    ) -> None:
        """Duplicates, labels that others begin with, labels of one token; the database may know any part of it."""
        values = np.random.default_rng(seed)
        prompts = [shared.text(CONTEXT) + request for request in random.Random(seed).sample(REQUESTS, k=2)]
        bias = prior * values.normal(size=(2, len(labels)))
        weights = values.uniform(0.1, 2, size=len(labels))
        found = shared.best(
            prompts, labels, k=k, bias=bias if prior else None,
            normalize=weights if normalize == "weights" else normalize,
        )  # fmt: skip
        scores = shared.score(prompts, labels)
        num_tokens = [len(shared.tokenizer(label)["input_ids"]) for label in labels]
        divisors = {
            None: np.ones(len(labels)),
            "tokens": np.array(num_tokens),
            "bytes": np.array([len(label.encode()) for label in labels]),
            "weights": 1 / weights,
        }
        for best, row, added in zip(found, scores, bias, strict=True):
            assert_best(best, added + row / divisors[normalize], k=k)
            for each in best:
                assert each.logprob == pytest.approx(row[each.index], abs=TOLERANCE)
                assert each.num_tokens == num_tokens[each.index]
                assert each.completion == str(each) == labels[each.index]

    def test_equal_ones_come_in_the_order_given(self, lm: bp.LanguageModel) -> None:
        found = lm.best(CONTEXT, [" b", " a", " b", " a", " b"], k=5)
        best = found[0].index
        assert [each.index for each in found if each.value == found[0].value] == ([0, 2, 4] if best == 0 else [1, 3])

    def test_one_prompt_or_several_one_or_k(self, lm: bp.LanguageModel) -> None:
        one = lm.best(CONTEXT + REQUESTS[0], LABELS)
        assert isinstance(one, bp.Best)
        assert lm.best(CONTEXT + REQUESTS[0], LABELS, k=1) == [one]
        assert lm.best([CONTEXT + REQUESTS[0]], LABELS) == [one]
        assert lm.best([CONTEXT + REQUESTS[0]], LABELS, k=1) == [[one]]
        assert lm.best([], LABELS) == []
        assert len(lm.best(CONTEXT + REQUESTS[0], LABELS, k=1000)) == len(LABELS)

    @pytest.mark.parametrize("prompt", ["Say which: ", "Say which:\n\n", "Say whi", "Wh"])
    def test_where_tokens_cross_the_seam(self, make_lm: MakeLM, prompt: str) -> None:
        labels = ["the dog", "ch dog", " fox", "\nusers", "x", "the", "Users"]
        assert_best(make_lm().best(prompt, labels, k=3), make_lm().score(prompt, labels), k=3)

    def test_where_a_prompt_goes_on_from_another_one_inside_a_token(self, make_lm: MakeLM) -> None:
        """After the same tokens of both prompts, the completions go on with other ones."""
        prompt = CONTEXT + "Request: show me everyone"
        prompts, labels = [prompt, prompt + " t"], [" the fox", "he dog"]
        for best, scores in zip(make_lm().best(prompts, labels, k=2), make_lm().score(prompts, labels), strict=True):
            assert_best(best, scores, k=2)

    @pytest.mark.parametrize("kind", ["Gemma", "Unigram", "WordPiece"])
    def test_with_other_tokenizers(self, gpt2: Any, open_db: Any, kind: str) -> None:
        tokenizer = tokenizer_of(kind)
        assert len(tokenizer) <= gpt2.config.vocab_size
        lms = [bp.LanguageModel(gpt2, tokenizer, db=open_db()) for _ in range(2)]
        prompts = [CONTEXT + request for request in REQUESTS]
        for found, scores in zip(lms[0].best(prompts, LABELS, k=3), lms[1].score(prompts, LABELS), strict=True):
            assert_best(found, scores, k=3)

    @pytest.mark.parametrize("options", [{"deterministic": True}, {"keep": "all"}, {"keep": ["scores"]}], ids=str)
    def test_with_any_options(self, make_lm: MakeLM, options: dict[str, Any]) -> None:
        prompts = [bp.Text(CONTEXT) + request for request in REQUESTS]
        found = make_lm(**options).best(prompts, LABELS, k=2)
        for best, scores in zip(found, make_lm().score(prompts, LABELS), strict=True):
            assert_best(best, scores, k=2)

    def test_after_branches_and_explicit_starts(self, make_lm: MakeLM) -> None:
        branches = bp.parallel("GET /users lists. ", "POST /orders creates. ")
        prompts = [CONTEXT + branches + "Endpoint:", bp.Text(CONTEXT) + bp.Text(" Endpoint:", start=40)]
        found = make_lm().best(prompts, LABELS, k=2)
        for best, scores in zip(found, make_lm().score(prompts, LABELS), strict=True):
            assert_best(best, scores, k=2)

    def test_with_a_model_that_runs_only_chains(self, tokenizer: Any, open_db: Any) -> None:
        model = by_name("bloom").build()
        lms = [bp.LanguageModel(model, tokenizer, db=open_db()) for _ in range(2)]
        assert_best(lms[0].best(CONTEXT, LABELS[:4], k=2), lms[1].score(CONTEXT, LABELS[:4]), k=2)

    @pytest.mark.parametrize("fidelity", ["bfloat16", "int8"])
    def test_in_a_lossy_database(self, make_lm: MakeLM, open_db: Any, fidelity: str) -> None:
        lm = make_lm(db=open_db(fidelity=fidelity))
        lm(CONTEXT)
        lm.db.flush()
        assert_best(lm.best(CONTEXT, LABELS, k=2), lm.score(CONTEXT, LABELS), k=2)

    def test_completions_that_are_no_chains(self, make_lm: MakeLM) -> None:
        """Branches in a completion do not see each other, and explicit starts are where they say."""
        labels = [
            bp.parallel(" GET /users", " POST /orders"),
            bp.Text(" GET /users lists", start=60),
            bp.Text(" GET /users lists", start=20),
            bp.Text(" GET /users lists"),
        ]
        lm = make_lm()
        assert_best(lm.best(CONTEXT, labels, k=4), make_lm().score(CONTEXT, labels), k=4)
        assert np.allclose(lm.score(CONTEXT, [" POST /orders"]), make_lm().score(CONTEXT, [" POST /orders"]))

    @pytest.mark.parametrize("labels", [["overx", "overy", "erz"], ["overx", "overz", "erq"]])
    def test_prompts_that_end_in_parts_of_one_word(self, make_lm: MakeLM, labels: list[str]) -> None:
        """Cut before that word, both have the same segment before, and other tokens after it."""
        begin = "The quick brown fox jumps over the lazy dog, and the"
        prompts = [begin + " ", begin + " ov"]
        lm = make_lm()
        expected = make_lm().score(prompts, labels)
        for best, scores in zip(lm.best(prompts, labels, k=3), expected, strict=True):
            assert_best(best, scores, k=3)
        np.testing.assert_allclose(lm.score(prompts, labels), expected, atol=TOLERANCE)

    def test_numbers_that_are_none(self, lm: bp.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the model gives no number for a token, the search does not wait for one."""
        monkeypatch.setattr(Chooser, "_scored", lambda *_: [])
        monkeypatch.setattr(head, "first_logprobs", lambda _, targets: np.full(len(targets), np.nan, np.float32))
        assert lm.best(CONTEXT, LABELS, k=1) == []


class TestLearnedOnce:
    def test_another_process_asks_no_model(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        prompts = [bp.Text(CONTEXT) + request for request in REQUESTS]
        first = lm.best(prompts, LABELS, k=2)
        other = in_new_process(lm, make_lm)
        assert other.best(prompts, LABELS, k=2) == first
        assert other.counters.num_model_calls == other.counters.num_computed_tokens == 0
        assert other.counters.num_cached_tokens > 0

    def test_fewer_tokens_than_scoring_all(self, make_lm: MakeLM) -> None:
        prompts = [bp.Text(CONTEXT) + request for request in REQUESTS]
        lm, other = make_lm(), make_lm()
        lm(prompts, keep="all")
        other(prompts, keep="all")
        before = lm.counters.num_computed_tokens
        lm.best(prompts, LABELS)
        other.score(prompts, LABELS)
        assert 0 < lm.counters.num_computed_tokens - before < (other.counters.num_computed_tokens - before) / 3

    def test_scoring_computes_the_rest(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        known = [LABELS[each.index] for each in lm.best(CONTEXT, LABELS, k=4)]
        other = in_new_process(lm, make_lm)
        other.score(CONTEXT, known)
        assert other.counters.num_model_calls == 0

    def test_scores_that_are_there_are_used(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        scores = lm.score(CONTEXT, LABELS)
        other = in_new_process(lm, make_lm)
        before = lm.db.counters.num_computed_tokens
        assert_best(other.best(CONTEXT, LABELS, k=3), scores, k=3)
        assert lm.db.counters.num_computed_tokens == before

    def test_other_questions_about_a_prompt_add_to_what_is_known(self, lm: bp.LanguageModel, make_lm: MakeLM) -> None:
        questions = [(LABELS[:9], 1), (LABELS[6:], 1), (LABELS, 4)]
        for labels, k in questions:
            in_new_process(lm, make_lm).best(CONTEXT, labels, k=k)
        other = in_new_process(lm, make_lm)
        scores = make_lm().score(CONTEXT, LABELS)
        for labels, k in questions:
            found = other.best(CONTEXT, labels, k=k)
            assert_best(found, scores[[LABELS.index(label) for label in labels]], k=k)
        assert other.counters.num_model_calls == 0

    def test_where_nothing_can_be_stored(self, lm: bp.LanguageModel, make_lm: MakeLM, open_db: Any) -> None:
        lm(CONTEXT)
        directory = lm.db.directory
        lm.db.close()
        reader = make_lm(db=open_db(directory, mode="r"))
        prompts = [bp.Text(CONTEXT) + request for request in REQUESTS]
        for best, scores in zip(reader.best(prompts, LABELS, k=2), make_lm().score(prompts, LABELS), strict=True):
            assert_best(best, scores, k=2)

    def test_where_the_prompt_is_evicted_meanwhile(
        self, lm: bp.LanguageModel, make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Keys and values that were looked up and are gone when a pass needs them are computed again."""
        prompts = [bp.Text(CONTEXT) + request for request in REQUESTS]
        lm(prompts, keep="all")
        other = in_new_process(lm, make_lm)
        load = bp.Database.load
        lost: list[Any] = []

        def lose_first(db: bp.Database, key: Any, *arguments: Any) -> bool:
            if len(lost) < 1:
                lost.append(key)
                db.store.delete([key])
            return load(db, key, *arguments)

        monkeypatch.setattr(bp.Database, "load", lose_first)
        for best, scores in zip(other.best(prompts, LABELS, k=2), make_lm().score(prompts, LABELS), strict=True):
            assert_best(best, scores, k=2)
        assert lost


class TestRefused:
    def test_completions_that_are_too_long_whatever_the_search_would_do(self, lm: bp.LanguageModel) -> None:
        with pytest.raises(ContextLengthExceeded):
            lm.best(CONTEXT, [" a", " the" + " x" * 300], bias=[0, -1e6])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"k": 0}, "k=0 is not a number of completions"),
            ({"k": True}, "k=True"),
            ({"k": 2.5}, "k=2.5"),
            ({"bias": [1.0, 2.0]}, "bias does not fit 3 completions"),
            ({"bias": [0, np.nan, 0]}, "bias has values that are not finite"),
            ({"bias": "prior"}, "bias does not fit"),
            ({"normalize": "words"}, "normalize does not fit"),
            ({"normalize": [1, 0, 1]}, "not above 0"),
        ],
    )
    def test_arguments_that_do_not_fit(self, lm: bp.LanguageModel, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(PromptError, match=message):
            lm.best(CONTEXT, [" a", " b", " c"], **arguments)

    def test_completions_that_are_none(self, lm: bp.LanguageModel) -> None:
        with pytest.raises(PromptError, match="completions is one text"):
            lm.best(CONTEXT, " a")
        with pytest.raises(PromptError, match="there are no completions"):
            lm.best(CONTEXT, [])
        with pytest.raises(PromptError, match="a completion is empty"):
            lm.best(CONTEXT, [" a", ""])
