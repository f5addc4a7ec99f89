"""What a prompt is: an immutable expression of strings, concatenations and parallel branches.

Building a text computes nothing. A text *means* the graph of its segments: each leaf string in its place, linked to the
segments that it directly follows. That graph alone decides who attends to whom and at which positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Protocol

from backprompt_db.errors import InvalidText, PromptError
from backprompt_db.keys import SegmentId, TokenizerId, WeightsId, namespace_id, segment_id

if TYPE_CHECKING:
    from backprompt_db.explanation import Explanation
    from backprompt_db.pictures.picture import Picture
    from backprompt_db.pictures.surprise import Vocabulary
    from backprompt_db.representation import ModelRepr


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One leaf string of a text in its place. Two segments are equal when their ids are."""

    id: SegmentId
    string: str
    parents: tuple[Segment, ...] = field(repr=False)
    """The segments that this one directly follows, in the order written."""
    start: int | None
    """The explicit position id of the first token, or None where it follows from the parents."""
    namespace: str

    @classmethod
    def after(cls, parents: tuple[Segment, ...], string: str, *, start: int | None, namespace: str) -> Segment:
        """Place `string` directly after `parents`; without parents it begins a prompt of `namespace`."""
        root = None if parents else namespace_id(namespace)
        parent_ids = (root,) if root else tuple(parent.id for parent in parents)
        return cls(segment_id(string, parents=parent_ids, start=start), string, parents, start, namespace)

    @property
    def parent_ids(self) -> tuple[SegmentId, ...]:
        """The ids that enter this segment's own id, ascending; a namespace counts as the parent of a first segment."""
        root = None if self.parents else namespace_id(self.namespace)
        return (root,) if root else tuple(sorted({parent.id for parent in self.parents}))

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Segment) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)


def ancestry(tips: Iterable[Segment], *, without: Iterable[Segment] = ()) -> list[Segment]:
    """Return `tips` and all their ancestors, each once, parents before children, otherwise in the order written.

    The segments `without` are left out, and so is what only they follow.
    """
    done: dict[Segment, None] = dict.fromkeys(without)
    num_left_out = len(done)
    stack = [(tip, False) for tip in reversed(list(tips))]
    while stack:
        segment, parents_done = stack.pop()
        if segment in done:
            continue
        if parents_done:
            done[segment] = None
        else:
            stack.append((segment, True))
            stack.extend((parent, False) for parent in reversed(segment.parents))
    return list(done)[num_left_out:]


@dataclass(frozen=True, slots=True)
class Seam:
    """A seam at which the pieces' tokens differ from those of the joined string."""

    left: str
    """The end of the text before the seam."""
    right: str
    """The beginning of the text after it."""
    tokens_apart: tuple[str, ...]
    """Tokens of the two sides when each is tokenised alone: what the model sees."""
    tokens_joined: tuple[str, ...]
    """Tokens of the two sides joined: what it would see if they were one string."""


class Runner(Protocol):
    """What a text needs of the language model that it belongs to."""

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

    def past_key_values(self, text: Text, *, ids: tuple[WeightsId, TokenizerId] | None = None) -> Any:
        """Return a transformers `Cache` of the keys and values of `text`, under the model that has these ids."""


class _Runners:
    """How `Text(string, (model, tokenizer))` finds its runner; the package registers the way when it is imported."""

    from_pair: Callable[[Any, Any], Runner]


