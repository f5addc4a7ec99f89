"""What a database holds of a text."""

from __future__ import annotations

import backprompt_db as bp
from backprompt_db.prompt.ids import address
from backprompt_db.prompt.representation import OWN_PARTS, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.prompt.text import Text
from backprompt_db.store.contract import Key


def key_of(lm: bp.LanguageModel, segment: Segment, part: Part) -> Key:
    """Return the key of a part under the model as it is."""
    return Key(address(segment.id, lm.weights_id, lm.tokenizer_id), part)


def parts_of(lm: bp.LanguageModel, text: Text) -> list[set[Part]]:
    """Return which parts are stored of each piece of a text."""
    lm.db.flush()
    return [{part for part in OWN_PARTS if lm.db.has(key_of(lm, segment, part))} for segment in text.segments()]
