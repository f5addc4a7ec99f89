"""Continuations for the harness: what its `hf` model writes. A greedy continuation is found again, not computed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from backprompt_db.compute.generate_arguments import GenerateArguments
from backprompt_db.integrations.lm_eval.token_pieces import text_of

if TYPE_CHECKING:
    from backprompt_db.compute.engine import Engine
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.integrations.lm_eval.greedy import GreedyPaths
    from backprompt_db.integrations.lm_eval.token_pieces import PieceFinder
    from backprompt_db.prompt.text import Text

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": (), "begin_suppress_tokens": (), "dola_layers": (), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "exponential_decay_length_penalty": (), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "guidance_scale": (1,), "min_length": (0,), "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,), "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0,),
    "remove_invalid_values": (False,), "repetition_penalty": (1,), "sequence_bias": (), "suppress_tokens": (),
    "watermarking_config": (),
}  # fmt: skip
"""Values of a generation configuration, besides None, with which the likeliest token is still the one chosen."""


def is_plain(generation_config: Any) -> bool:
    """Whether the model's own configuration leaves decoding without sampling to choose the likeliest tokens."""
    values = {name: getattr(generation_config, name, None) for name in _NEUTRAL}
    return all(value in (None, *_NEUTRAL[name]) for name, value in values.items())


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """The harness's `gen_kwargs`, as arguments of transformers' `generate`."""

    until: list[str]
    """Stop strings. The empty string is in every text, so that with it one token is written."""
    max_new_tokens: int
    others: Mapping[str, Any]

    @classmethod
    def of(cls, gen_kwargs: Mapping[str, Any], *, max_gen_toks: int, eos: str) -> GenerationSettings:
        """Read `gen_kwargs` as the harness's `hf` model does, which also stops at `eos`, the end-of-sequence token."""
        values = dict(normalize_gen_kwargs(dict(gen_kwargs), max_gen_toks))
        until = handle_stop_sequences(values.pop("until", None), eos=eos)
        max_new_tokens = values.pop("max_gen_toks")
        if not values.get("do_sample"):
            values = {name: value for name, value in values.items() if name not in ("do_sample", "temperature")}
            values["do_sample"] = False
        return cls(until, max_new_tokens, values)

    @property
    def is_greedy(self) -> bool:
        """Whether these arguments choose nothing but the likeliest token."""
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

    def strings(self, prompts: Sequence[list[int]], settings: GenerationSettings, finder: PieceFinder) -> list[str]:
        """Return what follows each of these sequences of token ids, up to a stop string."""
        divided = [finder.divide(ids, cut=len(ids)) for ids in prompts]
        texts = {number: text_of(pieces[0]) for number, pieces in enumerate(divided) if pieces}
        found = self._of_texts(texts, settings)
        return [
            self._string(found[number] if number in found else self._run(ids, settings), settings)
            for number, ids in enumerate(prompts)
        ]

    def _of_texts(self, texts: Mapping[int, Text], settings: GenerationSettings) -> dict[int, Sequence[int]]:
        """Return the token ids that follow each text: its greedy path, where enough of that is known."""
        if not texts or not (settings.is_greedy and is_plain(self._config)):
            return dict(zip(texts, self._generate(list(texts.values()), settings), strict=True))
        addresses = self._engine.addresses()
        tips = {number: text.tips(self._namespace)[0] for number, text in texts.items()}
        known = self._paths.known(tips.values(), addresses)
        missing = [number for number, tip in tips.items() if not self._is_whole(known[tip], settings)]
        written = dict(zip(missing, self._generate([texts[number] for number in missing], settings), strict=True))
        self._paths.save({tips[number]: tuple(ids) for number, ids in written.items()}, addresses, known=known)
        return {number: known[tip] for number, tip in tips.items()} | written

    def _generate(self, texts: Sequence[Text], settings: GenerationSettings) -> list[Sequence[int]]:
        """Generate after all texts together, then again, alone, after a text whose own end began the stop string."""
        if not texts:
            return []
        stops = [term for term in settings.until if term]
        together = self._call(texts, settings, {"stop_strings": stops} if stops else {})
        return [
            ids
            if self._is_whole(ids, settings)
            else self._call([text], settings, {"stopping_criteria": [self._stop(text, settings)]})[0]
            for text, ids in zip(texts, together, strict=True)
        ]

    def _call(
        self, texts: Sequence[Text], settings: GenerationSettings, stops: Mapping[str, Any]
    ) -> list[Sequence[int]]:
        from backprompt_db.compute.generate import Decoder
        from backprompt_db.compute.healing import Healed
        from backprompt_db.compute.keeping import AUTO, Keep

        arguments = GenerateArguments(
            max_new_tokens=settings.max_new_tokens,
            num_return_sequences=None,
            streamer=None,
            store=False,
            others={**settings.others, **stops, "eos_token_id": self._eos_ids, "pad_token_id": self._pad_id},
        )

        def as_written(text: Text) -> Healed:
            return Healed.as_written(text, namespace=self._namespace)

        decoder = Decoder(self._engine, self._source, arguments, as_written, Keep.named(AUTO))
        results, _ = decoder.decode(list(map(as_written, texts)), [None] * len(texts))
        return [each.ids for (each,) in results]

    def _run(self, ids: list[int], settings: GenerationSettings) -> Sequence[int]:
        """Run the model on token ids that no string has; nothing is stored."""
        import torch

        from backprompt_db.compute.inference.forward import evaluation

        runner = self._engine.prove()
        with evaluation(runner.model):
            written = runner.model.generate(
                torch.tensor([ids], device=runner.device),
                max_new_tokens=settings.max_new_tokens,
                stopping_criteria=[self._stop_after(len(ids), settings)],
                eos_token_id=self._eos_ids,
                pad_token_id=self._pad_id,
                **settings.others,
            )
        runner.num_calls += 1
        continuation: list[int] = written[0, len(ids) :].tolist()
        return continuation

    def _stop(self, text: Text, settings: GenerationSettings) -> Any:
        segments = text.segments(self._namespace)
        return self._stop_after(sum(map(len, self._source.tokenizer.encode(segments).values())), settings)

    def _stop_after(self, num_prompt_tokens: int, settings: GenerationSettings) -> Any:
        """Return the criterion that stops when what was generated has a stop string in it."""

        def is_done(input_ids: Any, *_: Any, **__: Any) -> Any:
            import torch

            done = [self._has_stop(ids[num_prompt_tokens:].tolist(), settings) for ids in input_ids]
            return torch.tensor(done, device=input_ids.device)

        return is_done

    def _is_whole(self, ids: Sequence[int], settings: GenerationSettings) -> bool:
        """Whether a continuation has reached its end, or is as long as it may be."""
        return (
            len(ids) >= settings.max_new_tokens or bool(set(ids) & set(self._eos_ids)) or self._has_stop(ids, settings)
        )

    def _has_stop(self, ids: Sequence[int], settings: GenerationSettings) -> bool:
        string = self._source.tokenizer.tokenizer.decode(list(ids), skip_special_tokens=False)
        return bool(ids) and any(term in string for term in settings.until)

    def _before_stop(self, ids: Sequence[int], settings: GenerationSettings) -> list[int]:
        """Return the ids up to the one that completes a stop string: a special token would be missing in the string."""
        if not self._has_stop(ids, settings):
            return list(ids)
        return list(ids[: bisect_left(range(len(ids)), True, key=lambda end: self._has_stop(ids[:end], settings))])  # noqa: FBT003

    def _string(self, ids: Sequence[int], settings: GenerationSettings) -> str:
        end = next((index for index, token in enumerate(ids) if token in self._eos_ids), len(ids))
        kept = self._before_stop(ids[: min(end, settings.max_new_tokens)], settings)
        string = self._source.tokenizer.tokenizer.decode(kept, skip_special_tokens=True)
        result: str = postprocess_generated_text(string, settings.until, None)
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
