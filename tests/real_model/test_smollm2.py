"""The library on a real model with real text, against plain forward passes of transformers.

Tiny random models hardly notice a wrong position or a missing token; a trained one does.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import backprompt_db as bp
from backprompt_db.cli.demo.job import load_task
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from tests.conftest import plain_logprobs
from tests.support.tokenizers import TEXTS

TOLERANCE = 1e-4
"""By how much log-probabilities may differ, in float32."""

CONTEXT = "The shop opens at nine in the morning and closes at six. On Sundays it stays closed all day.\n"
OTHER_CONTEXT = "The shop is open around the clock, even on holidays, and nobody has ever found it closed.\n"
QUESTION = "Question: When does the shop open on a Monday?\nAnswer:"
ANSWERS = [" At nine in the morning.", " At six.", " It never closes."]


@pytest.fixture(scope="module")
def directory() -> Path:
    """The model's files, converted if this machine has never seen them."""
    return smollm2_directory()


@pytest.fixture(scope="module")
def pair(directory: Path) -> tuple[Any, Any]:
    """The model and its tokenizer, loaded once."""
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def smollm2(pair: tuple[Any, Any]) -> Iterator[bp.LanguageModel]:
    """The model on one database for all tests here, for hashing its weights and checking it takes seconds.

    What a test finds there was computed in another shape, by another test: that must not matter.
    """
    with bp.open(":memory:") as db:
        yield bp.LanguageModel(*pair, db=db)


def encode(pair: tuple[Any, Any], pieces: Sequence[str]) -> list[list[int]]:
    return [list(pair[1](piece, add_special_tokens=False)["input_ids"]) for piece in pieces]


