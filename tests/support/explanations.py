"""A prompt of three segments to be explained, and what is asked of its explanation."""

from __future__ import annotations

from collections.abc import Callable

import backprompt_db as bp
from backprompt_db.database.database import Database
from backprompt_db.prompt.explanation import Explanation, Miss, Place, Reason
from backprompt_db.prompt.ids import address
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key

Open = Callable[..., Database]
MakeLM = Callable[..., bp.LanguageModel]

CONTEXT = "Pick the endpoint for the request.\n"
REQUEST = "Request: who signed up?"
ENDING = "\nEndpoint:"
EVERYTHING = {Part.SCORES, Part.LOGITS, Part.KV}
HOSTILE = "<script>alert(1)</script>\x1b[31m[bold]\u202e&amp;"

EXPLANATION_FIELDS = [
    "model_name", "dtype", "weights_id", "tokenizer_id", "namespace", "segments", "seams", "is_healed",
    "num_cached_tokens", "num_missing_tokens", "nbytes", "saved_seconds", "needed_seconds",
]  # fmt: skip
SEGMENT_FIELDS = [
    "text", "parents", "start", "segment_id", "address", "places", "nbytes", "num_tokens", "seconds", "miss",
]  # fmt: skip
MISS_FIELDS = ["needed", "reason", "at", "detail", "seen_under", "difference"]


def prompt(lm: bp.LanguageModel, *strings: str) -> bp.Text:
    text = lm.text("")
    for string in strings or (CONTEXT, REQUEST, ENDING):
        text += string
    return text


def run(lm: bp.LanguageModel, *strings: str) -> bp.ModelRepr:
    """Run a prompt, and store all of it."""
    result = prompt(lm, *strings)()
    lm.db.flush()
    return result


def reasons(explanation: Explanation) -> list[Reason | None]:
    return [None if segment.miss is None else segment.miss.reason for segment in explanation.segments]


def last_miss(explanation: Explanation) -> Miss:
    miss = explanation.segments[-1].miss
    assert miss is not None
    return miss


def key_of(lm: bp.LanguageModel, text: bp.Text, part: Part) -> Key:
    """The key of a part of the last segment of a text."""
    return Key(address(text.tips()[0].id, lm.weights_id, lm.tokenizer_id), part)


def places(explanation: Explanation) -> set[Place]:
    return {place for segment in explanation.segments for place in segment.places.values()}