def register_pair_runner(from_pair: Callable[[Any, Any], Runner]) -> None:
    """Say how a `(model, tokenizer)` pair becomes a `Runner`; a layer above this one knows."""
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
    without one takes it from what it is concatenated with. `start` is the position id of the first token, where it
    shall not follow from what precedes. An `eager` text, and every text concatenated from it, is computed as soon as
    it is built.

    `text()` returns its `ModelRepr`; `text.model_repr` holds the last one, None before the first.

    Raises `InvalidText` for anything but a string without lone surrogates, `PromptError` for a negative start.

    >>> prompt = Text("Question: 2 + 2\n") + "Answer:"
    >>> [segment.string for segment in prompt.segments()]
    ['Question: 2 + 2\n', 'Answer:']
    """

    __slots__ = ("_eager", "_expression", "_model", "_tips", "model_repr")

    model_repr: ModelRepr | None

    def __init__(
        self,
        string: str,
        model: Runner | tuple[Any, Any] | None = None,
        *,
        start: int | None = None,
        eager: bool = False,
    ) -> None:
        if not isinstance(string, str):
            raise InvalidText(f"a text is made of str, not {type(string).__name__}", hint="Convert it with str().")
        segment_id(string, start=start)  # raises here rather than at the first run
        runner = _Runners.from_pair(*model) if isinstance(model, tuple) else model
        if runner is not None and not hasattr(runner, "run"):
            raise PromptError(
                f"a {type(runner).__name__} alone cannot run a text",
                hint="Give (model, tokenizer), or use lm.text(...).",
            )
        self._build(_Leaf(string, start) if string else None, model=runner, eager=eager)

    def _build(self, expression: _Expression | None, *, model: Runner | None, eager: bool) -> None:
        self._expression = expression
        self._model = model
        self._eager = eager
        self._tips: tuple[str, tuple[Segment, ...]] | None = None
        self.model_repr = None
        if eager and model is not None and expression is not None:
            self()

    @classmethod
    def _of(cls, expression: _Expression | None, parts: Sequence[Text]) -> Text:
        text = cls.__new__(cls)
        text._build(expression, model=_common_model(parts), eager=any(part._eager for part in parts))
        return text

    def __add__(self, other: Text | str) -> Text:
        if not isinstance(other, str | Text):
            return NotImplemented
        parts = (self, as_text(other))
        pieces = [part for part in parts if part]
        return Text._of(_Concatenation(*parts) if len(pieces) > 1 else pieces[0]._expression if pieces else None, parts)

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
        text._build(self._expression, model=model, eager=False)
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

    def seams(self) -> list[Seam]:
        """Return the seams at which two neighbouring pieces tokenise differently apart than joined.

        Such a text is legal: each segment is tokenised alone. Loads the tokenizer, not the model.
        """
        return self.model.seams(self)

    def explain(self) -> Explanation:
        """Return where each segment would be found, or why it must be computed, as a table when it is printed.

        With tokens, bytes and seconds. Nothing is computed, written or counted. Loads the tokenizer, not the model.
        """
        return self.model.explain(self)

    def picture(self, *, after: ModelRepr | None = None) -> Picture:
        """Return a picture of the prompt graph: what is stored, what was computed just now, and what is missing.

        Just now is what the run that returned `after` computed, the last `text()` unless given. A notebook shows the
        picture for the text itself. Nothing is computed, written or counted. Without a model, states are unknown.
        """
        from backprompt_db.pictures.subjects import picture_text

        return picture_text(self, after=self.model_repr if after is None else after)

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
        return self._model is other._model and frozenset(self.tips()) == frozenset(other.tips())

    def __hash__(self) -> int:
        return hash(frozenset(self.tips()))

    def __bool__(self) -> bool:
        return self._expression is not None

    def __str__(self) -> str:
        """The leaf strings joined in the order written; parallel branches one after the other."""
        return "".join(segment.string for segment in self.segments())

    def __repr__(self) -> str:
        string = str(self)
        return f"Text({string!r})" if len(string) <= _REPR_CHARS else f"Text({string[:_REPR_CHARS]!r}...)"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook asks for first: the other two, of one picture."""
        del include, exclude  # whoever asks may ignore what it has no use for
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


def as_text(text: Text | str) -> Text:
    """Return `text` itself, or a text without a model for a string."""
    return text if isinstance(text, Text) else Text(text)


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


def _common_model(parts: Iterable[Text]) -> Runner | None:
    models = {id(part._model): part._model for part in parts if part._model is not None}
    if len(models) > 1:
        raise PromptError(
            "the texts belong to different models", hint="Build all pieces of a prompt from one LanguageModel."
        )
    return next(iter(models.values()), None)
