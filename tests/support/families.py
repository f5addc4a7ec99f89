"""Tiny seeded models of every family of decoder-only models, texts for them, and plain forward passes: the oracle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import backprompt_db as bp
from backprompt_db.prompt.segments import Segment, ancestry
from backprompt_db.prompt.text import Text

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
    Family("mistral-window", "packs", "mistral", {"sliding_window": 16}),
    Family("mistral-window-unsaid", "packs", "mistral", {"sliding_window": 16, "layer_types": [FULL] * 3}),
    Family("mixtral", "packs"),
    Family("mixtral-window", "packs", "mixtral", {"sliding_window": 16}),
    Family("ministral", "packs", options=MIXED),
    Family("qwen2", "packs"),
    Family("qwen2-window", "packs", "qwen2", {"use_sliding_window": True, "max_window_layers": 1} | MIXED),
    Family("qwen2-window-unused", "packs", "qwen2", {"use_sliding_window": False, "sliding_window": 16}),
    Family("qwen2_moe", "packs"),
    Family("qwen3", "packs"),
    Family("qwen3-window", "packs", "qwen3", {"use_sliding_window": True, "max_window_layers": 1} | MIXED),
    Family("qwen3_moe", "packs"),
    Family("gemma", "packs"),
    Family("gemma2", "packs", options=MIXED),
    Family("gemma2-full", "packs", "gemma2", {"sliding_window": 4096}),
    Family("gemma3_text", "packs", options=MIXED),
    Family("gemma3-window-unused", "chains", "gemma3_text", {"layer_types": [FULL] * 3, "sliding_window": 16}),
    Family("phi", "packs"),
    Family("phi3", "packs", options={"sliding_window": None}),
    Family("phi3-window", "packs", "phi3", {"sliding_window": 16}),
    Family("phi3-longrope", "refused", "phi3", LONGROPE | {"original_max_position_embeddings": 32}),
    Family("stablelm", "packs"),
    Family("starcoder2", "packs", options={"sliding_window": None}),
    Family("starcoder2-window", "packs", "starcoder2", {"sliding_window": 16}),
    Family("olmo", "packs"),
    Family("olmo2", "packs"),
    Family("olmo3", "packs", options=MIXED),
    Family("olmoe", "packs"),
    Family("granite", "packs"),
    Family("granitemoe", "packs"),
    Family("cohere", "packs"),
    Family("cohere2", "packs", options=MIXED),
    Family("nemotron", "packs"),
    Family("exaone4", "packs", options=MIXED),
    Family("glm", "packs"),
    Family("glm4", "packs"),
    Family("smollm3", "packs"),
    Family("seed_oss", "packs"),
    Family("helium", "packs"),
    Family("apertus", "packs"),
    Family("persimmon", "packs"),
    Family("deepseek_v2", "packs", options={"num_key_value_heads": 4, "head_dim": 8}),
    Family("deepseek_v3", "packs", options={"num_key_value_heads": 4, "head_dim": 8}),
    Family("gpt_oss", "packs", options=MIXED | rope("default")),
    Family("llama4_text", "chains", options={"attention_chunk_size": 16, "intermediate_size_mlp": 96}),
    Family("modernbert-decoder", "packs", options={"local_attention": 16, "initializer_cutoff_factor": 2.0}),
    Family("bert-decoder", "packs", "bert", {"is_decoder": True}),
    Family("bert-encoder", "refused", "bert"),
    Family("roberta-decoder", "refused", "roberta", {"is_decoder": True}),
    Family("bart-decoder", "chains", "bart", {"forced_eos_token_id": None}),  # tests of generating forbid this token
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

REPRESENTATIVES = {
    "gpt2": "a boolean mask; learned positions", "gptj": "an additive mask",
    "llama": "rotary positions; heads in groups", "gpt_bigcode": "one head of keys and values",
    "deepseek_v3": "keys wider than values; experts", "mistral-window": "a window in all layers",
    "gemma3_text": "a window in some layers", "gpt_oss": "a window in some layers, additive; sinks",
    "bloom": "chains: it takes no mask of ours", "mpt": "chains: it is wrong with one",
    "gpt_neo-local": "chains: a window of its own", "llama4_text": "chains: chunks",
    "llama-dynamic": "refused: positions change with the length", "bert-encoder": "refused: what follows is seen",
    "t5": "refused: an encoder-decoder", "mamba": "refused: another state",
}  # fmt: skip
"""What is tested by default: each mask form, verdict and shape of a cache at least once. Others are `exhaustive`."""


REPRESENTED = [family for family in SUPPORTED if family.name in REPRESENTATIVES]
"""What capabilities are tested on that do with a cache and a mask what passes do: all others are so, too."""


def by_name(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def family_cases(families: Iterable[Family]) -> list[Any]:
    """Parameters of a test, those of no representative marked `exhaustive`."""
    rest = pytest.mark.exhaustive
    return [pytest.param(each, id=each.name, marks=() if each.name in REPRESENTATIVES else rest) for each in families]


def graphs(*, alphabet: str, max_leaves: int) -> st.SearchStrategy[Text]:
    """Return a strategy for texts whose pieces are one to six characters of `alphabet`."""
    return st.recursive(
        st.text(alphabet=alphabet, min_size=1, max_size=6).map(Text),
        lambda inner: st.one_of(
            st.lists(inner, min_size=2, max_size=3).map(lambda texts: sum(texts[1:], start=texts[0])),
            st.lists(inner, min_size=2, max_size=3).map(lambda texts: bp.parallel(*texts)),
        ),
        max_leaves=max_leaves,
    )


def logprobs_of_last(model: Any, pieces: Sequence[Sequence[int]], **how: torch.Tensor) -> npt.NDArray[np.float32]:
    ids = torch.tensor([[token for piece in pieces for token in piece]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **how).logits[0]
    num_tokens = len(pieces[-1])
    logprobs = logits[-num_tokens - 1 : -1].log_softmax(-1).gather(1, ids[0, -num_tokens:, None])[:, 0]
    result: npt.NDArray[np.float32] = logprobs.numpy()
    return result


def as_defined(model: Any, segments: Sequence[Segment], input_ids: dict[Segment, list[int]]) -> dict[str, Any]:
    """The tokens, masks and position ids of a text for one plain pass, written token by token from the definition."""
    places: dict[Segment, list[int]] = {}
    for segment in segments:
        after = max((places[parent][-1] + 1 for parent in segment.parents), default=0)
        start = after if segment.start is None else segment.start
        places[segment] = [start + index for index in range(len(input_ids[segment]))]
    visible = {segment: set(ancestry(segment.parents)) for segment in segments}
    tokens = [(segment, index) for segment in segments for index in range(len(input_ids[segment]))]
    window = getattr(model.config, "sliding_window", None) or len(tokens) + max(map(max, places.values()))
    masks = torch.full((2, len(tokens), len(tokens)), torch.finfo(torch.float32).min)
    for row, (own, index) in enumerate(tokens):
        for column, (other, earlier) in enumerate(tokens):
            if other in visible[own] or (other == own and earlier <= index):
                masks[0, row, column] = 0.0
                if places[own][index] - places[other][earlier] < window:
                    masks[1, row, column] = 0.0
    full, near = masks[:, None, None]
    has_types = len(set(getattr(model.config, "layer_types", None) or ())) > 1
    return {
        "input_ids": torch.tensor([[input_ids[segment][index] for segment, index in tokens]]),
        "position_ids": torch.tensor([[places[segment][index] for segment, index in tokens]]),
        "attention_mask": {FULL: full, SLIDING: near} if has_types else near,
    }


def logprobs_as_defined(
    model: Any, segments: Sequence[Segment], input_ids: dict[Segment, list[int]]
) -> list[npt.NDArray[np.float32]]:
    """Each segment's log-probabilities, NaN where nothing or several segments precede, from one plain pass."""
    with torch.no_grad():
        after = model(**as_defined(model, segments, input_ids), use_cache=False).logits[0].log_softmax(-1)
    rows = dict(zip(segments, after.split([len(input_ids[segment]) for segment in segments]), strict=True))
    unknown = torch.full_like(after[:1], torch.nan)
    result = []
    for segment, own in rows.items():
        before = rows[segment.parents[0]][-1:] if len(segment.parents) == 1 else unknown
        ids = torch.tensor(input_ids[segment])[:, None]
        result.append(torch.cat([before, own[:-1]]).gather(1, ids)[:, 0].numpy())
    return result
