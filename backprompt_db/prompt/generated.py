"""What a model has generated after a prompt: its tokens, and a text to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from backprompt_db.prompt.model_counters import ModelCounters

if TYPE_CHECKING:
    import torch

    from backprompt_db.prompt.text import Text


@dataclass(frozen=True, eq=False, kw_only=True)
class Generated:
    """A continuation that a model generated, now or before: what `lm.generate` returns.

    `result + "more"` is a text that goes on after it, `str(result)` is its string.

    Attributes:
        prompt: the text that it continues.
        string: the continuation alone, without the end-of-sequence token that may have ended it.
        token_ids: int64 [T], the generated tokens, the end-of-sequence token included.
        token_logprobs: float32 [T], natural log-probability of each of them under the model itself, before temperature
            or any other change that sampling makes.
        is_stored: whether the database holds the continuation, so that running `text` computes nothing. A continuation
            is stored only if its string has the same tokens as were generated; half of a character, for instance, has
            others.
        fidelity: `exact`, or that of the lossy database whose keys and values the model may have gone on from.
        text: the prompt and, as one more piece of it, the continuation: a text to run, to score or to continue.
        num_cached_tokens: tokens of the prompt, and of the continuation, that were found.
        num_computed_tokens: tokens of the prompt that were computed.
        num_decoded_tokens: tokens of the continuation that were generated now.
        num_model_calls: forward passes of the whole call, which may have had other prompts.
        seconds: what the whole call took.
    """

    prompt: Text
    string: str
    ids: Sequence[int] = field(repr=False)
    """What `token_ids` is made of."""
    logprobs: npt.NDArray[np.float32] = field(repr=False)
    """What `token_logprobs` is made of."""
    is_stored: bool
    fidelity: str = "exact"
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_decoded_tokens: int = 0
    num_model_calls: int = field(default=0, repr=False)
    seconds: float = field(default=0.0, repr=False)

    @cached_property
    def token_ids(self) -> torch.Tensor:
        """int64 [T]: the generated tokens."""
        import torch

        return torch.tensor(self.ids, dtype=torch.int64)

    @cached_property
    def token_logprobs(self) -> torch.Tensor:
        """float32 [T]: log-probability of each generated token under the model itself."""
        import torch

        return torch.from_numpy(self.logprobs.copy())

    # Built only when somebody asks for it: a text after an eager prompt runs the model at once.
    @cached_property
    def text(self) -> Text:
        """The prompt and the continuation."""
        return self.prompt + self.string

    @property
    def counters(self) -> ModelCounters:
        """What was found, computed and generated, and about how long computing what was found would have taken."""
        return ModelCounters.of(self, saved_seconds=self.prompt.model.seconds_for(self.num_cached_tokens))

    def report(self) -> str:
        """Return in one line what was found, computed and generated, and the seconds that this took and saved."""
        return str(self.counters)

    def __add__(self, other: Text | str) -> Text:
        return self.text + other

    def __str__(self) -> str:
        return self.string

    def _repr_html_(self) -> str:
        """What a notebook shows: the prompt, and after it the continuation, bold."""
        from rich.text import Text as Shown

        from backprompt_db.views.console import html_text

        return html_text(Shown(str(self.prompt), "dim").append(self.string, "not dim bold"))
