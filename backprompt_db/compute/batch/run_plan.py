"""What `lm.plan` and `lm.warm` return: what a large run would need, and what it has done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backprompt_db.views.console import grid, html_text, literal, plain_text
from backprompt_db.views.formatting import duration, plural, shortened, size

if TYPE_CHECKING:
    from rich.console import Group

    from backprompt_db.prompt.ids import TokenizerId, WeightsId
    from backprompt_db.prompt.representation import Part


MAX_LISTED = 1_000
"""Up to so many texts that are too long are listed; further ones are only counted."""


@dataclass(frozen=True, slots=True)
class TooLong:
    """A text that the model cannot run."""

    number: int
    """Its number among the texts, from 0."""
    num_positions: int
    """Positions that it needs, with the longest completion; or tokens that it needs in one pass."""
    max_positions: int
    """How many of them the model has."""
    beginning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryForecast:
    """Bytes of memory at the peak of a run, beside those of Python and its libraries. They are estimates."""

    weights_nbytes: int
    """All parameters, 0 where nothing is computed; only this number is exact."""
    prefixes_nbytes: int
    """Keys and values of the longest pass, and those that are kept in memory for later passes."""
    activations_nbytes: int
    """Hidden states, mask and a block of logits of the largest pass."""
    queue_nbytes: int
    """The most that waits to be written at a time."""
    total_nbytes: int


NO_MEMORY = MemoryForecast(weights_nbytes=0, prefixes_nbytes=0, activations_nbytes=0, queue_nbytes=0, total_nbytes=0)
"""That of a run that finds everything, which loads no model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomForecast:
    """Whether a database has room for what a run writes. Sizes are approximate bytes of pages in use."""

    live_nbytes: int
    """In use now."""
    written_nbytes: int
    """How much more the run takes."""
    max_live_nbytes: int | None
    """How much may be in use before something is evicted; None without a limit."""
    holds: bool
    """Whether everything that is written would still be stored at the end; if not, the rest evicts some of it."""
    num_evicted_parts: int
    """Parts that are stored now and would be evicted, those that are worth least first."""
    evicted_nbytes: int
    evicted_seconds: float
    """How long computing them took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What running texts would find and compute. Printed, it is a table.

    Texts that are too long are counted in `num_texts` and otherwise skipped, as `lm.warm` does.
    """

    model_name: str
    dtype: str
    weights_id: WeightsId
    tokenizer_id: TokenizerId
    namespace: str
    num_texts: int
    num_stored_texts: int
    """Texts that need no computation."""
    num_completions: int | None
    """Completions after each text; None if texts are run and nothing is scored."""
    num_segments: int
    """Distinct segments."""
    num_missing_segments: int
    """Segments that would be computed."""
    num_cached_tokens: int
    """Tokens of distinct segments that need no computation."""
    num_missing_tokens: int
    """Tokens to compute."""
    num_passes: int
    """Calls of the model. A model that never ran is assumed to take several segments in a pass; a few models cannot."""
    seconds: float | None
    """About how long these passes take; None if no passes of the model are recorded."""
    nbytes: Mapping[Part, int]
    """Bytes of the arrays to be written, by part."""
    overhead_nbytes: int
    """About how many more bytes are written with them: texts, names and digests."""
    memory: MemoryForecast
    room: RoomForecast | None
    """None for a database that is opened read-only, or that is in memory."""
    num_too_long: int
    too_long: tuple[TooLong, ...]
    """The first thousand of them."""

    def __rich__(self) -> Group:
        """What rich prints: the table, and warnings."""
        return _view(self)

    def __str__(self) -> str:
        return plain_text(self)

    def __repr__(self) -> str:
        return (
            f"<RunPlan of {plural(self.num_texts, 'text')}: {self.num_missing_tokens:,} tokens to compute,"
            f" {self.num_cached_tokens:,} cached, by {self.model_name} ({self.weights_id.hex()[:_NUM_ID_DIGITS]})>"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return html_text(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """What `lm.warm` did. All that it computed is stored."""

    num_texts: int
    num_stored_texts: int
    """Texts that were stored before the run."""
    num_computed_tokens: int
    num_passes: int
    """Calls of the model."""
    seconds: float
    num_too_long: int
    too_long: tuple[TooLong, ...] = field(repr=False)
    """The first thousand of them."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens computed per second, over the whole run."""
        return self.num_computed_tokens / self.seconds if self.seconds else 0.0


_NUM_ID_DIGITS = 8
_NUM_TEXT_CHARACTERS = 60
_NUM_TOO_LONG = 5


def _view(plan: RunPlan) -> Group:
    from rich.console import Group

    warnings = (literal(line, "yellow") for line in _warnings(plan))
    return Group(grid(dict(_rows(plan)), name_style="bold"), *warnings)


def _rows(plan: RunPlan) -> Iterator[tuple[str, str]]:
    namespace = f", namespace {plan.namespace}" if plan.namespace else ""
    digits = plan.weights_id.hex()[:_NUM_ID_DIGITS]
    yield "model", f"{plan.model_name} ({plan.dtype}, {digits}){namespace}"
    completions = "" if plan.num_completions is None else f" x {plan.num_completions:,} completions"
    yield "texts", f"{plan.num_texts:,}{completions}, {plan.num_stored_texts:,} stored already"
    yield "segments", f"{plan.num_segments:,} distinct, {plan.num_missing_segments:,} to compute"
    yield "tokens", f"{plan.num_missing_tokens:,} to compute, {plan.num_cached_tokens:,} cached"
    yield "passes", f"{plan.num_passes:,}"
    yield "time", "unknown: nothing is recorded of this model" if plan.seconds is None else _about(plan.seconds)
    parts = ", ".join(f"{part.name.lower()} {size(nbytes)}" for part, nbytes in plan.nbytes.items())
    yield "to be written", f"{size(sum(plan.nbytes.values()))} ({parts}), and about {size(plan.overhead_nbytes)} beside"
    yield "database", "nothing is kept on disk" if plan.room is None else _room(plan.room)
    yield "memory", _memory(plan.memory)


def _about(seconds: float) -> str:
    return f"about {duration(seconds)} in the model"


def _room(room: RoomForecast) -> str:
    limit = "no limit" if room.max_live_nbytes is None else f"{size(room.max_live_nbytes)} at most"
    return f"{size(room.live_nbytes)} in use, about {size(room.written_nbytes)} more needed, {limit}"


def _memory(memory: MemoryForecast) -> str:
    if memory == NO_MEMORY:
        return "none for the model, which is not loaded"
    return (
        f"about {size(memory.total_nbytes)} beside Python and its libraries: weights {size(memory.weights_nbytes)},"
        f" keys and values {size(memory.prefixes_nbytes)}, a pass {size(memory.activations_nbytes)},"
        f" writing {size(memory.queue_nbytes)}"
    )


def _warnings(plan: RunPlan) -> Iterator[str]:
    """Yield warnings about the limit and about long texts, a line each."""
    room = plan.room
    if room is not None and not room.holds:
        yield "The limit does not hold all that would be written: what was computed first would go before the end."
        yield "Raise it with `backprompt-db config --max-size SIZE`, or run less at a time."
    elif room is not None and room.num_evicted_parts:
        yield (
            f"To make room, {plural(room.num_evicted_parts, 'part')} would be evicted: {size(room.evicted_nbytes)},"
            f" which took {duration(room.evicted_seconds)} to compute."
        )
    if plan.num_too_long:
        yield f"{plan.num_too_long:,} texts are too long for the model, and are left out:"
    for each in plan.too_long[:_NUM_TOO_LONG]:
        beginning = shortened(each.beginning, num_characters=_NUM_TEXT_CHARACTERS)
        yield f"  number {each.number:,} needs {each.num_positions:,} of {each.max_positions:,} positions: {beginning}"
    if plan.num_too_long > _NUM_TOO_LONG:
        yield f"  ... and {plan.num_too_long - _NUM_TOO_LONG:,} more"
