"""The arguments of `generate`: which of transformers' may be given here, and what follows from them. Needs no torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from backprompt_db.errors import PromptError

_READ_PADDING = frozenset({
    "bad_words_ids", "encoder_no_repeat_ngram_size", "guidance_scale", "logits_processor", "min_length",
    "no_repeat_ngram_size", "prefix_allowed_tokens_fn", "sequence_bias", "stopping_criteria", "watermarking_config",
})  # fmt: skip
"""Arguments that depend on the order or the number of a prompt's tokens, which padding changes."""

_ALLOWED = _READ_PADDING | {
    "begin_suppress_tokens", "do_sample", "early_stopping", "encoder_repetition_penalty", "eos_token_id",
    "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "forced_eos_token_id", "length_penalty",
    "max_time", "min_new_tokens", "min_p", "num_beams", "pad_token_id", "remove_invalid_values", "renormalize_logits",
    "repetition_penalty", "stop_strings", "suppress_tokens", "temperature", "top_h", "top_k", "top_p", "typical_p",
}  # fmt: skip
"""Any other argument changes what a token sees or what is returned, belongs to other models, or is misspelt."""

_COUNT_FROM_PROMPT = frozenset({
    "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "exponential_decay_length_penalty", "guidance_scale", "min_length", "min_new_tokens",
})  # fmt: skip
"""Arguments for which it matters where the prompt ends."""
_MAY_HAVE_STATE = ("logits_processor", "prefix_allowed_tokens_fn", "stopping_criteria")
"""Objects of a user that may remember what they have seen of one prompt."""
_NEUTRAL_NUMBERS = (None, 0, 1, False)

