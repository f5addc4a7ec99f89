"""What was generated before, which is found again by its prompt and arguments: without the model and its tokenizer."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from backprompt_db.catalog.records import GenerationRecord
from backprompt_db.compute.call import Addresses
from backprompt_db.compute.healing import Heal, Healed
from backprompt_db.errors import PromptError
from backprompt_db.prompt.generated import Generated
from backprompt_db.prompt.representation import Part
from backprompt_db.prompt.text import Text

if TYPE_CHECKING:
    from backprompt_db.compute.engine import Engine
    from backprompt_db.compute.generate import Continuation
    from backprompt_db.compute.generate_arguments import GenerateArguments
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.compute.keeping import Keep
    from backprompt_db.database.database import Database

_GENERATION = b"backprompt-db/generation/1\0"

_SCORES = frozenset({Part.SCORES})


class GenerationMemory:
    """The generations that a database remembers."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._unsaved: dict[bytes, GenerationRecord] = {}
        """What was generated where nothing can be saved, as in a database in memory."""

    def known(self, keys: Sequence[bytes]) -> dict[bytes, GenerationRecord]:
        """Return what was generated under these keys."""
        here = {key: self._unsaved[key] for key in keys if key in self._unsaved}
        return self._db.model_metadata.generations(keys) | here if keys else {}

    def save(self, records: Sequence[GenerationRecord]) -> None:
        """Remember what was generated."""
        if self._db.catalog is None or self._db.readonly:
            self._unsaved.update((record.key, record) for record in records)
        else:
            self._db.model_metadata.save(*records)


@dataclass(frozen=True, slots=True)
class Generator:
    """Answers calls of `generate` on one model, out of what is remembered where that is enough."""

    engine: Engine
    source: ModelSource
    memory: GenerationMemory
    heal: Heal
    keep: Keep

    def generate(self, texts: Sequence[Healed], arguments: GenerateArguments) -> list[list[Generated]]:
        """Return `arguments.num_sequences` continuations of each text.

        Raises `PromptError`, `ContextLengthExceeded` and `UnsupportedModel` before anything is generated.
        """
        _check(texts, arguments)
        addresses = self.engine.addresses()
        keys = self._keys(texts, arguments, addresses)
        known = self.memory.known([key for some in keys for key in some])
        found = {
            number: [self._result(text, known[key], arguments, addresses) for key in some]
            for number, (text, some) in enumerate(zip(texts, keys, strict=True))
            if some and all(key in known and _is_enough(known[key], arguments) for key in some)
        }
        if len(found) < len(texts) and not arguments.is_one_path:
            found = {}  # random numbers, and beams, are shared by all prompts of a call
        missing = [number for number in range(len(texts)) if number not in found]
        if missing:
            from backprompt_db.compute.generate import Decoder

            decoder = Decoder(self.engine, self.source, arguments, self.heal, self.keep)
            begun = [known.get(keys[number][0]) if keys[number] else None for number in missing]
            results, repeatable = decoder.decode([texts[number] for number in missing], begun)
            self.memory.save(_records([key for number in missing for key in keys[number]], repeatable, addresses))
            found |= dict(zip(missing, results, strict=True))
        return [found[number] for number in range(len(texts))]

    def _keys(self, texts: Sequence[Healed], arguments: GenerateArguments, addresses: Addresses) -> list[list[bytes]]:
        """Return under what each sequence of each prompt is remembered; nothing for what cannot be."""
        description, defaults = arguments.description(), self.source.defaults_id
        if not arguments.store or description is None or defaults is None:
            return [[] for _ in texts]
        prompts = [addresses.address(text.tips[0]).hex() for text in texts]
        if arguments.is_one_path:
            return [[_digest([description, defaults.hex(), prompt])] for prompt in prompts]
        call, rows = [description, defaults.hex(), *prompts], range(arguments.num_sequences)
        return [[_digest([*call, number, row]) for row in rows] for number in range(len(prompts))]

    def _result(
        self, text: Healed, record: GenerationRecord, arguments: GenerateArguments, addresses: Addresses
    ) -> Generated:
        """Return a remembered continuation, or as much of it as is asked for, which takes the tokenizer."""
        began = time.monotonic()
        if len(record.token_ids) > arguments.max_new_tokens:
            record = self._cut(record, arguments.max_new_tokens)
        end = self.heal(text.text.continued(Text(record.string))).tips[0] if record.string else text.tips[0]
        call = self.engine.find({end: _SCORES}, addresses)
        if arguments.streamer is not None:
            self._stream(text, record, arguments.streamer)
        return Generated(
            prompt=text.text,
            string=record.string,
            ids=record.token_ids,
            logprobs=np.frombuffer(record.token_logprobs, dtype="<f4"),
            is_stored=_has_tokens(call.found.get((end, Part.SCORES)), record, is_empty=not record.string),
            fidelity=self.engine.fidelity,
            num_cached_tokens=call.num_cached_tokens,
            seconds=time.monotonic() - began,
        )

    def _cut(self, record: GenerationRecord, num_tokens: int) -> GenerationRecord:
        ids = record.token_ids[:num_tokens]
        return replace(
            record,
            string=self.source.tokenizer.decode(ids),
            token_ids=ids,
            token_logprobs=record.token_logprobs[: 4 * num_tokens],
            num_kept=min(record.num_kept, num_tokens),
        )

    def _stream(self, text: Healed, record: GenerationRecord, streamer: Any) -> None:
        """Give a streamer what it would have been given: the prompt, then token by token."""
        import torch

        prompt = self.source.tokenizer.encode(text.segments)
        streamer.put(torch.tensor([[token for segment in text.segments for token in prompt[segment]]]))
        for token in record.token_ids:
            streamer.put(torch.tensor([token]))
        streamer.end()


def _check(texts: Sequence[Healed], arguments: GenerateArguments) -> None:
    if arguments.streamer is not None and len(texts) > 1:
        raise PromptError("a streamer takes one prompt", hint="Generate after the prompts one by one.")
    if any(len(text.tips) != 1 for text in texts):
        raise PromptError(
            "the prompt ends in parallel branches, where nothing predicts what follows",
            hint="Put the text that asks for the continuation after the branches.",
        )


def _digest(facts: Sequence[Any]) -> bytes:
    return hashlib.sha256(_GENERATION + json.dumps(facts).encode()).digest()


def _is_enough(record: GenerationRecord, arguments: GenerateArguments) -> bool:
    return record.is_finished or len(record.token_ids) >= arguments.max_new_tokens


def _has_tokens(scores: Mapping[str, Any] | None, record: GenerationRecord, *, is_empty: bool) -> bool:
    """Whether what is stored of a continuation has the tokens that were generated."""
    if scores is None:
        return False
    return is_empty or scores["input_ids"].numpy().tolist() == list(record.token_ids[: record.num_kept])


def _records(
    keys: Sequence[bytes], continuations: Sequence[Continuation], addresses: Addresses
) -> list[GenerationRecord]:
    """Return what is to be remembered of continuations: of those that are text, so that they go when it is purged."""
    return [
        GenerationRecord(
            key=key,
            address=addresses.address(each.segment),
            string=each.string,
            token_ids=tuple(each.row.token_ids),
            token_logprobs=each.row.token_logprobs.astype("<f4").tobytes(),
            num_kept=each.row.num_kept,
            is_finished=each.row.is_finished,
        )
        for key, each in zip(keys, continuations, strict=bool(keys and continuations))
        if each.segment is not None
    ]
