"""Continuations for the harness: what its `hf` model writes, found again where it is the greedy path of a prompt."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from backprompt_db.compute.inference.decoding import GenerateArguments
from backprompt_db.prompt.text import Text

if TYPE_CHECKING:
    from backprompt_db.compute.engine import Engine
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.integrations.lm_eval.greedy import GreedyPaths
    from backprompt_db.integrations.lm_eval.spelling import Speller

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": (), "begin_suppress_tokens": (), "dola_layers": (), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "exponential_decay_length_penalty": (), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "guidance_scale": (1,), "min_length": (0,), "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,), "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0,),
    "remove_invalid_values": (False,), "repetition_penalty": (1,), "sequence_bias": (), "suppress_tokens": (),
    "watermarking_config": (),
}  # fmt: skip
"""What a generation configuration may say, apart from None, without another token than the likeliest being chosen."""


def is_plain(generation_config: Any) -> bool:
    """Whether decoding without sampling follows the likeliest tokens, as far as the model's own configuration says."""
    values = {name: getattr(generation_config, name, None) for name in _NEUTRAL}
    return all(value in (None, *_NEUTRAL[name]) for name, value in values.items())


@dataclass(frozen=True, slots=True)
class Told:
    """What the harness's `gen_kwargs` mean for transformers."""

    until: list[str]
    """The empty string is in whatever is written: with it, that is one token."""
    max_new_tokens: int
    others: Mapping[str, Any]

    @classmethod
    def of(cls, gen_kwargs: Mapping[str, Any], *, max_gen_toks: int, eos: str) -> Told:
        """Read them as the harness's `hf` model does; it ends at `eos`, the end-of-sequence token, too."""
        values = dict(normalize_gen_kwargs(dict(gen_kwargs), max_gen_toks))
        until = handle_stop_sequences(values.pop("until", None), eos=eos)
        max_new_tokens = values.pop("max_gen_toks")
        if not values.get("do_sample"):
            values = {name: value for name, value in values.items() if name not in ("do_sample", "temperature")}
            values["do_sample"] = False
        return cls(until, max_new_tokens, values)

    @property
    def is_greedy(self) -> bool:
        """Whether nothing but the likeliest token is chosen, if the model's own configuration says no more."""
        return self.others == {"do_sample": False}


