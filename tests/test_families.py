"""Every family of decoder-only models is right or refused: tiny seeded models against plain forward passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

import backprompt_db as bp
from backprompt_db import Text, parallel
from backprompt_db.errors import UnsupportedModel

TOLERANCE = 1e-4
VOCAB_SIZE = 600

CONTEXT = "Pick the endpoint for the request.\nGET /users lists users. POST /orders creates an order.\n"
REQUEST = "Request: show me everyone who signed up this week"
LABELS = ["\nEndpoint: GET /users", "\nEndpoint: POST /orders", "\n"]

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 1024, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rotary_dim": 8, "word_embed_proj_dim": 64,
    "ffn_dim": 96, "d_model": 64, "n_inner": 96, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "init_std": 0.2,
    "first_k_dense_replace": 1, "shared_expert_intermediate_size": 32, "decoder_layers": 2, "encoder_layers": 2,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96,
    "attention_heads": 4, "num_layers": 3, "d_kv": 16, "d_ff": 96, "num_heads": 4, "state_size": 8,
}  # fmt: skip
"""Sizes for every configuration that has a field of that name, directly or under another name."""


@dataclass(frozen=True)
class Family:
    name: str
    verdict: str
    model_type: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    auto: Any = AutoModelForCausalLM

    def __str__(self) -> str:
        return self.name

    def build(self) -> Any:
        """A seeded model whose weights are so large that a wrong context, mask or position shows."""
        kind = CONFIG_MAPPING[self.model_type or self.name]
        known = {*kind().to_dict(), *kind.attribute_map}
        config = kind(**{name: value for name, value in SMALL.items() if name in known} | self.options)
        torch.manual_seed(0)
        return self.auto.from_config(config).eval()


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **parameters}}


SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 16}
LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
)  # fmt: skip
LONGROPE = rope(
    "longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, factor=2.0, original_max_position_embeddings=32
)  # fmt: skip

FAMILIES = [
    Family("gpt2", "packs"),
    Family("gpt2-scaled-by-layer", "packs", "gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    Family("gpt_bigcode", "packs"),
    Family("gpt_neox", "packs"),
    Family("gpt_neox_japanese", "packs"),
    Family("gptj", "packs"),
    Family("codegen", "packs"),
    Family("gpt_neo", "packs", options={"attention_types": [[["global"], 3]]}),
    Family("gpt_neo-local", "chains", "gpt_neo", {"attention_types": [[["global", "local", "local"], 1]]}),
    Family("opt", "packs"),
    Family("biogpt", "packs"),
    Family("xglm", "packs"),
    Family("bloom", "chains", options={"n_layer": 3}),
    Family("mpt", "chains"),
    Family("falcon", "packs", options={"alibi": False}),
    Family("falcon-alibi", "chains", "falcon", {"alibi": True}),
    Family("llama", "packs"),
    Family("llama-linear", "packs", "llama", rope("linear", factor=2.0)),
    Family("llama-yarn", "packs", "llama", rope("yarn", factor=4.0, original_max_position_embeddings=256)),
    Family("llama-llama3", "packs", "llama", LLAMA3),
    Family("llama-dynamic", "refused", "llama", rope("dynamic", factor=2.0, original_max_position_embeddings=32)),
    Family("mistral", "packs", options={"sliding_window": None}),
    Family("mistral-window", "chains", "mistral", {"sliding_window": 16}),
    Family("mistral-window-unsaid", "chains", "mistral", {"sliding_window": 16, "layer_types": [FULL] * 3}),
    Family("mixtral", "packs"),
    Family("qwen2", "packs"),
    Family("qwen2-window", "chains", "qwen2", {"use_sliding_window": True, "max_window_layers": 1} | MIXED),
    Family("qwen2-window-unused", "packs", "qwen2", {"use_sliding_window": False, "sliding_window": 16}),
    Family("qwen2_moe", "packs"),
    Family("qwen3", "packs"),
    Family("qwen3_moe", "packs"),
    Family("gemma", "packs"),
    Family("gemma2", "chains", options=MIXED),
    Family("gemma2-full", "packs", "gemma2", {"sliding_window": 4096}),
    Family("gemma3_text", "chains", options=MIXED),
    Family("phi", "packs"),
    Family("phi3", "packs", options={"sliding_window": None}),
    Family("phi3-longrope", "refused", "phi3", LONGROPE | {"original_max_position_embeddings": 32}),
    Family("stablelm", "packs"),
    Family("starcoder2", "packs", options={"sliding_window": None}),
    Family("olmo", "packs"),
    Family("olmo2", "packs"),
    Family("olmo3", "chains", options=MIXED),
    Family("olmoe", "packs"),
    Family("granite", "packs"),
    Family("granitemoe", "packs"),
    Family("cohere", "packs"),
    Family("cohere2", "chains", options=MIXED),
    Family("nemotron", "packs"),
    Family("exaone4", "chains", options=MIXED),
    Family("glm", "packs"),
    Family("glm4", "packs"),
    Family("smollm3", "packs"),
    Family("seed_oss", "packs"),
    Family("helium", "packs"),
    Family("apertus", "packs"),
    Family("persimmon", "packs"),
    Family("deepseek_v2", "packs", options={"num_key_value_heads": 4, "head_dim": 8}),
    Family("deepseek_v3", "packs", options={"num_key_value_heads": 4, "head_dim": 8}),
    Family("gpt_oss", "chains", options=MIXED | rope("default")),
    Family("llama4_text", "chains", options={"attention_chunk_size": 16, "intermediate_size_mlp": 96}),
    Family("modernbert-decoder", "chains", options={"local_attention": 16, "initializer_cutoff_factor": 2.0}),
    Family("bert-decoder", "packs", "bert", {"is_decoder": True}),
    Family("bert-encoder", "refused", "bert"),
    Family("roberta-decoder", "refused", "roberta", {"is_decoder": True}),
    Family("bart-decoder", "chains", "bart"),
    Family("bart", "refused", auto=AutoModelForSeq2SeqLM),
    Family("t5", "refused", auto=AutoModelForSeq2SeqLM),
    Family("mamba", "refused"),
    Family("rwkv", "refused", options={"attention_hidden_size": 64}),
    Family("recurrent_gemma", "refused", options={"lru_width": 64}),
    Family("jamba", "refused", options={"num_hidden_layers": 2, "use_mamba_kernels": False}),
    Family("lfm2", "refused", options={"layer_types": ["conv", FULL, "conv"]}),
    Family("openai-gpt", "refused"),
]  # fmt: skip


REFUSED = [family for family in FAMILIES if family.verdict == "refused"]
SUPPORTED = [family for family in FAMILIES if family.verdict != "refused"]


@dataclass(frozen=True)
class Subject:
    """A model under test, on a database of its own."""

    family: Family
    model: Any
    tokenizer: PreTrainedTokenizerFast
    db: bp.Database
    lm: bp.LanguageModel

    def again(self) -> bp.LanguageModel:
        """Another user of the same weights and database."""
        return bp.LanguageModel(self.model, self.tokenizer, db=self.db)

    def oracle(self, *pieces: str) -> npt.NDArray[np.float32]:
        """The log-probabilities of the last piece, from one plain forward pass over the tokens of all."""
        ids = [self.tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
        return logprobs_of_last(self.model, ids)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these models do."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=SUPPORTED, ids=str)
def subject(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    model = request.param.build()
    with bp.open(tmp_path_factory.mktemp("families")) as db:
        yield Subject(request.param, model, tokenizer, db, bp.LanguageModel(model, tokenizer, db=db))


def logprobs_of_last(model: Any, pieces: Sequence[Sequence[int]], **how: torch.Tensor) -> npt.NDArray[np.float32]:
    ids = torch.tensor([[token for piece in pieces for token in piece]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **how).logits[0]
    num_tokens = len(pieces[-1])
    logprobs = logits[-num_tokens - 1 : -1].log_softmax(-1).gather(1, ids[0, -num_tokens:, None])[:, 0]
    result: npt.NDArray[np.float32] = logprobs.numpy()
    return result


def logprobs_of_piece(representation: bp.ModelRepr, expected: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The log-probabilities of as many last tokens as the oracle gives."""
    logprobs: npt.NDArray[np.float32] = representation.token_logprobs[-len(expected) :].numpy()
    return logprobs