_PROMPT = "The prompt is all that the model is given."
_CACHE = "The stored keys and values are the cache."
_RESULT = "A result has token_ids and token_logprobs; for more, call model.generate with lm.past_key_values(text)."
_SPECULATION = "Speculative decoding is not supported."
_SECOND_PROMPT = "The model would be run on a second prompt; call model.generate with lm.past_key_values(text)."
_HINTS = {
    **dict.fromkeys(("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids"), _PROMPT),
    **dict.fromkeys(
        (
            *("past_key_values", "cache", "use_cache", "cache_implementation", "cache_config", "max_cache_len"),
            "prefill_chunk_size",
        ),
        _CACHE,
    ),
    **dict.fromkeys(
        ("return_dict_in_generate", "output_logits", "output_scores", "output_attentions", "output_hidden_states"),
        _RESULT,
    ),
    **dict.fromkeys(("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens", "use_mtp"), _SPECULATION),
    **dict.fromkeys(("negative_prompt_ids", "negative_prompt_attention_mask"), _SECOND_PROMPT),
    "generation_config": "Give its values by name, or set lm.model.generation_config.",
    "max_length": "Give max_new_tokens, which does not count the prompt.",
    "tokenizer": "Stop strings are read with the tokenizer of the language model.",
    "token_healing": "It changes the tokens of the prompt, which are those of its pieces.",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateArguments:
    """The arguments of `generate`. Raises `PromptError` for those that cannot be used."""

    max_new_tokens: int
    num_return_sequences: int | None
    """Continuations of each prompt; None for one, without a list around it."""
    streamer: Any
    store: bool
    seed: int | None = None
    """What the random numbers follow from that sampling takes; None for those that come next in this process."""
    others: Mapping[str, Any]
    """The other arguments, by the names that transformers gives them."""

    def __post_init__(self) -> None:
        counts = {"max_new_tokens": self.max_new_tokens, "num_return_sequences": self.num_sequences}
        num_beams = self.others.get("num_beams")
        for name, value in (counts if num_beams is None else {**counts, "num_beams": num_beams}).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PromptError(f"{name}={value!r} is not a number of that kind", hint="Give an int of 1 or more.")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0):
            raise PromptError(f"seed={self.seed!r} is no seed", hint="Give an int of 0 or more.")
        for name in self.others:
            if name not in _ALLOWED:
                hint = _HINTS.get(name, "It does more than choose among the next tokens, or it is misspelt.")
                raise PromptError(f"generate takes no {name}=", hint=hint)

    @property
    def num_sequences(self) -> int:
        """Continuations of each prompt."""
        return 1 if self.num_return_sequences is None else self.num_return_sequences

    def value(self, name: str, model: Any) -> Any:
        """Return an argument, or where it was not given that of the model's own generation configuration."""
        return self.others[name] if name in self.others else getattr(model.generation_config, name, None)

    def num_rows(self, model: Any) -> int:
        """Return how many sequences are generated at a time for each prompt: its beams, or the sequences to return."""
        return max(self.num_beams(model), self.num_sequences)

    def num_beams(self, model: Any) -> int:
        """Return the number of beams; 1 without beam search."""
        return int(self.value("num_beams", model) or 1)

    @property
    def is_one_path(self) -> bool:
        """Whether one continuation is asked for of each prompt, token by token, and no random numbers are named."""
        return self.seed is None and self.num_sequences == 1 and self.others.get("num_beams", 1) == 1

    def description(self) -> str | None:
        """Return the arguments that decide which tokens are chosen, as JSON; None where they have no fixed description.

        On one path a shorter continuation is the beginning of a longer one, so its length is no part of it.
        """
        decisive: dict[str, Any] = dict(self.others)
        if "max_time" in decisive:
            return None
        if not self.is_one_path:
            decisive |= {"max_new_tokens": self.max_new_tokens, "num_sequences": self.num_sequences, "seed": self.seed}
        try:
            return json.dumps(decisive, sort_keys=True)
        except TypeError:  # an object, such as a logits processor
            return None

    def is_repeatable(self, model: Any) -> bool:
        """Whether the same call gives the same tokens again, under this model's own generation configuration."""
        if self.is_one_path and (self.num_beams(model) > 1 or self.value("forced_eos_token_id", model) is not None):
            return False  # its length matters, and is not in the description
        return not self.value("do_sample", model) or self.seed is not None

    def goes_on(self, model: Any) -> bool:
        """Whether a continuation that was cut short goes on as if the prompt had ended where it was cut."""
        return self.is_one_path and all(self.value(name, model) in _NEUTRAL_NUMBERS for name in _COUNT_FROM_PROMPT)

    def admits_padding(self, model: Any) -> bool:
        """Return whether prompts of different lengths may be generated together, with the shorter ones padded."""
        return not any(self.value(name, model) for name in _READ_PADDING)

    def copied(self, *, shared: Iterable[Any]) -> GenerateArguments:
        """Return the arguments with copies of the objects that may have state; `shared` are not copied inside them.

        Raises `PromptError` for an object that cannot be copied.
        """
        objects = {name: self.others[name] for name in _MAY_HAVE_STATE if name in self.others}
        try:
            copies = copy.deepcopy(objects, {id(each): each for each in shared})
        except Exception as error:
            raise PromptError(
                f"{' and '.join(objects)} cannot be copied, and each of several prompts needs its own: {error}",
                hint="Generate after the prompts one by one.",
            ) from error
        return replace(self, others={**self.others, **copies})

    def eos_ids(self, model: Any) -> frozenset[int]:
        """Return the token ids that end a sequence."""
        given = self.value("eos_token_id", model)
        given = getattr(given, "tolist", lambda: given)()  # a tensor, in newer checkpoints
        if given is None:
            return frozenset()
        return frozenset(given if isinstance(given, list | tuple) else [given])


class _Stream:
    """A streamer of transformers that knows whether it has ended."""

    def __init__(self, streamer: Any) -> None:
        if not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
            raise PromptError(f"streamer={streamer!r} is no streamer", hint="Give one of transformers'.")
        self.put = streamer.put
        self._streamer = streamer
        self.has_ended = False

    def end(self) -> None:
        """End the streamer."""
        self.has_ended = True
        self._streamer.end()


@contextmanager
def ended_at_errors(streamer: Any) -> Iterator[Any]:
    """Yield a streamer, or None, that is ended where the block raises: who reads it would wait for ever.

    Raises `PromptError` for anything but a streamer.
    """
    if streamer is None:
        yield None
        return
    stream = _Stream(streamer)
    try:
        yield stream
    except BaseException:
        if not stream.has_ended:
            stream.end()
        raise
