"""What a model has generated after a prompt: its tokens, and a text to go on from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from backprompt_db.prompt.text import Text


@dataclass(frozen=True, eq=False, kw_only=True)
class Generated:
    """A continuation that a model generated: what `lm.generate` returns.

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
    """

    prompt: Text
    string: str
    token_ids: torch.Tensor = field(repr=False)
    token_logprobs: torch.Tensor = field(repr=False)
    is_stored: bool
    fidelity: str = "exact"

    # Built only when somebody asks for it: a text after an eager prompt runs the model at once.
    @cached_property
    def text(self) -> Text:
        """The prompt and the continuation."""
        return self.prompt + self.string

    def __add__(self, other: Text | str) -> Text:
        return self.text + other

    def __str__(self) -> str:
        return self.string

    def _repr_html_(self) -> str:
        """What a notebook shows: the prompt, and after it the continuation, bold."""
        from rich.text import Text as Shown

        from backprompt_db.views.console import html_text

        return html_text(Shown(str(self.prompt), "dim").append(self.string, "not dim bold"))
