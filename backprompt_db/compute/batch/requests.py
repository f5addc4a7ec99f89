"""Which parts texts ask to have stored, and which of them a batch must compute; plans and runs share this. No torch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TypeVar

from backprompt_db.compute import plan
from backprompt_db.compute.batch.run_plan import TooLong
from backprompt_db.compute.call import Addresses
from backprompt_db.compute.healing import Healer, merged_donors
from backprompt_db.compute.keeping import Keep, Keeper
from backprompt_db.compute.plan import Wanted
from backprompt_db.errors import PromptError
from backprompt_db.prompt.numbers import plain_int
from backprompt_db.prompt.representation import OWN_PARTS, Part
from backprompt_db.prompt.segments import Segment, ancestry
from backprompt_db.prompt.text import Text, as_texts

IsStored = Callable[[Segment, Part], bool]

_Item = TypeVar("_Item")

_SCORES = frozenset({Part.SCORES})
_NUM_CHARACTERS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What one text, or scoring completions after it, asks to have stored."""

    number: int
    """Its place among the texts, from 0."""
    text: Text
    segments: Sequence[Segment]
    """Segments of the text and of its completions, parents before children."""
    wanted: Wanted
    """Parts to be stored in the end."""
    keep: Wanted
    """Parts to store of each segment that is computed."""
    donors: Mapping[Segment, Segment]
    """Segments that others of these begin with."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What must be computed for a batch."""

    wanted: Wanted
    """The first missing part of each segment that lacks some: computing it stores all others that the segment lacks."""
    keep: Wanted
    donors: Mapping[Segment, Segment]


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """The requests of many texts: the parts of their segments that are to be stored, and scores of what follows them.

    Iterating raises `PromptError` for an empty text, and where nothing predicts the first token of a completion.
    """

    texts: Iterable[Text | str]
    completions: Sequence[Text] | None
    keep: Keep
    namespace: str
    own: Callable[[Text | str], Text]
    """Makes a string or a text one that belongs to the model."""
    healer: Healer
    keeper: Keeper
    addresses: Callable[[], Addresses]
    """Makes addresses under the model as it is."""

    @classmethod
    def of(
        cls,
        texts: Text | str | Iterable[Text | str],
        completions: Text | str | Iterable[Text | str] | None,
        *,
        keep: Keep,
        namespace: str,
        own: Callable[[Text | str], Text],
        healer: Healer,
        keeper: Keeper,
        addresses: Callable[[], Addresses],
    ) -> Requests:
        """Return the requests of a caller. Raises `PromptError` for arguments that cannot be used."""
        if isinstance(completions, str | Text):
            raise PromptError("completions is one text", hint="Give a list of completions.")
        return cls(
            texts=[texts] if isinstance(texts, str | Text) else texts,
            completions=None
            if completions is None
            else [own(each) if each else Text("") for each in as_texts(completions, what="completion")],
            keep=keep,
            namespace=namespace,
            own=own,
            healer=healer,
            keeper=keeper,
            addresses=addresses,
        )

    def __iter__(self) -> Iterator[Request]:
        for number, text in enumerate(as_texts(self.texts, what="prompt")):
            yield self._request(number, self.own(text))

    def __length_hint__(self) -> int:
        return operator.length_hint(self.texts)

    def _request(self, number: int, text: Text) -> Request:
        if self.completions is None:
            (healed,) = self.healer.heal([text], namespace=self.namespace)
            wanted = self.keeper.to_warm(healed.tips, self.keep)
            return Request(number, text, healed.segments, wanted, wanted, healed.donors)
        endings = self.healer.endings([text], self.completions, namespace=self.namespace)
        scored = dict.fromkeys([each for ending in endings for each in (*ending.segments, *ending.without)], _SCORES)
        segments = ancestry(scored)
        keep = self.keeper.of_endings(endings, self.keep, self.addresses())
        whole = {segment: keep.get(segment, frozenset(OWN_PARTS)) for segment in segments}
        return Request(number, text, segments, scored, whole, merged_donors(endings))


def batches(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Divide items into lists of `size`. Raises `PromptError` for a size below 1."""
    size = plain_int(size)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise PromptError(f"batch_size={size!r} is not a number of texts", hint="Give an int of 1 or more.")
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def lacking(batch: Iterable[Request], is_stored: IsStored) -> list[Request]:
    """Return the requests that ask for a part that is not stored."""
    is_stored = cache(is_stored)
    return [
        request
        for request in batch
        if not all(is_stored(segment, part) for segment, parts in request.wanted.items() for part in parts)
    ]


def work_of(batch: Sequence[Request], is_stored: IsStored) -> Work:
    """Return what must be computed for requests that lack parts."""
    wanted: dict[Segment, frozenset[Part]] = {}
    for segment, parts in plan.merged(request.wanted for request in batch).items():
        least = next((part for part in OWN_PARTS if part in parts and not is_stored(segment, part)), None)
        if least is not None:
            wanted[segment] = frozenset({least})
    donors = {segment: donor for request in batch for segment, donor in request.donors.items()}
    return Work(wanted, plan.merged(request.keep for request in batch), donors)


def too_long(
    request: Request, num_tokens: Mapping[Segment, int], bounds: plan.Bounds, *, is_deterministic: bool
) -> TooLong | None:
    """Return by how much a request is too long, None if it fits. `num_tokens` has the lengths of all its segments."""
    starts = plan.positions(request.segments, num_tokens)
    own = {segment: num_tokens[segment] for segment in request.segments}
    num_read = own if is_deterministic else plan.num_read(own, produced=request.keep)
    num_positions = max(start + num_read[segment] for segment, start in starts.items())
    if bounds.max_positions is not None and num_positions > bounds.max_positions:
        return TooLong(request.number, num_positions, bounds.max_positions, str(request.text)[:_NUM_CHARACTERS])
    if bounds.max_columns is None:
        return None
    # Without branches and gaps, each position is one column.
    is_plain = all(len(segment.parents) < 2 and segment.start is None for segment in request.segments)
    num_columns = num_positions if is_plain else max(_num_columns(segment, num_read) for segment in request.segments)
    if num_columns > bounds.max_columns:
        return TooLong(request.number, num_columns, bounds.max_columns, str(request.text)[:_NUM_CHARACTERS])
    return None


def _num_columns(segment: Segment, num_read: Mapping[Segment, int]) -> int:
    """Return how many tokens a segment sees, itself included."""
    return sum(num_read[other] for other in ancestry([segment]))
