"""Cutting strings into segments: chats where messages meet, long strings after about so many tokens.

The pieces have together exactly the tokens of the whole, so strings with a common beginning share its representation.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from backprompt_db.catalog.records import CutsRecord, are_cuts
from backprompt_db.compute.tokens import SegmentTokenizer
from backprompt_db.errors import PromptError
from backprompt_db.prompt.ids import utf8
from backprompt_db.prompt.numbers import plain_int
from backprompt_db.prompt.text import Text

if TYPE_CHECKING:
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.database.catalogs import ModelMetadata


logger = logging.getLogger(__name__)

Message = Mapping[str, Any]

_CUTS = b"backprompt-db/cuts/1\0"

# Raised by templates for messages that they were not written for.
_TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)

_REFUSED_ARGUMENTS = frozenset({
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
})  # fmt: skip

_warned: weakref.WeakSet[SegmentTokenizer] = weakref.WeakSet()


def chat_pieces(
    tokenizer: SegmentTokenizer,
    messages: Iterable[Message],
    *,
    add_generation_prompt: bool,
    template_arguments: Mapping[str, Any],
) -> list[str]:
    """Return what the chat template makes of `messages`, cut into pieces with exactly the tokens of the whole.

    Cuts are where a message ends, and around what an assistant wrote: `[generation prompt][content][end of message]`.
    A cut is left out where the template refuses the messages before it, or renders them alone in another way than
    within the whole. Renders the template once or twice per message.

    Raises `PromptError` where there is no message or no template, and where the template refuses the messages.
    """
    conversation = _conversation(messages)
    template = _Template(tokenizer.tokenizer, template_arguments)
    string = template.whole(conversation, add_generation_prompt=add_generation_prompt)
    utf8(string)  # names a lone surrogate, which tokenizers do not
    cuts = tokenizer.exact_cuts(string, _boundaries(template, conversation, string))
    pieces = [string[first:last] for first, last in pairwise([0, *cuts, len(string)])]
    _warn_of_start(tokenizer, pieces[0])
    return pieces


def split_pieces(string: str, num_tokens: int, *, source: ModelSource, model_metadata: ModelMetadata) -> list[str]:
    """Return a string in pieces of about `num_tokens` tokens, which have together exactly the tokens of the string.

    Loads the tokenizer only if the catalog does not remember the cuts. Raises `PromptError` for a `num_tokens` below 1.
    """
    num_tokens = plain_int(num_tokens)
    if not isinstance(num_tokens, int) or num_tokens < 1:
        raise PromptError(f"split={num_tokens!r} is not a number of tokens", hint="Give an int of 1 or more.")
    if not isinstance(string, str) or not string:
        Text(string)  # raises an error for anything but a string
        return [string]
    tokenizer_id = source.tokenizer_id
    key = hashlib.sha256(_CUTS + tokenizer_id + num_tokens.to_bytes(8, "big") + utf8(string)).digest()
    known = model_metadata.recall(lambda catalog: catalog.cuts(key))
    if known is None or not are_cuts(known.offsets, num_characters=len(string)):
        known = CutsRecord(key, tuple(source.tokenizer.cuts(string, num_tokens)))
        if source.tokenizer_id == tokenizer_id:  # else, once loaded, it is another one than was recorded
            model_metadata.save(known)
    return [string[first:last] for first, last in pairwise((0, *known.offsets, len(string)))]


def _conversation(messages: Iterable[Message]) -> list[Message]:
    """Return `messages` as a list. Raises `PromptError` for anything but one or more messages."""
    conversation = list(messages)
    if not conversation:
        raise PromptError("the chat has no messages", hint="Give at least one.")
    if not all(isinstance(message, Mapping) for message in conversation):
        raise PromptError(
            "the chat is not a list of messages", hint='Give a list of dicts such as {"role": "user", "content": "Hi"}.'
        )
    return conversation


@dataclass(frozen=True, slots=True)
class _Template:
    """A tokenizer's chat template with its arguments."""

    tokenizer: Any
    arguments: Mapping[str, Any]

    def whole(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Return the rendering of all messages. Raises `PromptError` where there is none."""
        if refused := sorted(_REFUSED_ARGUMENTS & self.arguments.keys()):
            raise PromptError(
                f"a chat takes no {refused[0]}=", hint="Leave it out: the tokens of a text are those of its strings."
            )
        try:
            return self._render(messages, add_generation_prompt=add_generation_prompt, **self.arguments)
        except _TEMPLATE_ERRORS as error:
            raise self._refusal(error) from error

    def length_in(self, whole: str, messages: Sequence[Message], *, add_generation_prompt: bool) -> int:
        """Return the length of the rendering of the first messages if `whole` begins with it, else 0."""
        # Only the last message of the whole is continued.
        arguments = {name: value for name, value in self.arguments.items() if name != "continue_final_message"}
        try:
            rendering = self._render(messages, add_generation_prompt=add_generation_prompt, **arguments)
        except _TEMPLATE_ERRORS:
            return 0
        return len(rendering) if whole.startswith(rendering) else 0

    def _render(self, messages: Sequence[Message], **arguments: Any) -> str:
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **arguments))

    def _refusal(self, error: Exception) -> PromptError:
        if getattr(self.tokenizer, "chat_template", None) is None and self.arguments.get("chat_template") is None:
            return PromptError(
                "the tokenizer has no chat template", hint="Pass chat_template=..., as the model was trained with."
            )
        return PromptError(
            f"the chat template refuses the messages: {str(error).rstrip('.')}",
            hint="Give the roles, keys and arguments that it was written for.",
        )


def _boundaries(template: _Template, messages: Sequence[Message], whole: str) -> list[int]:
    """Return the offsets in `whole` at which messages, and what an assistant wrote, begin and end."""
    found = {template.length_in(whole, messages, add_generation_prompt=False)}
    for index, message in enumerate(messages[1:], start=1):
        before = messages[:index]
        found.add(template.length_in(whole, before, add_generation_prompt=False))
        if message.get("role") == "assistant":
            prompt = template.length_in(whole, before, add_generation_prompt=True)
            found |= {prompt, _end_of_content(whole, prompt, message.get("content"))}
    return sorted(found - {0, len(whole)})


def _end_of_content(whole: str, prompt: int, content: object) -> int:
    """Return the offset where `content` ends if it follows directly on the generation prompt, else `prompt`.

    `prompt` is the offset where the generation prompt ends. Many templates strip the content, and some put a space
    before it, which a model then generates.
    """
    if not prompt or not isinstance(content, str):
        return prompt
    if whole.startswith(content, prompt):
        return prompt + len(content)
    begin = len(whole) - len(whole[prompt:].lstrip())
    return begin + len(content.strip()) if whole.startswith(content.strip(), begin) else prompt


def _warn_of_start(tokenizer: SegmentTokenizer, beginning: str) -> None:
    """Log, once for each tokenizer, that a chat has other tokens than transformers gives it."""
    if tokenizer not in _warned and not tokenizer.writes_start(beginning):
        _warned.add(tokenizer)
        logger.warning("the chat template writes no start tokens: they are put before its text, as before any prompt")
