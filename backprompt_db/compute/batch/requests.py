"""What texts ask to be stored, and what of it a batch must compute: the same for a plan and for the run. No torch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TypeVar

from backprompt_db.compute import plan
from backprompt_db.compute.answers import completion_segments
from backprompt_db.compute.batch.run_plan import TooLong
from backprompt_db.compute.plan import Wanted
from backprompt_db.errors import PromptError
from backprompt_db.prompt.representation import Part
from backprompt_db.prompt.segments import Segment, ancestry
from backprompt_db.prompt.text import Text

IsStored = Callable[[Segment, Part], bool]

_Each = TypeVar("_Each")

_SCORES = frozenset({Part.SCORES})
_NUM_CHARACTERS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What one text asks for."""

    number: int
    """Its place among the texts, from 0."""
    text: Text
    segments: Sequence[Segment]
    """Its own and those of its completions, parents before children."""
    wanted: Wanted
    """Parts that shall be stored in the end."""
    keep: Wanted
    """Parts to store of each segment that is computed."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What must be computed for a batch."""

    wanted: Wanted
    """Of each segment that lacks parts the least of them; when it is computed, all that it lacks are stored."""
    keep: Wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """What each of many texts asks for: `keep` of all its segments, or the scores of the completions after it.

    Iterating raises `PromptError` for an empty text, and where nothing predicts the first token of a completion.
    """

    texts: Iterable[Text | str]
    completions: Sequence[Text] | None
    keep: frozenset[Part]
    namespace: str
    own: Callable[[Text | str], Text]
    """Makes a text one of the model's."""

    @classmethod
    def of(
        cls,
        texts: Text | str | Iterable[Text | str],
        completions: Text | str | Iterable[Text | str] | None,
        *,
        keep: Iterable[str],
        namespace: str,
        own: Callable[[Text | str], Text],
    ) -> Requests:
        """Return what a caller asks for. Raises `PromptError` for what makes no sense."""
        if isinstance(completions, str | Text):
            raise PromptError("completions is one text", hint="Give a list of completions.")
        return cls(
            texts=[texts] if isinstance(texts, str | Text) else texts,
            completions=None if completions is None else [own(each) if each else Text("") for each in completions],
            keep=parts_named(keep),
            namespace=namespace,
            own=own,
        )

    def __iter__(self) -> Iterator[Request]:
        for number, text in enumerate(self.texts):
            yield self._request(number, self.own(text))

    def __length_hint__(self) -> int:
        return operator.length_hint(self.texts)

    def _request(self, number: int, text: Text) -> Request:
        segments = text.segments(self.namespace)
        if self.completions is None:
            wanted = dict.fromkeys(segments, self.keep)
            return Request(number, text, segments, wanted, wanted)
        endings = completion_segments([text], self.completions, namespace=self.namespace)
        scored = dict.fromkeys([segment for ending in endings for segment in ending], _SCORES)
        return Request(number, text, [*segments, *scored], scored, dict.fromkeys(segments, self.keep) | scored)


PARTS = tuple(part.name.lower() for part in Part)
"""What people call the three parts."""


def parts_named(names: Iterable[str]) -> frozenset[Part]:
    """Return the parts of these names. Raises `PromptError` for others, and for none."""
    given = [names] if isinstance(names, str) else list(names)
    if not given or not set(PARTS) >= set(given):
        raise PromptError(f"keep={names!r} are no parts", hint=f"Name some of {', '.join(PARTS)}.")
    return frozenset(Part[name.upper()] for name in given)


def batches(each: Iterable[_Each], size: int) -> Iterator[list[_Each]]:
    """Divide what comes into lists of so many. Raises `PromptError` for a size below 1."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise PromptError(f"batch_size={size!r} is not a number of texts", hint="Give an int of 1 or more.")
    remaining = iter(each)
    while batch := list(islice(remaining, size)):
        yield batch


def lacking(batch: Iterable[Request], is_stored: IsStored) -> list[Request]:
    """Return those of the requests of which something is not stored."""
    is_stored = cache(is_stored)
    return [
        request
        for request in batch
        if not all(is_stored(segment, part) for segment, parts in request.wanted.items() for part in parts)
    ]


def work_of(batch: Sequence[Request], is_stored: IsStored) -> Work:
    """Return what must be computed for requests that lack something."""
    wanted: dict[Segment, frozenset[Part]] = {}
    for segment, parts in _merged(request.wanted for request in batch).items():
        least = next((part for part in Part if part in parts and not is_stored(segment, part)), None)
        if least is not None:
            wanted[segment] = frozenset({least})
    return Work(wanted, _merged(request.keep for request in batch))


def _merged(each: Iterable[Wanted]) -> dict[Segment, frozenset[Part]]:
    merged: dict[Segment, frozenset[Part]] = {}
    for wanted in each:
        for segment, parts in wanted.items():
            merged[segment] = parts | merged.get(segment, frozenset())
    return merged


def too_long(
    request: Request, num_tokens: Mapping[Segment, int], bounds: plan.Bounds, *, is_deterministic: bool
) -> TooLong | None:
    """Return what is too long about an request, None where nothing is. `num_tokens` are those of all its segments."""
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
