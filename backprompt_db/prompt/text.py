"""What a prompt is: an immutable expression of strings, concatenations and parallel branches.

Building a text computes nothing. A text *means* the graph of its segments: each leaf string in its place, linked to the
segments that it directly follows. That graph alone decides who attends to whom and at which positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from backprompt_db.errors import BackpromptError, InvalidText, PromptError
from backprompt_db.prompt.ids import ModelIds, SegmentId, TokenizerId, segment_id
from backprompt_db.prompt.model_counters import ModelCounters
from backprompt_db.prompt.numbers import plain_int
from backprompt_db.prompt.segments import Seam, SeamRule, Segment, ancestry
from backprompt_db.views.formatting import plural, shortened

if TYPE_CHECKING:
    import torch

    from backprompt_db.prompt.explanation import Explanation
    from backprompt_db.prompt.representation import Array, Arrays
    from backprompt_db.views.picture import Picture
    from backprompt_db.views.scene import Vocabulary


class Runner(Protocol):
    """What a text needs from the language model that it belongs to."""

    @property
    def namespace(self) -> str:
        """The namespace that the runner's texts begin in; `""` is the default one."""

    def run(self, text: Text) -> ModelRepr:
        """Return the representation of `text`, computing what is missing."""

    def seams(self, text: Text) -> list[Seam]:
        """Return the seams of `text` that change tokens."""

    def explain(self, text: Text) -> Explanation:
        """Return what running `text` would find, and what it would compute and why."""

    def vocabulary(self, tokenizer_id: TokenizerId) -> Vocabulary:
        """Return the strings of the tokens of the tokenizer that has this id."""

    def past_key_values(self, text: Text, *, ids: ModelIds | None = None) -> Any:
        """Return a transformers `Cache` of the keys and values of `text`, under the model that has these ids."""

    def logits_after(self, result: ModelRepr) -> Array:
        """Return the logits after the text of a result: those that it has, else stored or computed ones."""

    def seconds_for(self, num_tokens: int) -> float | None:
        """Return about how long computing so many tokens takes once the model is warm; None if nothing tells."""


class _Runners:
    """How `Text(string, (model, tokenizer))` finds its runner; the package registers it when it is imported."""

    from_pair: Callable[[Any, Any], Runner]


def register_pair_runner(from_pair: Callable[[Any, Any], Runner]) -> None:
    """Register the function that makes a `Runner` of a `(model, tokenizer)` pair: only a room above knows how."""
    _Runners.from_pair = staticmethod(from_pair)


@dataclass(frozen=True, slots=True)
class _Leaf:
    string: str
    start: int | None


@dataclass(frozen=True, slots=True, eq=False)
class _Concatenation:
    left: Text
    right: Text


@dataclass(frozen=True, slots=True, eq=False)
class _Branches:
    branches: tuple[Text, ...]


_Expression = _Leaf | _Concatenation | _Branches


class _Mark(Enum):
    """Where parallel branches begin, alternate and end in a flattened text."""

    FORK = auto()
    NEXT = auto()
    JOIN = auto()


