"""Generating after stored prompts, and storing a continuation as one more segment.

It is stored if its string is tokenised exactly as it was generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from backprompt_db.compute.healing import Healed, merged_donors
from backprompt_db.compute.inference.decoding import Decoding, Outcome, Prompt, Row
from backprompt_db.compute.inference.kv_cache import slice_row
from backprompt_db.errors import InvalidText, PromptError
from backprompt_db.prompt.generated import Generated
from backprompt_db.prompt.representation import Array, Arrays, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.prompt.text import Text

if TYPE_CHECKING:
    from backprompt_db.compute.engine import Engine
    from backprompt_db.compute.inference.decoding import GenerateArguments
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.compute.inference.runner import ModelRunner
    from backprompt_db.compute.keeping import Keep
    from backprompt_db.compute.plan import Need
    from backprompt_db.compute.tokens import SegmentTokenizer
    from backprompt_db.prompt.ids import ModelIds

Heal = Callable[[Text], Healed]
"""Finds the segments in which a text is run."""

_ALL_PARTS = frozenset(Part)
_SCORES = frozenset({Part.SCORES})
_KV, _KV_AND_LOGITS = frozenset({Part.KV}), frozenset({Part.KV, Part.LOGITS})


def generate(
    engine: Engine,
    source: ModelSource,
    texts: Sequence[Healed],
    arguments: GenerateArguments,
    *,
    heal: Heal,
    keep: Keep,
) -> list[list[Generated]]:
    """Return `arguments.num_sequences` continuations of each text, whose representations are fetched or computed first.

    Prompts are generated together if position ids and mask alone tell the model where a token is, else one by one.
    Raises `PromptError`, `ContextLengthExceeded` and `UnsupportedModel` before anything is generated.
    """
    if arguments.streamer is not None and len(texts) > 1:
        raise PromptError("a streamer takes one prompt", hint="Generate after the prompts one by one.")
    ids, runner = source.ids, engine.prove()
    prompts = [Prompt.of(text, source.tokenizer) for text in texts]
    for prompt in prompts:
        prompt.require_possible(runner, arguments.max_new_tokens)
    found = _fetched(engine, runner, prompts, ids=ids, donors=merged_donors(texts), keep=keep)
    together = runner.takes_packs and arguments.admits_padding(runner.model)
    results: list[Generated] = []
    for group in [prompts] if together and prompts else [[prompt] for prompt in prompts]:
        outcome = Decoding(runner, group, arguments).run(found, source.tokenizer.tokenizer)
        continuations = [_Continuation.of(row, source.tokenizer, heal) for row in outcome.rows]
        if arguments.store and source.ids == ids:
            _store(engine, outcome, continuations, found, ids=ids, keep=keep.parts or _ALL_PARTS)
        results += [
            each.result(
                fidelity=engine.fidelity,
                is_stored=each.segment is not None and engine.is_stored(each.segment, ids=ids, parts=_SCORES),
            )
            for each in continuations
        ]
    step = arguments.num_sequences
    return [results[begin : begin + step] for begin in range(0, len(results), step)]


def _fetched(
    engine: Engine,
    runner: ModelRunner,
    prompts: Sequence[Prompt],
    *,
    ids: ModelIds,
    donors: Mapping[Segment, Segment],
    keep: Keep,
) -> Mapping[Need, Arrays]:
    """Fetch or compute the keys and values of all segments of the prompts, and the logits after each prompt."""
    num_tokens = {
        segment: count for prompt in prompts for segment, count in zip(prompt.segments, prompt.num_tokens, strict=True)
    }
    wanted = dict.fromkeys(num_tokens, _KV) | dict.fromkeys([prompt.tip for prompt in prompts], _KV_AND_LOGITS)
    kept = {} if keep.parts is None else dict.fromkeys(wanted, keep.parts)
    found = engine.represent(wanted, keep=kept, donors=donors).found
    kv = {segment: found[segment, Part.KV] for segment in wanted}
    malformed = [s for s in kv if kv[s]["keys"].shape[2] != num_tokens[s] or not runner.fits(kv[s])]
    if malformed:
        engine.discard([(segment, Part.KV) for segment in malformed], ids=ids)
        found = engine.represent(wanted, keep=kept).found
    return found


@dataclass(frozen=True, slots=True)
class _Continuation:
    """A generated sequence as text."""

    row: Row
    string: str
    segment: Segment | None
    """The segment that follows the prompt; None where the string has other tokens than were generated."""

    @classmethod
    def of(cls, row: Row, tokenizer: SegmentTokenizer, heal: Heal) -> _Continuation:
        ids = row.token_ids[: row.num_kept]
        if not ids:  # nothing follows the prompt
            return cls(row, "", row.prompt.tip)
        string = tokenizer.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not string:
            return cls(row, "", None)
        (segment,) = heal(row.prompt.text.continued(Text(string))).tips
        try:
            is_same = segment.parents == (row.prompt.tip,) and tokenizer.encode([segment])[segment] == ids
        except InvalidText:  # a string without tokens
            is_same = False
        return cls(row, string, segment if is_same else None)

    def result(self, *, fidelity: str, is_stored: bool) -> Generated:
        return Generated(
            prompt=self.row.prompt.text,
            string=self.string,
            token_ids=torch.tensor(self.row.token_ids, dtype=torch.int64),
            token_logprobs=torch.from_numpy(self.row.token_logprobs),
            is_stored=is_stored,
            fidelity=fidelity,
        )


def _store(
    engine: Engine,
    outcome: Outcome,
    continuations: Sequence[_Continuation],
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
    seconds = outcome.seconds / sum(len(each.row.token_ids) for each in continuations)
    for segment, number in missing.items():
        dtype = found[continuations[number].row.prompt.tip, Part.LOGITS]["logits"].torch().dtype
        parts = {part: arrays for part, arrays in _parts(outcome, number, dtype).items() if part in keep}
        num_tokens = continuations[number].row.num_kept
        engine.store(segment, parts, ids=ids, num_tokens=num_tokens, seconds=seconds * num_tokens)


def _parts(outcome: Outcome, number: int, dtype: torch.dtype) -> dict[Part, Arrays]:
    """Return the parts of a row's continuation; its logits, which `generate` made float32, are turned into `dtype`."""
    row = outcome.rows[number]
    ids = np.array(row.token_ids[: row.num_kept], dtype=np.int32)
    logits = outcome.logits_after(number, row.num_kept).to(dtype)
    begin = outcome.decoding.longest
    return {
        Part.SCORES: {
            "input_ids": Array.from_numpy(ids),
            "token_logprobs": Array.from_numpy(row.token_logprobs[: row.num_kept].copy()),
        },
        Part.LOGITS: {"logits": Array.from_torch(logits)},
        Part.KV: slice_row(outcome.cache, number, begin, begin + row.num_kept),
    }
