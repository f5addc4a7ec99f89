"""What a large run would take, before it, and what came of it: what `lm.plan` and `lm.warm` return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

    from backprompt_db.keys import TokenizerId, WeightsId
    from backprompt_db.representation import Part

MAX_LISTED = 1_000
"""Texts that are too long are listed up to this number, and counted beyond it."""


@dataclass(frozen=True, slots=True)
class TooLong:
    """A text that the model cannot run."""

    number: int
    """Its place among the texts, from 0."""
    num_positions: int
    """Positions that it needs, with the longest of the completions; or tokens that it needs in one pass."""
    max_positions: int
    """As many as the model has."""
    beginning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryForecast:
    """Bytes of memory at the peak of a run, beside what Python and its libraries take. All of it is estimated."""

    weights_nbytes: int
    """Of all parameters; this alone is exact."""
    prefixes_nbytes: int
    """Keys and values of the longest pass, and those that are kept in memory for passes to come."""
    activations_nbytes: int
    """Of the largest pass: hidden states, its mask, and a block of logits."""
    queue_nbytes: int
    """What waits to be written, at most."""
    total_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomForecast:
    """Whether a database would hold what a run writes. Sizes are bytes of pages in use, about."""

    live_nbytes: int
    """In use now."""
    written_nbytes: int
    """More that the run takes."""
    max_live_nbytes: int | None
    """What may be in use before something must go; None without a limit."""
    holds: bool
    """Whether everything that is written would be there at the end; if not, some of it is evicted by the rest."""
    num_evicted_parts: int
    """Parts that are there now and would go, what is worth least first."""
    evicted_nbytes: int
    evicted_seconds: float
    """What computing them took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What running texts would find and compute. Printed, it is a table.

    Texts that are too long are counted in `num_texts` and otherwise left out, as `lm.warm` does.
    """

    model_name: str
    dtype: str
    weights_id: WeightsId
    tokenizer_id: TokenizerId
    namespace: str
    num_texts: int
    num_stored_texts: int
    """Texts of which nothing must be computed."""
    num_completions: int | None
    """After each text; None where texts are run and nothing is scored."""
    num_segments: int
    """Distinct ones."""
    num_missing_segments: int
    """Those that would be computed."""
    num_cached_tokens: int
    """Of distinct segments of which nothing must be computed."""
    num_missing_tokens: int
    """To compute."""
    num_passes: int
    """Calls of the model. One that never ran is taken for one whose passes hold several segments; a few cannot."""
    seconds: float | None
    """In these passes, about; None where nothing is recorded of the model to judge by."""
    nbytes: Mapping[Part, int]
    """Bytes of the arrays to be written, by part."""
    overhead_nbytes: int
    """What is written beside them, about: texts, names and digests."""
    memory: MemoryForecast
    room: RoomForecast | None
    """None for a database that is only read, or that is in memory."""
    num_too_long: int
    too_long: tuple[TooLong, ...]
    """The first thousand of them."""

    def __rich__(self) -> Group:
        """What rich prints: the table, and what is to be said of it."""
        from backprompt_db.run_plan_views import terminal_view

        return terminal_view(self)

    def __str__(self) -> str:
        from backprompt_db.run_plan_views import plain_view

        return plain_view(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from backprompt_db.run_plan_views import html_view

        return html_view(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """What `lm.warm` did. All that it computed is stored."""

    num_texts: int
    num_stored_texts: int
    """Texts that were stored before."""
    num_computed_tokens: int
    num_passes: int
    """Calls of the model."""
    seconds: float
    num_too_long: int
    too_long: tuple[TooLong, ...]
    """The first thousand of them."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens that were computed in a second, over all."""
        return self.num_computed_tokens / self.seconds if self.seconds else 0.0