def assert_same(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def test_the_verdict_is_the_one_on_record(subject: Subject) -> None:
    subject.lm(CONTEXT)
    assert subject.db.catalog is not None
    record = subject.db.catalog.model(subject.lm.weights_id)
    assert record is not None
    assert record.verdict == subject.family.verdict
    assert record.max_error is not None
    assert record.max_error < TOLERANCE


def test_a_wrong_context_shows_in_the_oracle(subject: Subject) -> None:
    right = subject.oracle(CONTEXT, REQUEST, LABELS[0])
    wrong = subject.oracle(CONTEXT, REQUEST.replace("everyone", "the dog"), LABELS[0])
    assert np.abs(right - wrong).max() > 100 * TOLERANCE


def test_a_chain_is_one_plain_pass(subject: Subject) -> None:
    chain = subject.lm(Text(CONTEXT) + REQUEST + LABELS[0])
    for pieces in ([CONTEXT, REQUEST], [CONTEXT, REQUEST, LABELS[0]]):
        expected = subject.oracle(*pieces)
        assert_same(logprobs_of_piece(subject.lm(sum(pieces[1:], Text(pieces[0]))), expected), expected)
    ids = torch.tensor([[*chain.input_ids]])
    with torch.no_grad():
        assert_same(chain.logits.numpy(), subject.model(ids, use_cache=False).logits[0, -1].numpy())


def test_a_tree_is_a_plain_pass_for_each_of_its_branches(subject: Subject) -> None:
    requests = [REQUEST, "Request: the quick brown fox", "\n"]
    prompts = [Text(CONTEXT) + request for request in requests]
    expected = [[subject.oracle(CONTEXT, request, label) for label in LABELS] for request in requests]
    sums = [[logprobs.sum() for logprobs in row] for row in expected]
    np.testing.assert_allclose(subject.lm.score(prompts, LABELS), sums, rtol=0, atol=10 * TOLERANCE)
    results = subject.lm([prompt + label for prompt in prompts for label in LABELS])
    for result, logprobs in zip(results, itertools.chain(*expected), strict=True):
        assert_same(logprobs_of_piece(result, logprobs), logprobs)


def test_another_object_continues_from_what_is_stored(subject: Subject) -> None:
    subject.lm(Text(CONTEXT) + REQUEST)
    subject.db.flush()
    other = subject.again()
    continued = other(Text(CONTEXT) + REQUEST + ", sorted by name" + "\n")
    assert continued.num_cached_tokens > continued.num_computed_tokens > 0
    expected = subject.oracle(CONTEXT, REQUEST, ", sorted by name", "\n")
    assert_same(logprobs_of_piece(continued, expected), expected)


def test_a_piece_longer_than_what_precedes_it_crosses_every_window(subject: Subject) -> None:
    pieces = [REQUEST, CONTEXT * 16, REQUEST, CONTEXT]
    expected = subject.oracle(*pieces)
    result = subject.lm(sum(pieces[1:], Text(pieces[0])))
    assert len(result.input_ids) > 300
    assert_same(logprobs_of_piece(result, expected), expected)


@pytest.mark.parametrize(
    ("model_type", "windowed", "full"),
    [
        ("gpt_neo", {"attention_types": [[["global", "local", "local"], 1]]}, {"attention_types": [[["global"], 3]]}),
        ("mistral", {"sliding_window": 16}, {"sliding_window": None}),
        ("gemma3_text", MIXED, {"layer_types": [FULL] * 3}),
        ("llama4_text", {"attention_chunk_size": 16}, {"attention_chunk_size": 1024}),
    ],
)
def test_a_forgotten_window_would_show_in_the_long_prompt(
    model_type: str, windowed: dict[str, Any], full: dict[str, Any]
) -> None:
    ids = [[token % VOCAB_SIZE for token in range(7, 7 + 13 * 350, 13)]]
    one, other = (
        logprobs_of_last(Family(model_type, "", model_type, options).build(), [[3], *ids])
        for options in (windowed, full)
    )
    assert np.abs(one - other).max() > 100 * TOLERANCE


def test_parallel_branches_do_not_see_each_other_or_are_refused(subject: Subject) -> None:
    documents = ["POST /orders creates an order.", "the dog does not mind"]
    text = Text(CONTEXT) + parallel(*documents) + REQUEST
    if subject.family.verdict == "chains":
        with pytest.raises(UnsupportedModel, match="plain chains only"):
            subject.lm(text)
        return
    pieces = [CONTEXT, *documents, REQUEST]
    ids = [subject.tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    expected = logprobs_of_last(subject.model, ids, **as_parallel(ids))
    result = subject.lm(text)
    assert_same(logprobs_of_piece(result, expected)[1:], expected[1:])


def as_parallel(pieces: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Mask and position ids of a context, two branches and a last piece, written token by token."""
    context, first, second, last = map(len, pieces)
    places = [(0, i) for i in range(context)] + [(1, context + i) for i in range(first)]
    places += [(2, context + i) for i in range(second)]
    places += [(3, context + max(first, second) + i) for i in range(last)]
    mask = torch.full((len(places), len(places)), torch.finfo(torch.float32).min)
    for row, (piece, _) in enumerate(places):
        for column in range(row + 1):
            other = places[column][0]
            if other == piece or other == 0 or piece == 3:
                mask[row, column] = 0.0
    return {"attention_mask": mask[None, None], "position_ids": torch.tensor([[place for _, place in places]])}


@pytest.mark.parametrize("family", REFUSED, ids=str)
def test_what_cannot_be_right_is_refused_and_nothing_is_stored(
    family: Family, tokenizer: PreTrainedTokenizerFast, db: bp.Database
) -> None:
    lm = bp.LanguageModel(family.build(), tokenizer, db=db)
    with pytest.raises(UnsupportedModel, match=r"cannot be cached and stay right: .{20}"):
        lm(CONTEXT)
    db.flush()
    assert db.catalog is not None
    (record,) = db.catalog.models()
    assert record.verdict == "refused"
    assert db.counters.num_stored == 0