class Text:
    r"""A piece of prompt, or a whole prompt: a string, a concatenation, or parallel branches of texts.

    `model` is the `LanguageModel` that runs it, or a `(model, tokenizer)` pair, which uses the default database; a text
    without one takes it from what it is concatenated with. `start` is the position id of the first token, if it does
    not follow from what precedes. An `eager` text, and every text concatenated from it, is computed as soon as
    it is built.

    A model reads a text without branches as its joined string, whatever its pieces. `seams` says otherwise: `"keep"`
    runs the pieces as they are, each tokenised alone, and `"error"` refuses a text in which that makes a difference.
    The pieces of one text share what is said of one of them.

    `text()` returns its `ModelRepr`; `text.model_repr` holds the last one, None before the first.

    Raises `InvalidText` for anything but a string without lone surrogates, `PromptError` for a negative start, and for
    pieces that contradict each other.

    >>> prompt = Text("Question: 2 + 2\n") + "Answer:"
    >>> [segment.string for segment in prompt.segments()]
    ['Question: 2 + 2\n', 'Answer:']
    """

    __slots__ = ("_eager", "_expression", "_model", "_seam_rule", "_tips", "model_repr")

    model_repr: ModelRepr | None

    def __init__(
        self,
        string: str,
        model: Runner | tuple[Any, Any] | None = None,
        *,
        start: int | None = None,
        eager: bool = False,
        seams: str | None = None,
    ) -> None:
        if not isinstance(string, str):
            raise InvalidText(
                f"a text is made of str, not {type(string).__name__}",
                hint="Convert it with str(), or leave it out if it is missing.",
            )
        start = plain_int(start)
        segment_id(string, start=start)  # an invalid one raises here, and not only at the first run
        runner = _Runners.from_pair(*model) if isinstance(model, tuple) else model
        if runner is not None and not hasattr(runner, "run"):
            raise PromptError(
                f"a {type(runner).__name__} alone cannot run a text",
                hint="Give (model, tokenizer), or use lm.text(...).",
            )
        leaf = _Leaf(string, start) if string else None
        self._build(leaf, model=runner, eager=eager, seam_rule=None if seams is None else _seam_rule(seams))

    def _build(
        self, expression: _Expression | None, *, model: Runner | None, eager: bool, seam_rule: SeamRule | None
    ) -> None:
        self._expression = expression
        self._model = model
        self._eager = eager
        self._seam_rule = seam_rule
        self._tips: tuple[str, tuple[Segment, ...]] | None = None
        self.model_repr = None
        if eager and model is not None and expression is not None:
            self()

    @classmethod
    def _of(cls, expression: _Expression | None, parts: Sequence[Text], *, eager: bool | None = None) -> Text:
        text = cls.__new__(cls)
        is_eager = any(part._eager for part in parts) if eager is None else eager
        text._build(expression, model=_common_model(parts), eager=is_eager, seam_rule=_common_rule(parts))
        return text

    def __add__(self, other: Text | str) -> Text:
        if not isinstance(other, str | Text):
            return NotImplemented
        return self._followed_by(as_text(other))

    def _followed_by(self, other: Text, *, eager: bool | None = None) -> Text:
        parts = (self, other)
        pieces = [part for part in parts if part]
        expression = _Concatenation(*parts) if len(pieces) > 1 else pieces[0]._expression if pieces else None
        return Text._of(expression, parts, eager=eager)

    def continued(self, other: Text) -> Text:
        """Return the concatenation, which is not computed when it is built, not even after an eager text."""
        return self._followed_by(other, eager=False)

    def __radd__(self, other: str) -> Text:
        if not isinstance(other, str):
            return NotImplemented
        return as_text(other) + self

    def __call__(self) -> ModelRepr:
        """Return this text's representation, computing only what no process has computed before."""
        self.model_repr = self.model.run(self)
        return self.model_repr

    @property
    def model(self) -> Runner:
        """The language model that this text runs on; `PromptError` where it has none."""
        if self._model is None:
            raise PromptError(
                "this text belongs to no model", hint="Build it with lm.text(...), or run it as lm([text])."
            )
        return self._model

    def on(self, model: Runner) -> Text:
        """Return this text as one that runs on `model`; `PromptError` where it belongs to another."""
        if self._model is model:
            return self
        _common_model((self, Text("", model)))
        text = Text.__new__(Text)
        # Not eager: a completion must not be computed as if it were a prompt.
        text._build(self._expression, model=model, eager=False, seam_rule=self._seam_rule)
        return text

    def tips(self, namespace: str | None = None) -> tuple[Segment, ...]:
        """Return the segments that the text ends with: one, or several after parallel branches.

        `namespace` is that of the text's model unless given.
        """
        if namespace is None:
            namespace = self._model.namespace if self._model else ""
        spine, node = [], self
        while (left := node._known_left(namespace)) is not None:
            spine.append(node)
            node = left
        tips = node.place((), namespace)
        for node in reversed(spine):
            assert isinstance(node._expression, _Concatenation)  # noqa: S101 - only these have a left
            tips = node._expression.right.place(tips, namespace)
            node._tips = (namespace, tips)
        return tips

    def segments(self, namespace: str | None = None) -> list[Segment]:
        """Return the segments of the text, each once, parents before children, in the order written."""
        return ancestry(self.tips(namespace))

    @property
    def seam_rule(self) -> SeamRule:
        """What is done where the pieces have other tokens than the joined string."""
        return self._seam_rule or SeamRule.HEAL

    def chain(self, namespace: str) -> list[Segment]:
        """Return the segments as written if their joined string may be run instead; else nothing.

        It may not with branches, with explicit starts, and where the pieces are to be kept.
        """
        if self.seam_rule is SeamRule.KEEP:
            return []
        segments = self.segments(namespace)
        ends = [(), *((segment,) for segment in segments)]
        is_chain = all(each.parents == end and each.start is None for each, end in zip(segments, ends, strict=False))
        return segments if is_chain else []

    def seams(self) -> list[Seam]:
        """Return the seams at which two neighbouring pieces tokenise differently apart than joined.

        Where the text is run as its joined string, a seam says what moved. Loads the tokenizer, not the model.
        """
        return self.model.seams(self)

    def explain(self) -> Explanation:
        """Return where each segment would be found, or why it must be computed, as a table when it is printed.

        It has tokens, bytes and seconds. Nothing is computed, written or counted. Loads the tokenizer, not the model.
        """
        return self.model.explain(self)

    def picture(self, *, after: ModelRepr | None = None) -> Picture:
        """Return a picture of the prompt graph: what is stored, what was computed just now, and what is missing.

        "Just now" is the run that returned `after`, which is the last `text()` unless given. A notebook shows this
        picture in place of the text. Nothing is computed, written or counted. Without a model, states are unknown.
        """
        return self._picture(self.model_repr if after is None else after)

    def _picture(self, after: ModelRepr | None) -> Picture:
        """Return the picture; a text must be shown whatever happens, so states that cannot be found out are unknown."""
        from backprompt_db.prompt.pictures import picture_explanation, picture_segments

        try:
            explanation = self.explain()
        except (BackpromptError, OSError) as error:
            return picture_segments(self.segments(), remarks=(f"states are unknown: {error}",) if self else ())
        is_same_model = after is not None and after.ids == (explanation.weights_id, explanation.tokenizer_id)
        return picture_explanation(explanation, computed=after.computed_ids() if after and is_same_model else ())

    def _known_left(self, namespace: str) -> Text | None:
        """The left side, unless this text is no concatenation or its tips are known already."""
        known = self._tips is not None and self._tips[0] == namespace
        return self._expression.left if isinstance(self._expression, _Concatenation) and not known else None

    def place(self, after: tuple[Segment, ...], namespace: str) -> tuple[Segment, ...]:
        """Return the tips of this text placed directly after the segments `after`, the tips of another."""
        if not after and self._tips is not None and self._tips[0] == namespace:
            return self._tips[1]
        tips, forks = after, list[tuple[tuple[Segment, ...], list[Segment]]]()
        for step in self._flattened():
            if isinstance(step, _Leaf):
                tips = (Segment.after(tips, step.string, start=step.start, namespace=namespace),)
            elif step is _Mark.FORK:
                forks.append((tips, []))
            elif step is _Mark.NEXT:
                forks[-1][1].extend(tips)
                tips = forks[-1][0]
            else:
                tips = tuple(dict.fromkeys([*forks.pop()[1], *tips]))
        if not after:
            self._tips = (namespace, tips)
        return tips

    def _flattened(self) -> Iterator[_Leaf | _Mark]:
        """Yield leaves and branch marks in the order written: what the expression means."""
        stack: list[Text | _Mark] = [self]
        while stack:
            node = stack.pop()
            expression = node if isinstance(node, _Mark) else node._expression
            if isinstance(expression, _Concatenation):
                stack += [expression.right, expression.left]
            elif isinstance(expression, _Branches):
                alternating = [step for branch in expression.branches for step in (branch, _Mark.NEXT)][:-1]
                stack += [_Mark.JOIN, *reversed(alternating), _Mark.FORK]
            elif expression is not None:
                yield expression

    def __eq__(self, other: object) -> bool:
        """Texts are equal when they mean the same segments under the same model."""
        if not isinstance(other, Text):
            return NotImplemented
        is_same = self._model is other._model and self.seam_rule is other.seam_rule
        return is_same and frozenset(self.tips()) == frozenset(other.tips())

    def __hash__(self) -> int:
        return hash(frozenset(self.tips()))

    def __bool__(self) -> bool:
        return self._expression is not None

    def __str__(self) -> str:
        """The leaf strings joined in the order written; parallel branches one after the other."""
        return "".join(segment.string for segment in self.segments())

    def __format__(self, spec: str) -> str:
        raise PromptError(
            "a text in an f-string becomes a plain string, whose pieces cannot be found again",
            hint="Add strings to it with +, or write str(text) where you want a string.",
        )

    def __repr__(self) -> str:
        string = str(self)
        return f"Text({string!r})" if len(string) <= _REPR_CHARS else f"Text({string[:_REPR_CHARS]!r}...)"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook asks for first: both other forms, from one picture."""
        del include, exclude  # a notebook ignores the forms that it has no use for
        picture = self.picture()
        return {
            "text/plain": repr(self),
            "text/html": picture._repr_html_(),
            "image/svg+xml": picture._repr_svg_(),
        }

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.picture()._repr_html_()

    def _repr_svg_(self) -> str:
        """What is shown where no HTML is, as on web sites that display notebooks."""
        return self.picture()._repr_svg_()


_REPR_CHARS = 200
_NUM_LIKELIEST = 8
"""How many next tokens a notebook shows."""


def as_text(text: Text | str) -> Text:
    """Return `text` itself, or a text without a model for a string."""
    return text if isinstance(text, Text) else Text(text)


def as_texts(values: Iterable[Text | str], *, what: str) -> Iterator[Text]:
    """Yield each value as a text. Raises `InvalidText`, with the number of the value, for one that is none."""
    for number, value in enumerate(values):
        try:
            yield as_text(value)
        except InvalidText as error:
            raise InvalidText(f"{what} {number}, counted from 0: {error.message}", hint=error.hint) from None


def parallel(*branches: Text | str) -> Text:
    """Return branches that do not see each other; what follows sees all of them.

    The order of the branches does not matter to any stored value. Each branch is exactly the segment that it would be
    alone after the same context, so its representation is shared by every prompt that holds it there. Empty branches
    vanish; one branch is that branch.

    Branches start at the same position ids, and what follows starts after the longest: the model was not trained on
    that, so its output differs from that of the plain chain (Parallel Context Windows, arXiv 2212.10947).
    """
    texts = [text for text in map(as_text, branches) if text]
    if not texts:
        return Text("")
    return texts[0] if len(texts) == 1 else Text._of(_Branches(tuple(texts)), texts)


def _seam_rule(name: str) -> SeamRule:
    try:
        return SeamRule(name)
    except ValueError:
        known = ", ".join(repr(each.value) for each in SeamRule)
        raise PromptError(f"seams={name!r} is no rule for seams", hint=f"Give one of {known}.") from None


def _common_rule(parts: Iterable[Text]) -> SeamRule | None:
    rules = {part._seam_rule for part in parts} - {None}
    if len(rules) > 1:
        raise PromptError(
            "the pieces want their seams treated in different ways", hint="Give seams= for one of them, or the same."
        )
    return next(iter(rules), None)


def _common_model(parts: Iterable[Text]) -> Runner | None:
    models = {id(part._model): part._model for part in parts if part._model is not None}
    if len(models) > 1:
        raise PromptError(
            "the texts belong to different models", hint="Build all pieces of a prompt from one LanguageModel."
        )
    return next(iter(models.values()), None)


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelRepr:
    """A language model's representation of one text: what running a prompt returns.

    Attributes:
        text: the text that was run.
        input_ids: int64 [T], the tokens of the whole text, segment by segment in the order written.
        token_logprobs: float32 [T], natural log-probability of each token given the tokens visible to it; NaN for the
            first token of a prompt and for the first token after parallel branches, which nothing predicts.
        logits: [vocab_size] in the model's dtype, after the last token. `PromptError` for a text that ends in
            parallel branches, which has no single last token.
        past_key_values: a transformers `Cache` of the text's keys and values, each
            `[1, num_kv_heads, T, head_dim]` per layer, in the order of `input_ids`. Assembled anew at each access,
            because a model extends the cache that it is given.
        num_cached_tokens: tokens of this text whose representation was found.
        num_computed_tokens: tokens of this text that were computed by the call. A segment shared by several texts of
            one call is counted as computed once, for the first of them.
        num_model_calls: forward passes of the whole call, which may have had other texts.
        seconds: what the whole call took.
        is_computed: of each segment, in the order written, whether its tokens count as computed.
        fidelity: `exact`, or that of the lossy database whose keys and values it may have been computed with.

    Tensors are on the CPU (`past_key_values` where the model is) and may be changed freely. Reading `logits` or
    `token_logprobs` imports torch; nothing else of a hit does.
    """

    text: Text
    segments: tuple[Segment, ...] = field(repr=False)
    """The segments in which it was run, in the order written."""
    scores: tuple[Arrays, ...] = field(repr=False)
    """The scores part of each segment, in the order written."""
    last_logits: Array | None = field(repr=False)
    """The logits part of the last segment, where the call has found or computed it; None after parallel branches."""
    num_cached_tokens: int
    num_computed_tokens: int
    is_computed: tuple[bool, ...] = field(repr=False)
    ids: ModelIds
    """The weights id and tokenizer id that this was computed under."""
    fidelity: str = "exact"
    num_model_calls: int = field(default=0, repr=False)
    seconds: float = field(default=0.0, repr=False)
    store_logits: Callable[[], None] | None = field(default=None, repr=False)
    """Stores `last_logits`, where they were computed and are not stored unless somebody asks for them."""

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """int64 [T]: the tokens of the whole text."""
        import torch

        return torch.cat([scores["input_ids"].torch() for scores in self.scores]).long()

    @cached_property
    def token_logprobs(self) -> torch.Tensor:
        """float32 [T]: log-probability of each token, NaN where nothing predicts it."""
        import torch

        return torch.cat([scores["token_logprobs"].torch() for scores in self.scores])

    @cached_property
    def logits(self) -> torch.Tensor:
        """[vocab_size]: the logits after the last token."""
        # A copy: the array itself may still be queued for writing.
        return self._asked_logits.torch().clone()

    def top_k(self, k: int) -> list[tuple[int, float]]:
        """Return the `k` likeliest next tokens, the likeliest first, as token ids with natural log-probabilities.

        The logits are read where they lie, without torch and, unless they are bfloat16, without a copy. Raises
        `PromptError` where there are no logits, see `logits`, and for a `k` that is not from 1 to vocab_size.
        """
        array = self._asked_logits
        k = plain_int(k)
        if not isinstance(k, int) or not 1 <= k <= array.shape[0]:
            raise PromptError(f"k={k!r} is not a number of tokens", hint=f"Give an int from 1 to {array.shape[0]}.")
        from backprompt_db.prompt.representation import likeliest

        return likeliest(array, k)

    @cached_property
    def _asked_logits(self) -> Array:
        if self.last_logits is not None:
            if self.store_logits is not None:
                self.store_logits()
            return self.last_logits
        if len(self.text.tips()) != 1:
            raise PromptError(
                "a text that ends in parallel branches has no last token",
                hint="Append the text that follows the branches, then run it.",
            )
        return self.text.model.logits_after(self)

    @property
    def counters(self) -> ModelCounters:
        """What was found and computed, and about how long computing what was found would have taken."""
        return ModelCounters.of(self, saved_seconds=self.text.model.seconds_for(self.num_cached_tokens))

    def report(self) -> str:
        """Return in one line what was found, what was computed, and the seconds that this took and saved."""
        return str(self.counters)

    @property
    def past_key_values(self) -> Any:
        """A transformers `Cache` of the whole text, valid input to `model(...)`; a new one at each access.

        Reads the stored keys and values; those that were evicted or never asked for are computed and kept. Raises
        `ModelMismatch` when the model has changed since this representation was computed.
        """
        return self.text.model.past_key_values(self.text, ids=self.ids)

    def picture(self) -> Picture:
        """Return a picture of the prompt, in which what was found and what the call computed have different colours."""
        from backprompt_db.prompt.pictures import picture_result

        return picture_result(self.segments, self.scores, self.is_computed)

    def __str__(self) -> str:
        """What `print` shows: the text, its tokens and how likely they are, and under what model. Loads nothing."""
        logprobs = [float(logprob) for part in self.scores for logprob in part["token_logprobs"].numpy()]
        predicted = [logprob for logprob in logprobs if not math.isnan(logprob)]
        return "\n".join(
            (
                repr(shortened(str(self.text), num_characters=_REPR_CHARS)),
                f"{plural(len(logprobs), 'token')} in {plural(len(self.segments), 'segment')}:"
                f" {self.num_cached_tokens:,} cached, {self.num_computed_tokens:,} computed",
                f"log-probability {sum(predicted):.3f}, of {plural(len(predicted), 'token')}",
                f"{self.ids}, {self.fidelity}",
            )
        )

    def computed_ids(self) -> frozenset[SegmentId]:
        """Return the ids of the segments whose tokens count as computed."""
        pairs = zip(self.segments, self.is_computed, strict=True)
        return frozenset(segment.id for segment, is_computed in pairs if is_computed)

    def _repr_html_(self) -> str:
        """What a notebook shows: every token, coloured by how much it surprised the model.

        Loads the tokenizer where the database does not know its tokens, never the model.
        """
        from backprompt_db.prompt.pictures import scored_tokens
        from backprompt_db.views.token_colours import coloured_tokens

        return coloured_tokens(
            scored_tokens(self.segments, self.scores, self.is_computed),
            num_cached_tokens=self.num_cached_tokens,
            num_computed_tokens=self.num_computed_tokens,
            likeliest=self._likeliest(),
            vocabulary=self._vocabulary(),
        )

    def _likeliest(self) -> list[tuple[int, float]]:
        """The likeliest next tokens that a notebook shows, where the text has one last token."""
        return [] if self.last_logits is None else self.top_k(min(_NUM_LIKELIEST, self.last_logits.shape[0]))

    def _vocabulary(self) -> Vocabulary | None:
        try:
            return self.text.model.vocabulary(self.ids[1])
        except (BackpromptError, OSError):
            return None
