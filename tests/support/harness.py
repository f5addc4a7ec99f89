"""What tests of the harness's adapter share: models in directories, requests, and the harness's own `hf` model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import CORPUS, tiny_gpt2, train_tokenizer

DATA = Path(__file__).parents[1] / "data" / "lm_eval"

SHOTS = "".join(
    f"Question: {question}\nAnswer: {answer}\n\n"
    for question, answer in [
        ("Who lists the users?", "GET /users does."),
        ("And what creates an order?", "POST /orders."),
        ("Does the dog mind the fox at all?", "Not at all, the dog is lazy."),
    ]
)


def save_model(place: Path, *, tokenizer: Any = None, n_positions: int = 256) -> str:
    """Save the tiny GPT-2 with a tokenizer and return where."""
    tiny_gpt2(n_positions=n_positions).save_pretrained(place)
    (tokenizer or train_tokenizer()).save_pretrained(place)
    return str(place)


def hf_model(directory: str, **arguments: Any) -> Any:
    """The harness's own model on the processor."""
    return HFLM(pretrained=directory, device="cpu", batch_size=4, **arguments)


def tokenizing(tokenizer: Any) -> Any:
    """The harness's own model as far as it needs no model: it says which tokens a request has."""
    hf = HFLM.__new__(HFLM)
    hf.tokenizer, hf.backend, hf.add_bos_token, hf.custom_prefix_token_id = tokenizer, "causal", None, None
    return hf


def requests(kind: Any, arguments: Iterable[Sequence[Any]]) -> list[Instance]:
    """Requests as a task makes them."""
    return [Instance(kind, {}, tuple(each), number) for number, each in enumerate(arguments)]


def prefixing_tokenizer() -> PreTrainedTokenizerFast:
    """Like SentencePiece: every string begins with a space, and merges know no words."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>"], show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="<s>")
