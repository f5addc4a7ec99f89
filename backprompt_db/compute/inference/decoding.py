"""One call of transformers' `generate` over stored keys and values: its arguments, its prompts and its outcome.

The call gets the token ids of the whole prompt and a cache of all of them but the last, so that it computes one token
where a plain call computes the prompt. Prompts of different lengths are padded on the left, in the cache too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache
from transformers.generation import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from backprompt_db.compute import plan
from backprompt_db.compute.generate_arguments import GenerateArguments
from backprompt_db.compute.healing import Healed
from backprompt_db.compute.inference.forward import evaluation
from backprompt_db.compute.inference.kv_cache import CACHE_KEYWORD, cache_argument, cache_of_rows
from backprompt_db.compute.plan import Need
from backprompt_db.errors import ContextLengthExceeded, PromptError, UnsupportedModel
from backprompt_db.prompt.representation import Arrays, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.prompt.text import Text

if TYPE_CHECKING:
    from backprompt_db.compute.inference.runner import ModelRunner
    from backprompt_db.compute.tokens import SegmentTokenizer

NEUTRAL: Mapping[str, Any] = {
    "use_cache": True, "cache_implementation": None, "prefill_chunk_size": None, "token_healing": False,
    "prompt_lookup_num_tokens": None, "use_mtp": None, "return_dict_in_generate": True, "output_logits": True,
    "output_scores": False, "output_attentions": False, "output_hidden_states": False,
}  # fmt: skip
"""Values of arguments that nobody may give: the model's own generation configuration may have others."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The beginning of a continuation, which was generated before and was cut short."""

    segment: Segment
    token_ids: Sequence[int]
    token_logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's tokens in the order in which it was written, the order of keys and values in a cache."""

    text: Text
    segments: list[Segment]
    num_tokens: list[int]
    """Tokens of each segment."""
    input_ids: list[int]
    position_ids: list[int]
    begun: Begun | None = None
    """What was generated before, and is the last segment."""

    @classmethod
    def of(cls, healed: Healed, tokenizer: SegmentTokenizer, begun: Begun | None = None) -> Prompt:
        """Tokenise a text. Raises `PromptError` for one that ends in parallel branches."""
        if len(healed.tips) != 1:
            raise PromptError(
                "the prompt ends in parallel branches, where nothing predicts what follows",
                hint="Put the text that asks for the continuation after the branches.",
            )
        segments = [*healed.segments, *([begun.segment] if begun else [])]
        ids = tokenizer.encode(segments)
        num_tokens = {segment: len(ids[segment]) for segment in segments}
        starts = plan.positions(segments, num_tokens)
        places = [starts[segment] + index for segment in segments for index in range(num_tokens[segment])]
        joined = [token for segment in segments for token in ids[segment]]
        return cls(healed.text, segments, list(num_tokens.values()), joined, places, begun)

    @property
    def tip(self) -> Segment:
        """The segment that the whole continuation follows; it sees all before it."""
        return self.segments[-2 if self.begun else -1]

    @property
    def num_begun(self) -> int:
        """How many tokens of the continuation are there already."""
        return len(self.begun.token_ids) if self.begun else 0

    @property
    def is_plain(self) -> bool:
        """Whether the position ids are those of an ordinary prompt."""
        return self.position_ids == list(range(len(self.input_ids)))

    def require_possible(self, runner: ModelRunner, num_tokens: int) -> None:
        """Raise an error where the model cannot continue the prompt by `num_tokens`.

        `ContextLengthExceeded` where the model has too few positions. `UnsupportedModel` for branches and gaps, if the
        model runs plain chains only, or if the text is longer than its window: `generate` masks windows by places in
        the cache.
        """
        places = len(self.input_ids) + num_tokens
        positions = self.position_ids[-1] + 1 + num_tokens
        _require_room("positions", positions, runner.max_positions, num_tokens)
        _require_room("places in its mask", places, runner.max_columns, num_tokens)
        window = runner.window
        if not self.is_plain and (not runner.takes_packs or (window is not None and max(places, positions) > window)):
            raise UnsupportedModel(
                "this model generates after plain chains only"
                + (f", once a prompt is longer than its window of {window:,}" if window else ""),
                hint="Use no parallel branches and no explicit start with it.",
            )


