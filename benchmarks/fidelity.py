"""What lossy databases save and what they cost, on a real model and real text."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import backprompt_db as bp
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.compute.inference.kv_cache import KVBuffer, KVShape
from backprompt_db.prompt.ids import address
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from benchmarks.report import Measurement
from benchmarks.timing import Times, alternate

TEXT = Path(__file__).parent.parent / "README.md"
CONTEXT_TOKENS = 1000
CONTINUATION_TOKENS = 500


def lossy_databases(directory: Path) -> list[Measurement]:
    """Bytes, time of reading and change of log-probabilities when the context's keys and values were kept lossily."""
    where = smollm2_directory()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(where).eval(), AutoTokenizer.from_pretrained(where)
    lm = partial(bp.LanguageModel, model, tokenizer, progress=False)
    context, continuation = _texts(tokenizer)
    paths = {fidelity: directory / "scratch" / fidelity for fidelity in Fidelity}
    for fidelity, path in paths.items():
        with bp.open(path, fidelity=fidelity) as db:
            lm(db=db)(context)
    with ExitStack() as stack:
        opened = {fidelity: stack.enter_context(bp.open(path)) for fidelity, path in paths.items()}
        logprobs = {fidelity: _continued(lm(db=db), context, continuation) for fidelity, db in opened.items()}
        exact = lm(db=opened[Fidelity.EXACT])
        key = Key(address(exact.text(context).segments()[0].id, exact.weights_id, exact.tokenizer_id), Part.KV)
        num_tokens = len(exact(context).input_ids)
        times = _read_times(opened, key, model.config, num_tokens)
        sizes = {fidelity: dict(db.store.keys())[key] for fidelity, db in opened.items()}
    return [
        figure
        for fidelity in Fidelity
        if fidelity is not Fidelity.EXACT
        for figure in _figures(fidelity, sizes, times, logprobs)
    ]


def _texts(tokenizer: Any) -> tuple[str, str]:
    """Return the beginning of a text and what follows it there."""
    string = TEXT.read_text(encoding="utf-8")
    offsets = tokenizer(string, return_offsets_mapping=True)["offset_mapping"]
    middle, end = (offsets[index][0] for index in (CONTEXT_TOKENS, CONTEXT_TOKENS + CONTINUATION_TOKENS))
    return string[:middle], string[middle:end]


def _continued(lm: bp.LanguageModel, context: str, continuation: str) -> torch.Tensor:
    """Return the log-probabilities of the continuation's tokens, computed after the context as it was stored."""
    result = (lm.text(context) + continuation)()
    assert result.num_cached_tokens > 0
    return result.token_logprobs[result.num_cached_tokens :].double()


def _read_times(opened: Mapping[Fidelity, bp.Database], key: Key, config: Any, num_tokens: int) -> Times:
    """Time how long each database takes to put the context's keys and values where a model reads them."""
    heads, dim = config.num_key_value_heads, config.head_dim
    shape = KVShape(config.num_hidden_layers, heads, dim, dim, torch.float32)
    buffer = KVBuffer(shape, capacity=num_tokens, device=torch.device("cpu"))

    def read(fidelity: Fidelity, _: int) -> None:
        assert opened[fidelity].load(key, buffer.span(num_tokens), "F32")

    return alternate({fidelity: partial(read, fidelity) for fidelity in opened})


def _figures(
    fidelity: Fidelity, sizes: Mapping[Fidelity, int], times: Times, logprobs: Mapping[Fidelity, torch.Tensor]
) -> list[Measurement]:
    exact = logprobs[Fidelity.EXACT]
    changes = (logprobs[fidelity] - exact).abs()
    perplexity = float(torch.exp(-exact.mean()))
    ratio = float(torch.exp(exact.mean() - logprobs[fidelity].mean()))
    nbytes = f"bytes of a context's kv part over exact ({sizes[fidelity]:,} / {sizes[Fidelity.EXACT]:,})"
    read = f"reading it into place over exact ({times.ms(fidelity)} / {times.ms(Fidelity.EXACT)})"
    change = (
        f"mean change of the log-probability of a token of {len(exact)} after it, SmolLM2-135M-Instruct on this "
        f"project's README (largest {float(changes.max()):.2g}; perplexity {perplexity:.4g} times {ratio:.5f})"
    )
    return [
        Measurement(f"{fidelity}, bytes", nbytes, sizes[fidelity] / sizes[Fidelity.EXACT], "x"),
        Measurement(f"{fidelity}, reading", read, times.ratio(fidelity, Fidelity.EXACT), "x"),
        Measurement(f"{fidelity}, change", change, float(changes.mean()), "nats"),
    ]