class Generator:
    """Continues prompts under one model."""

    def __init__(
        self, engine: Engine, source: ModelSource, *, paths: GreedyPaths, generation_config: Any, namespace: str
    ) -> None:
        self._engine = engine
        self._source = source
        self._paths = paths
        self._config = generation_config
        self._namespace = namespace

    def strings(self, prompts: Sequence[list[int]], told: Told, speller: Speller) -> list[str]:
        """Return what follows each of these sequences of token ids, up to a stop string."""
        spelled = [speller.spell(ids, cut=len(ids)) for ids in prompts]
        texts = {number: _text(pieces[0]) for number, pieces in enumerate(spelled) if pieces}
        found = self._inside(texts, told)
        return [
            self._string(found[number] if number in found else self._outside(ids, told), told)
            for number, ids in enumerate(prompts)
        ]

    def _inside(self, texts: Mapping[int, Text], told: Told) -> dict[int, Sequence[int]]:
        """Return the token ids that follow each text: those of its greedy path, where that is known far enough."""
        if not texts or not (told.is_greedy and is_plain(self._config)):
            return dict(zip(texts, self._generate(list(texts.values()), told), strict=True))
        addresses = self._engine.addresses()
        tips = {number: text.tips(self._namespace)[0] for number, text in texts.items()}
        known = self._paths.known(tips.values(), addresses)
        missing = [number for number, tip in tips.items() if not self._is_whole(known[tip], told)]
        written = dict(zip(missing, self._generate([texts[number] for number in missing], told), strict=True))
        self._paths.save({tips[number]: tuple(ids) for number, ids in written.items()}, addresses, known=known)
        return {number: known[tip] for number, tip in tips.items()} | written

    def _generate(self, texts: Sequence[Text], told: Told) -> list[Sequence[int]]:
        """Generate after texts together; once more, alone, after those that stopped at what their own end began."""
        if not texts:
            return []
        stops = [term for term in told.until if term]
        together = self._call(texts, told, {"stop_strings": stops} if stops else {})
        return [
            ids
            if self._is_whole(ids, told)
            else self._call([text], told, {"stopping_criteria": [self._stop(text, told)]})[0]
            for text, ids in zip(texts, together, strict=True)
        ]

    def _call(self, texts: Sequence[Text], told: Told, stops: Mapping[str, Any]) -> list[Sequence[int]]:
        from backprompt_db.compute.generate import generate

        arguments = GenerateArguments(
            max_new_tokens=told.max_new_tokens,
            num_return_sequences=None,
            streamer=None,
            store=False,
            others={**told.others, **stops, "eos_token_id": self._eos_ids, "pad_token_id": self._pad_id},
        )
        results = generate(self._engine, self._source, texts, arguments, namespace=self._namespace)
        return [each.token_ids.tolist() for (each,) in results]

    def _outside(self, ids: list[int], told: Told) -> Sequence[int]:
        """Continue token ids that no string has."""
        import torch

        from backprompt_db.compute.inference.forward import evaluation

        runner = self._engine.prove()
        with evaluation(runner.model):
            written = runner.model.generate(
                torch.tensor([ids], device=runner.device),
                max_new_tokens=told.max_new_tokens,
                stopping_criteria=[self._stop_after(len(ids), told)],
                eos_token_id=self._eos_ids,
                pad_token_id=self._pad_id,
                **told.others,
            )
        runner.num_calls += 1
        continuation: list[int] = written[0, len(ids) :].tolist()
        return continuation

    def _stop(self, text: Text, told: Told) -> Any:
        segments = text.segments(self._namespace)
        return self._stop_after(sum(map(len, self._source.tokenizer.encode(segments).values())), told)

    def _stop_after(self, num_prompt_tokens: int, told: Told) -> Any:
        """Return the criterion that what was generated has a stop string in it."""

        def is_done(input_ids: Any, *_: Any, **__: Any) -> Any:
            import torch

            done = [self._has_stop(ids[num_prompt_tokens:].tolist(), told) for ids in input_ids]
            return torch.tensor(done, device=input_ids.device)

        return is_done

    def _is_whole(self, ids: Sequence[int], told: Told) -> bool:
        """Whether a continuation goes as far as it is wanted."""
        return len(ids) >= told.max_new_tokens or bool(set(ids) & set(self._eos_ids)) or self._has_stop(ids, told)

    def _has_stop(self, ids: Sequence[int], told: Told) -> bool:
        string = self._source.tokenizer.tokenizer.decode(list(ids), skip_special_tokens=False)
        return bool(ids) and any(term in string for term in told.until)

    def _before_stop(self, ids: Sequence[int], told: Told) -> list[int]:
        """Return the ids up to the one that completes a stop string: one that is special is not in the string."""
        if not self._has_stop(ids, told):
            return list(ids)
        return list(ids[: bisect_left(range(len(ids)), True, key=lambda end: self._has_stop(ids[:end], told))])  # noqa: FBT003

    def _string(self, ids: Sequence[int], told: Told) -> str:
        end = next((index for index, token in enumerate(ids) if token in self._eos_ids), len(ids))
        kept = self._before_stop(ids[: min(end, told.max_new_tokens)], told)
        string = self._source.tokenizer.tokenizer.decode(kept, skip_special_tokens=True)
        result: str = postprocess_generated_text(string, told.until, None)
        return result

    @cached_property
    def _eos_ids(self) -> list[int]:
        configured = self._config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        return sorted({token for token in (*ids, self._source.tokenizer.tokenizer.eos_token_id) if token is not None})

    @cached_property
    def _pad_id(self) -> int:
        tokenizer = self._source.tokenizer.tokenizer
        return int(self._eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _text(pieces: Sequence[str]) -> Text:
    text = Text("")
    for piece in pieces:
        text += piece
    return text
