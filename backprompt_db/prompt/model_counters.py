"""What a language model did, in numbers: what was asked of it, found and computed, and what that took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backprompt_db.views.formatting import duration, plural


@dataclass(frozen=True, slots=True)
class ModelCounters:
    """What one call, or a `LanguageModel` since it was made, has found and computed. Printed, it is one line."""

    num_model_calls: int
    """Forward passes; each step of a generation is one, a self-check is not counted."""
    num_computed_tokens: int
    """Tokens of prompts and completions that were computed."""
    num_cached_tokens: int
    """Tokens of prompts and completions that needed no computation, those before them included."""
    num_decoded_tokens: int = 0
    """Tokens that were generated, without those that were found."""
    seconds: float = 0.0
    """What all of it took; waiting for models to load is part of it."""
    saved_seconds: float | None = None
    """About what computing the cached tokens would have taken, at the usual pace of the model; None if unknown."""

    @classmethod
    def of(cls, result: Any, *, saved_seconds: float | None) -> ModelCounters:
        """Return the counts that a result has, under the same names."""
        names = ("num_model_calls", "num_computed_tokens", "num_cached_tokens", "num_decoded_tokens", "seconds")
        return cls(**{name: getattr(result, name, 0) for name in names}, saved_seconds=saved_seconds)

    @property
    def num_asked_tokens(self) -> int:
        """Tokens of prompts and completions that were asked for, found or computed."""
        return self.num_cached_tokens + self.num_computed_tokens

    def __str__(self) -> str:
        did = [f"{self.num_cached_tokens:,} found", f"{self.num_computed_tokens:,} computed"]
        if self.num_decoded_tokens:
            did.append(f"{self.num_decoded_tokens:,} decoded")
        saved = f"; {duration(self.saved_seconds)} saved" if self.saved_seconds else ""
        return f"{plural(self.num_asked_tokens, 'token')}: {', '.join(did)} in {duration(self.seconds)}{saved}"