def _require_room(what: str, num_needed: int, limit: int | None, num_tokens: int) -> None:
    if limit is not None and num_needed > limit:
        raise ContextLengthExceeded(
            f"the prompt and {num_tokens:,} new tokens need {num_needed:,} {what}, this model takes {limit:,}",
            hint=f"Shorten the prompt, or max_new_tokens, by {num_needed - limit:,}.",
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One generated sequence."""

    prompt: Prompt
    token_ids: list[int]
    """The generated tokens, up to an end-of-sequence token, which is included."""
    token_logprobs: npt.NDArray[np.float32]
    """float32 [T]: natural log-probability of each token under the model itself."""
    num_kept: int
    """Tokens of the continuation: all but the end-of-sequence token."""
    is_finished: bool
    """Whether it ended by itself, and not because no more tokens were asked for."""

    @property
    def num_decoded(self) -> int:
        """How many of its tokens were generated now."""
        return len(self.token_ids) - self.prompt.num_begun


@dataclass(frozen=True, eq=False)
class Decoding:
    """The prompts of one call of `generate`."""

    runner: ModelRunner
    prompts: Sequence[Prompt]
    arguments: GenerateArguments

    def run(self, found: Mapping[Need, Arrays], tokenizer: Any) -> Outcome:
        """Generate after the prompts' keys and values. Raises `UnsupportedModel` for a model that cannot generate."""
        model = self.runner.model
        if not hasattr(model, "generate"):
            raise UnsupportedModel(
                f"{type(model).__name__} has no generate", hint="Use a model class of transformers that has."
            )
        began = time.perf_counter()
        stops = _Stops(self._stop_criteria(tokenizer), self.padding)
        cache = self._cache(found)
        with _seeded(self.arguments.seed), evaluation(model):
            output = model.generate(**self.inputs, **{CACHE_KEYWORD: cache}, **self._call_arguments(stops))
        outcome = Outcome(self, output, stops.lengths, cache, time.perf_counter() - began)
        self.runner.num_calls += outcome.num_steps
        return outcome

    @property
    def num_rows(self) -> int:
        """How many sequences are generated at a time for each prompt."""
        return self.arguments.num_rows(self.runner.model)

    @cached_property
    def longest(self) -> int:
        """How many tokens the longest prompt has."""
        return max(len(prompt.input_ids) for prompt in self.prompts)

    @cached_property
    def padding(self) -> list[int]:
        """How many tokens of padding stand before each prompt."""
        return [self.longest - len(prompt.input_ids) for prompt in self.prompts]

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The model's inputs: int64 [num_prompts, longest] each.

        Padding repeats the prompt's first token, so that a penalty for repetition meets no token that the prompt lacks.
        """
        padded = list(zip(self.padding, self.prompts, strict=True))
        rows = {
            "input_ids": [prompt.input_ids[:1] * padding + prompt.input_ids for padding, prompt in padded],
            "attention_mask": [[0] * padding + [1] * len(prompt.input_ids) for padding, prompt in padded],
        }
        if self.runner.takes_packs:  # else the prompt is plain, and the model counts positions itself
            rows["position_ids"] = [[0] * padding + prompt.position_ids for padding, prompt in padded]
        return {name: torch.tensor(values, device=self.runner.device) for name, values in rows.items()}

    def _cache(self, found: Mapping[Need, Arrays]) -> Cache:
        """Return the keys and values of all tokens but the last, with memory for all that will be generated."""
        parts = [[found[segment, Part.KV] for segment in prompt.segments] for prompt in self.prompts]
        cache = cache_of_rows(
            self.runner.shape,
            parts,
            padding=self.padding,
            copies=self.num_rows,
            capacity=self.longest + self.arguments.max_new_tokens,
            device=self.runner.device,
        )
        cache.crop(-1)
        return cache

    def _stop_criteria(self, tokenizer: Any) -> list[Any]:
        strings = self.arguments.value("stop_strings", self.runner.model)
        criteria = list(self.arguments.others.get("stopping_criteria") or ())
        return [StopStringCriteria(tokenizer, strings), *criteria] if strings else criteria

    def _call_arguments(self, stops: _Stops) -> dict[str, Any]:
        """Return the arguments of the call: the given ones, and those that the result and the cache depend on."""
        config = self.runner.model.generation_config
        given = {**self.arguments.others, "stop_strings": None, "stopping_criteria": StoppingCriteriaList([stops])}
        return {
            **given,
            **{name: value for name, value in NEUTRAL.items() if hasattr(config, name)},
            "max_new_tokens": self.arguments.max_new_tokens,
            "num_return_sequences": self.arguments.num_sequences,
            "streamer": self.arguments.streamer,
        }


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Take random numbers that follow from a seed, and leave those of the process as they are."""
    with torch.random.fork_rng() if seed is not None else nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        yield


class _Stops(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Stopping criteria that see each prompt without its padding, and how long each row was when it first met one.

    A row that is done is filled up until all rows are; its end could not be found afterwards.
    """

    def __init__(self, criteria: Sequence[Any], padding: Sequence[int]) -> None:
        self.lengths: dict[int, int] = {}
        self._criteria = criteria
        self._padding = padding

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return which rows are done: bool [num_rows]."""
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self._criteria:
            rows = zip(done.chunk(len(self._padding)), input_ids.chunk(len(self._padding)), self._padding, strict=True)
            for own, ids, padding in rows:
                for criterion in self._criteria:
                    own.logical_or_(criterion(ids[:, padding:], scores, **kwargs))
            for row in done.nonzero()[:, 0].tolist():
                self.lengths.setdefault(row, input_ids.shape[1])
        return done


@dataclass(frozen=True, eq=False)
class Outcome:
    """The output of one call of `generate`, and the cache that it filled."""

    decoding: Decoding
    output: Any
    stopped: Mapping[int, int]
    """Lengths at which rows met a stop string or the caller's own criteria."""
    cache: Cache
    seconds: float

    @property
    def num_steps(self) -> int:
        """How many tokens were generated for the longest row."""
        return int(self.output.sequences.shape[1]) - self.decoding.longest

    @property
    def is_searched(self) -> bool:
        """Whether this was a beam search, which moves and overwrites rows of the cache."""
        return getattr(self.output, "beam_indices", None) is not None

    @cached_property
    def is_in_cache(self) -> bool:
        """Whether the cache holds each row's tokens one after the other, all but the last."""
        return not self.is_searched and self.cache.get_seq_length() == self.decoding.longest + self.num_steps - 1

    @cached_property
    def rows(self) -> list[Row]:
        """The generated sequences, prompt by prompt."""
        arguments = self.decoding.arguments
        eos_ids, num_sequences = arguments.eos_ids(self.decoding.runner.model), arguments.num_sequences
        generated = self.output.sequences[:, self.decoding.longest :].cpu()
        logprobs = self._logprobs()
        rows = []
        for index, ids in enumerate(generated.tolist()):
            end = self._end(index, ids, eos_ids)
            num_kept = end - (end > 0 and ids[end - 1] in eos_ids)
            is_finished = num_kept < end or index in self.stopped or end < arguments.max_new_tokens
            prompt = self.decoding.prompts[index // num_sequences]
            row = Row(prompt, ids[:end], logprobs[index, :end].copy(), num_kept, is_finished)
            rows.append(row if prompt.begun is None else _joined(prompt.begun, row))
        return rows

    def _end(self, row: int, ids: Sequence[int], eos_ids: frozenset[int]) -> int:
        if self.is_searched:
            return int((self.output.beam_indices[row] >= 0).sum())
        stop = self.stopped.get(row, len(ids) + self.decoding.longest) - self.decoding.longest
        return min(stop, next((index + 1 for index, token in enumerate(ids) if token in eos_ids), len(ids)))

    def _logprobs(self) -> npt.NDArray[np.float32]:
        """Return the log-probability of each generated token, float32 [num_rows, num_steps]; any number for padding."""
        tokens = self.output.sequences[:, self.decoding.longest :]
        sources = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
        if self.is_searched:  # at each step, the beam that the token was appended to
            sources = self.output.beam_indices.clamp_min(0).long()
        steps = []
        for step, logits in enumerate(self.output.logits[: tokens.shape[1]]):
            rows = logits[sources[:, step]]
            steps.append(rows.gather(1, tokens[:, step, None])[:, 0] - rows.logsumexp(1))
        result: npt.NDArray[np.float32] = torch.stack(steps, 1).float().cpu().numpy()
        return result

    @cached_property
    def last_logits(self) -> torch.Tensor:
        """The logits after the last step, float32 [num_rows, vocab_size]; they take one more pass over one token."""
        decoding = self.decoding
        inputs = {name: values.repeat_interleave(decoding.num_rows, 0) for name, values in decoding.inputs.items()}
        added = torch.ones_like(self.output.sequences[:, decoding.longest :])
        step = {
            "input_ids": self.output.sequences[:, -1:],
            "attention_mask": torch.cat([inputs["attention_mask"], added], 1),
        }
        if "position_ids" in inputs:
            step["position_ids"] = inputs["position_ids"][:, -1:] + self.num_steps
        with evaluation(decoding.runner.model):
            model = decoding.runner.model
            output = model(**step, **cache_argument(model, self.cache), use_cache=True, return_dict=True)
        decoding.runner.num_calls += 1
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def logits_after(self, row: int, num_tokens: int) -> torch.Tensor:
        """Return a copy of the logits [vocab_size] after the first `num_tokens` generated tokens of a row."""
        logits = self.output.logits[num_tokens] if num_tokens < len(self.output.logits) else self.last_logits
        own: torch.Tensor = logits[row].clone()
        return own


def _joined(begun: Begun, row: Row) -> Row:
    """Return the whole continuation, of which the row has generated the rest."""
    return Row(
        row.prompt,
        [*begun.token_ids, *row.token_ids],
        np.concatenate([begun.token_logprobs, row.token_logprobs]),
        len(begun.token_ids) + row.num_kept,
        row.is_finished,
    )
