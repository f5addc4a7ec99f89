"""Generating after stored prompts, and storing a continuation as one more segment.

It is stored if its string is tokenised exactly as it was generated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from backprompt_db.catalog.records import GenerationRecord
from backprompt_db.compute.call import Call
from backprompt_db.compute.healing import Heal, Healed, merged_donors
from backprompt_db.compute.inference.decoding import Begun, Decoding, Outcome, Prompt, Row
from backprompt_db.compute.inference.kv_cache import slice_row
from backprompt_db.errors import InvalidText
from backprompt_db.prompt.generated import Generated
from backprompt_db.prompt.representation import OWN_PARTS, Array, Arrays, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.prompt.text import Text

if TYPE_CHECKING:
    from backprompt_db.compute.engine import Engine
    from backprompt_db.compute.generate_arguments import GenerateArguments
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.compute.keeping import Keep
    from backprompt_db.compute.plan import Need
    from backprompt_db.compute.tokens import SegmentTokenizer
    from backprompt_db.prompt.ids import ModelIds

_ALL_PARTS, _SCORES = frozenset(OWN_PARTS), frozenset({Part.SCORES})
_KV, _KV_AND_LOGITS = frozenset({Part.KV}), frozenset({Part.KV, Part.LOGITS})


@dataclass(frozen=True, slots=True)
class Decoder:
    """Lets a model continue texts, whose representations are fetched or computed first."""

    engine: Engine
    source: ModelSource
    arguments: GenerateArguments
    heal: Heal
    keep: Keep

    def decode(
        self, texts: Sequence[Healed], known: Sequence[GenerationRecord | None]
    ) -> tuple[list[list[Generated]], list[Continuation]]:
        """Return the continuations of each text; and, one after the other, those that may be remembered.

        `known` has beginnings of continuations, from which the model goes on. Prompts are generated together if
        position ids and mask alone tell the model where a token is, else one by one. Raises `ContextLengthExceeded`
        and `UnsupportedModel` before anything is generated.
        """
        began = time.monotonic()
        ids, runner = self.source.ids, self.engine.prove()
        prompts = [self._prompt(text, record) for text, record in zip(texts, known, strict=True)]
        for prompt in prompts:
            prompt.require_possible(runner, self.arguments.max_new_tokens - prompt.num_begun)
        groups = self._groups(prompts)
        arguments = self._arguments_of(len(groups))
        call = self._fetched(prompts, ids=ids, donors=merged_donors(texts))
        num_calls = runner.num_calls
        of_prompts: dict[int, list[Continuation]] = {}
        for group, own in zip(groups, arguments, strict=True):
            written = self._continued([prompts[number] for number in group], own, call, ids=ids)
            step = self.arguments.num_sequences
            of_prompts |= {number: written[place * step :][:step] for place, number in enumerate(group)}
        continuations = [of_prompts[number] for number in range(len(prompts))]
        results = [[self._result(each, call, ids=ids) for each in some] for some in continuations]
        num_calls = call.num_model_calls + runner.num_calls - num_calls
        seconds = time.monotonic() - began
        is_repeatable = self.arguments.is_repeatable(runner.model) and self.source.ids == ids
        return (
            [[replace(each, num_model_calls=num_calls, seconds=seconds) for each in some] for some in results],
            [each for some in continuations for each in some] if is_repeatable else [],
        )

    def _prompt(self, text: Healed, record: GenerationRecord | None) -> Prompt:
        """Return a prompt, with the beginning of its continuation where there is one to go on from."""
        tokenizer = self.source.tokenizer
        if record is None or not self.arguments.goes_on(self.source.runner.model):
            return Prompt.of(text, tokenizer)
        (end,) = self.heal(text.text.continued(Text(record.string))).tips
        if not _is_continuation(end, text.tips[0], record.token_ids, tokenizer):
            return Prompt.of(text, tokenizer)
        logprobs = np.frombuffer(record.token_logprobs, dtype="<f4")
        return Prompt.of(text, tokenizer, Begun(end, record.token_ids, logprobs))

    def _fetched(self, prompts: Sequence[Prompt], *, ids: ModelIds, donors: Mapping[Segment, Segment]) -> Call:
        """Fetch or compute the keys and values of all segments of the prompts, and the logits after each prompt."""
        num_tokens = {
            segment: count
            for prompt in prompts
            for segment, count in zip(prompt.segments, prompt.num_tokens, strict=True)
        }
        wanted = dict.fromkeys(num_tokens, _KV) | dict.fromkeys([prompt.tip for prompt in prompts], _KV_AND_LOGITS)
        keep = {} if self.keep.parts is None else dict.fromkeys(wanted, self.keep.parts)
        call = self.engine.represent(wanted, keep=keep, donors=donors)
        kv = {segment: call.found[segment, Part.KV] for segment in wanted}
        fits = self.source.runner.fits
        malformed = [s for s in kv if kv[s]["keys"].shape[2] != num_tokens[s] or not fits(kv[s])]
        if malformed:
            self.engine.discard([(segment, Part.KV) for segment in malformed], ids=ids)
            call = self.engine.represent(wanted, keep=keep)
        return call

    def _groups(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the numbers of prompts that are generated together: those with equally many tokens to go."""
        runner = self.source.runner
        if not (runner.takes_packs and self.arguments.admits_padding(runner.model)):
            return [[number] for number in range(len(prompts))]
        groups: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            groups.setdefault(prompt.num_begun, []).append(number)
        return list(groups.values())

    def _arguments_of(self, num_groups: int) -> list[GenerateArguments]:
        """Return the arguments of each group: what one prompt leaves in a processor must not reach another one."""
        if num_groups == 1:
            return [self.arguments]
        shared = self.source.runner.model, self.source.tokenizer.tokenizer
        return [self.arguments.copied(shared=shared) for _ in range(num_groups)]

    def _continued(
        self, prompts: Sequence[Prompt], arguments: GenerateArguments, call: Call, *, ids: ModelIds
    ) -> list[Continuation]:
        """Let the model continue prompts of which equally much is to be generated, and store what it wrote."""
        runner = self.source.runner
        left = replace(arguments, max_new_tokens=arguments.max_new_tokens - prompts[0].num_begun)
        outcome = Decoding(runner, prompts, left).run(call.found, self.source.tokenizer.own)
        self.engine.count_decoded(sum(row.num_decoded for row in outcome.rows), seconds=outcome.seconds)
        continuations = [Continuation.of(row, self.source.tokenizer, self.heal) for row in outcome.rows]
        if self.arguments.store and self.source.ids == ids:
            _store(self.engine, outcome, continuations, call.found, ids=ids, keep=self.keep.parts or _ALL_PARTS)
        return continuations

    def _result(self, continuation: Continuation, call: Call, *, ids: ModelIds) -> Generated:
        """Return a continuation as it is given to the caller. A segment counts as computed for its first prompt."""
        row, end = continuation.row, continuation.segment
        lengths = dict(zip(row.prompt.segments, row.prompt.num_tokens, strict=True))
        num_computed = sum(count for segment, count in lengths.items() if segment in call.computed)
        call.computed.difference_update(lengths)
        return Generated(
            prompt=row.prompt.text,
            string=continuation.string,
            ids=row.token_ids,
            logprobs=row.token_logprobs,
            is_stored=end is not None and self.engine.is_stored(end, ids=ids, parts=_SCORES),
            fidelity=self.engine.fidelity,
            num_cached_tokens=sum(lengths.values()) - num_computed,
            num_computed_tokens=num_computed,
            num_decoded_tokens=row.num_decoded,
        )