def joined(pieces: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([token for ids in pieces for token in ids])


def assert_equals_plain(pair: tuple[Any, Any], pieces: Sequence[str], result: bp.ModelRepr) -> None:
    """Compare with one plain pass over the tokens of the joined string."""
    input_ids = joined(encode(pair, ["".join(pieces)]))
    logprobs, logits = plain_logprobs(pair[0], input_ids)
    assert torch.equal(result.input_ids, input_ids)
    assert result.token_logprobs[0].isnan()
    assert (result.token_logprobs - logprobs)[1:].abs().max() < TOLERANCE
    assert (result.logits.log_softmax(-1) - logits.log_softmax(-1)).abs().max() < TOLERANCE


def test_a_chain_equals_a_plain_pass(smollm2: bp.LanguageModel, pair: tuple[Any, Any]) -> None:
    pieces = [CONTEXT, QUESTION, ANSWERS[0]]
    result = (smollm2.text(CONTEXT) + QUESTION + ANSWERS[0])()
    assert_equals_plain(pair, pieces, result)


def test_a_tree_of_completions_equals_plain_passes_of_its_branches(
    smollm2: bp.LanguageModel, pair: tuple[Any, Any]
) -> None:
    prompts = [[CONTEXT, QUESTION], [OTHER_CONTEXT, QUESTION]]
    scores = smollm2.score([smollm2.text(context) + question for context, question in prompts], ANSWERS)
    for prompt, row in zip(prompts, scores, strict=True):
        for answer, score in zip(ANSWERS, row, strict=True):
            ids = encode(pair, [*prompt, answer])
            logprobs, _ = plain_logprobs(pair[0], joined(ids))
            num_tokens = len(ids[-1])
            assert abs(logprobs[-num_tokens:].double().sum().item() - score) < num_tokens * TOLERANCE


REVIEWS = ["A waste of two hours.", "I laughed, I cried, I went again.", "The plot has more holes than a net."]


def test_examples_that_end_in_a_blank_line_are_what_a_plain_pass_reads(
    smollm2: bp.LanguageModel, pair: tuple[Any, Any]
) -> None:
    shots = "".join(f"Review: {text}\nSentiment: {word}\n\n" for text, word in zip(REVIEWS, ANSWERS, strict=True))
    context = smollm2.text(shots)
    scores = smollm2.score([context + f"Review: {review}\nSentiment:" for review in REVIEWS], [" good", " bad", "bad"])
    for review, row in zip(REVIEWS, scores, strict=True):
        prompt = f"{shots}Review: {review}\nSentiment:"
        assert_equals_plain(pair, [prompt], (context + f"Review: {review}\nSentiment:")())
        for completion, score in zip([" good", " bad", "bad"], row, strict=True):
            both, alone = (
                plain_logprobs(pair[0], joined(encode(pair, [each])))[0][1:].double().sum().item()
                for each in (prompt + completion, prompt)
            )
            assert score == pytest.approx(both - alone, abs=TOLERANCE * 3)


@pytest.mark.parametrize("seed", range(6))
def test_any_cut_of_real_text_gives_the_scores_of_a_plain_pass(
    smollm2: bp.LanguageModel, pair: tuple[Any, Any], seed: int
) -> None:
    dice = random.Random(seed)
    string = "".join(dice.sample(TEXTS, 4))[:500]
    places = sorted(dice.sample(range(1, len(string)), 6))
    pieces = [string[begin:end] for begin, end in itertools.pairwise([0, *places, len(string)])]
    text = smollm2.text("")
    for piece in pieces:
        text += piece
    assert_equals_plain(pair, pieces, text())


def test_an_edit_in_the_middle_equals_a_plain_pass_over_the_edited_text(
    smollm2: bp.LanguageModel, pair: tuple[Any, Any]
) -> None:
    rules, edited = "No dogs are allowed inside.\n", "Dogs are welcome, and get a biscuit.\n"
    (smollm2.text(CONTEXT) + rules + QUESTION)()
    result = (smollm2.text(CONTEXT) + edited + QUESTION)()
    assert result.num_cached_tokens == len(encode(pair, [CONTEXT])[0])
    assert_equals_plain(pair, [CONTEXT, edited, QUESTION], result)


def test_continuing_on_another_handle_equals_a_plain_pass(
    pair: tuple[Any, Any], open_db: Callable[..., bp.Database], tmp_path: Path
) -> None:
    with open_db(tmp_path / "shared") as db:
        (bp.LanguageModel(*pair, db=db).text(CONTEXT) + QUESTION)()
    smollm2 = bp.LanguageModel(*pair, db=open_db(tmp_path / "shared"))
    result = (smollm2.text(CONTEXT) + QUESTION + ANSWERS[1])()
    assert result.num_computed_tokens == len(encode(pair, [ANSWERS[1]])[0])
    assert_equals_plain(pair, [CONTEXT, QUESTION, ANSWERS[1]], result)


def test_parallel_branches_equal_one_pass_with_a_mask(smollm2: bp.LanguageModel, pair: tuple[Any, Any]) -> None:
    left, right = "Monday is a holiday.\n", "The manager has the only key and is always late.\n"
    result = (smollm2.text(CONTEXT) + bp.parallel(left, right) + QUESTION)()
    lengths = [len(ids) for ids in encode(pair, [CONTEXT, left, right, QUESTION])]
    logprobs, logits = diamond_logprobs(pair, [CONTEXT, left, right, QUESTION])
    question = sum(lengths[:3])
    assert result.token_logprobs[question].isnan()
    errors = (result.token_logprobs - logprobs)[[i for i in range(sum(lengths)) if i not in (0, question)]].abs()
    assert errors.max() < TOLERANCE
    assert (result.logits.log_softmax(-1) - logits.log_softmax(-1)).abs().max() < TOLERANCE


def diamond_logprobs(pair: tuple[Any, Any], pieces: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle for context, two branches, and what follows both: the log-probability of each token; last logits."""
    model, tokens = pair[0], encode(pair, pieces)
    context, left, right, tail = map(len, tokens)
    fork = context + left
    join = fork + right
    mask = torch.ones(join + tail, join + tail).tril().bool()
    mask[fork:join, context:fork] = False
    after = context + max(left, right)
    places = [*range(context + left), *range(context, context + right), *range(after, after + tail)]
    ids = joined(tokens)
    with torch.no_grad():
        logits = model(ids[None], attention_mask=mask[None, None], position_ids=torch.tensor([places])).logits[0]
    before = torch.arange(-1, len(ids) - 1)
    before[fork] = context - 1
    return logits[before].log_softmax(-1).gather(1, ids[:, None])[:, 0], logits[-1]


def test_the_oracles_would_show_wrong_keys_and_values(smollm2: bp.LanguageModel, pair: tuple[Any, Any]) -> None:
    """The difference that a test must see is thousands of times the tolerance, in a context and in a mask."""
    right, wrong = ((smollm2.text(context) + QUESTION)() for context in (CONTEXT, OTHER_CONTEXT))
    num_tokens = len(encode(pair, [QUESTION])[0])
    by_context = (right.token_logprobs[-num_tokens:] - wrong.token_logprobs[-num_tokens:]).abs().max()
    branches = "Monday is a holiday.\n", "The manager has the only key.\n"
    forked = (smollm2.text(CONTEXT) + bp.parallel(*branches) + QUESTION)()
    chained = (smollm2.text(CONTEXT) + branches[0] + branches[1] + QUESTION)()
    by_mask = (forked.logits.log_softmax(-1) - chained.logits.log_softmax(-1)).abs().max()
    assert by_context > 1000 * TOLERANCE
    assert by_mask > 1000 * TOLERANCE


def test_the_files_are_an_ordinary_model_in_float32(directory: Path, pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in directory.iterdir()}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model.config, "quantization_config", None) is None
    assert tokenizer.decode(tokenizer(CONTEXT)["input_ids"]) == CONTEXT


def test_the_prompts_of_the_demo_fit_into_a_thousand_positions(pair: tuple[Any, Any]) -> None:
    task = load_task()
    longest = [max(map(len, encode(pair, pieces))) for pieces in ([task.context], task.endings, task.completions)]
    assert sum(longest) < 900


@pytest.mark.exhaustive
def test_the_best_endpoints_are_those_of_plain_passes(pair: tuple[Any, Any]) -> None:
    """Of eight, after a real request; the prior of each endpoint is what it has without one."""
    task = load_task(1)
    context, completions = task.context[-600:], task.completions[::4]
    labels = encode(pair, completions)

    def plain(ending: str) -> torch.Tensor:
        (prompt,) = encode(pair, [context + ending])
        sums = [plain_logprobs(pair[0], joined([prompt, label]))[0][len(prompt) :].double().sum() for label in labels]
        return torch.stack(sums)

    prior = plain(task.endings[0])
    values, order = (plain(task.endings[-1]) - prior).sort(descending=True, stable=True)
    with bp.open(":memory:") as db:
        lm = bp.LanguageModel(*pair, db=db)
        found = lm.best(lm.text(context) + task.endings[-1], completions, k=3, bias=-prior.numpy())
    assert [each.value for each in found] == pytest.approx(values[:3].tolist(), abs=10 * TOLERANCE)
    assert [each.index for each in found] == order[:3].tolist()