@dataclass(frozen=True, slots=True)
class Continuation:
    """A generated sequence as text."""

    row: Row
    string: str
    segment: Segment | None
    """The segment that follows the prompt; None where the string has other tokens than were generated."""

    @classmethod
    def of(cls, row: Row, tokenizer: SegmentTokenizer, heal: Heal) -> Continuation:
        """Turn a row into text."""
        ids = row.token_ids[: row.num_kept]
        if not ids:  # nothing follows the prompt
            return cls(row, "", row.prompt.tip)
        string = tokenizer.decode(ids)
        if not string:
            return cls(row, "", None)
        (segment,) = heal(row.prompt.text.continued(Text(string))).tips
        return cls(row, string, segment if _is_continuation(segment, row.prompt.tip, ids, tokenizer) else None)


def _is_continuation(segment: Segment, tip: Segment, ids: Sequence[int], tokenizer: SegmentTokenizer) -> bool:
    """Whether a segment directly follows the end of a prompt, and has these tokens."""
    try:
        return segment.parents == (tip,) and tokenizer.encode([segment])[segment] == list(ids)
    except InvalidText:  # a string without tokens
        return False


def _store(
    engine: Engine,
    outcome: Outcome,
    continuations: Sequence[Continuation],
    found: Mapping[Need, Arrays],
    *,
    ids: ModelIds,
    keep: frozenset[Part],
) -> None:
    """Store the parts `keep` of the continuations that have a segment, unless they are stored."""
    numbers = {each.segment: number for number, each in enumerate(continuations) if each.segment is not None}
    missing = {
        segment: number for segment, number in numbers.items() if not engine.is_stored(segment, ids=ids, parts=keep)
    }
    if not missing or not engine.keeps:
        return
    if not outcome.is_in_cache or engine.is_deterministic:
        # Beams have lost some of their keys and values; and token by token, the last bits are not those of one pass.
        engine.represent(dict.fromkeys(missing, keep), keep=dict.fromkeys(missing, keep))
        return
    seconds = outcome.seconds / sum(each.row.num_decoded for each in continuations)
    for segment, number in missing.items():
        row = continuations[number].row
        dtype = found[row.prompt.tip, Part.LOGITS]["logits"].torch().dtype
        parts = {part: arrays for part, arrays in _parts(outcome, number, dtype).items() if part in keep}
        engine.store(segment, parts, ids=ids, num_tokens=row.num_kept, seconds=seconds * row.num_kept)


def _parts(outcome: Outcome, number: int, dtype: torch.dtype) -> dict[Part, Arrays]:
    """Return the parts of a row's continuation; its logits, which `generate` made float32, are turned into `dtype`."""
    row = outcome.rows[number]
    ids = np.array(row.token_ids[: row.num_kept], dtype=np.int32)
    num_begun = row.prompt.num_begun
    logits = outcome.logits_after(number, row.num_kept - num_begun).to(dtype)
    begin = outcome.decoding.longest - num_begun
    return {
        Part.SCORES: {
            "input_ids": Array.from_numpy(ids),
            "token_logprobs": Array.from_numpy(row.token_logprobs[: row.num_kept].copy()),
        },
        Part.LOGITS: {"logits": Array.from_torch(logits)},
        Part.KV: slice_row(outcome.cache, number, begin, begin + row.num_kept),
    }
