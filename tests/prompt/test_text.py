"""What a prompt means: the algebra of texts and the graph of their segments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprompt_db.errors import InvalidText, PromptError
from backprompt_db.prompt import text as text_module
from backprompt_db.prompt.ids import ModelIds, TokenizerId, WeightsId, namespace_id, segment_id
from backprompt_db.prompt.segments import Seam, ancestry
from backprompt_db.prompt.text import ModelRepr, Runner, Text, parallel, register_pair_runner

PIECES = st.text(st.characters(exclude_categories=["Cs"]), max_size=3).map(Text)
TEXTS = st.recursive(
    PIECES,
    lambda texts: (
        st.tuples(texts, texts).map(lambda pair: pair[0] + pair[1])
        | st.lists(texts, max_size=3).map(lambda branches: parallel(*branches))
    ),
    max_leaves=12,
)
NUM_MANY = 10_000


IDS = ModelIds(WeightsId(bytes(32)), TokenizerId(bytes(32)))


class RecordingRunner:
    """A runner that keeps what it was asked to run and answers with empty representations."""

    def __init__(self, namespace: str = "") -> None:
        self.namespace = namespace
        self.ran: list[Text] = []

    def run(self, text: Text) -> ModelRepr:
        self.ran.append(text)
        return ModelRepr(
            text=text, segments=(), scores=(), last_logits=None, num_cached_tokens=0, num_computed_tokens=0,
            is_computed=(), ids=IDS,
        )  # fmt: skip

    def seams(self, text: Text) -> list[Seam]:
        return [Seam(str(text), "", (), ())]

    def explain(self, text: Text) -> Any:
        return None

    def vocabulary(self, tokenizer_id: TokenizerId) -> Any:
        return None

    def past_key_values(self, text: Text, *, ids: object = None) -> Any:
        return [segment.string for segment in text.segments()]

    def logits_after(self, result: ModelRepr) -> Any:
        return result.text

    def seconds_for(self, num_tokens: int) -> float | None:
        return num_tokens / 10


@contextmanager
def low_recursion_limit() -> Iterator[None]:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(400)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def strings(text: Text) -> list[str]:
    return [segment.string for segment in text.segments()]


@given(TEXTS, TEXTS, TEXTS)
def test_concatenation_is_associative(a: Text, b: Text, c: Text) -> None:
    assert (a + b) + c == a + (b + c)
    assert hash((a + b) + c) == hash(a + (b + c))
    assert ((a + b) + c).segments() == (a + (b + c)).segments()


@given(TEXTS)
def test_the_empty_text_changes_nothing(a: Text) -> None:
    assert a + "" == "" + a == a == a + Text("") == parallel() + a == parallel("", Text("")) + a


@given(TEXTS, st.text(st.characters(exclude_categories=["Cs"]), max_size=3))
def test_a_string_is_a_text(a: Text, string: str) -> None:
    assert string + a == Text(string) + a
    assert a + string == a + Text(string)


@given(TEXTS, st.lists(TEXTS, max_size=4), TEXTS, st.randoms())
def test_branches_are_a_set(context: Text, branches: list[Text], after: Text, random: Any) -> None:
    shuffled = branches + branches[:1]
    random.shuffle(shuffled)
    one, other = (context + parallel(*each) + after for each in (branches, shuffled))
    assert one == other
    assert set(one.segments()) == set(other.segments())


@given(TEXTS, TEXTS)
def test_one_branch_is_that_branch(context: Text, branch: Text) -> None:
    assert context + parallel(branch) == context + branch == context + parallel(branch, "")


@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_branches_of_branches_are_branches(a: Text, b: Text, c: Text, after: Text) -> None:
    assert parallel(parallel(a, b), c) + after == parallel(a, b, c) + after


@given(TEXTS, TEXTS, TEXTS)
def test_a_branch_is_the_segment_that_it_would_be_alone(context: Text, branch: Text, other: Text) -> None:
    together = set((context + parallel(branch, other)).segments())
    assert set((context + branch).segments()) <= together


@given(TEXTS)
def test_segments_come_once_and_after_their_parents(a: Text) -> None:
    segments = a.segments()
    assert len(set(segments)) == len(segments)
    for index, segment in enumerate(segments):
        assert set(segment.parents) <= set(segments[:index])
        assert segment.id == segment_id(segment.string, parents=[parent.id for parent in segment.parents])
        assert segment.parent_ids == tuple(sorted(parent.id for parent in segment.parents))


@given(TEXTS)
def test_a_text_is_true_when_it_says_something(a: Text) -> None:
    assert bool(a) is bool(a.segments()) is bool(str(a))
    assert bool(a.tips()) is bool(a)


def test_only_what_follows_branches_has_several_parents() -> None:
    context, one, two, question = (Text("c") + parallel("1", "2") + "q").segments()
    assert (context.parents, one.parents, two.parents) == ((), (context,), (context,))
    assert question.parents == (one, two)
    assert ancestry([question]) == [context, one, two, question]
    assert ancestry([question], without=[one]) == [context, two, question]


def test_a_text_is_written_as_its_strings_in_order() -> None:
    text = Text("a") + parallel("b", "c") + "d"
    assert str(text) == "abcd"
    assert repr(text) == "Text('abcd')"
    assert repr(Text("x" * 500)) == f"Text({'x' * 200!r}...)"


def test_the_same_strings_cut_elsewhere_are_another_text() -> None:
    assert Text("ab") != Text("a") + "b"
    assert Text("a") != "a"


def test_a_text_has_no_length() -> None:
    with pytest.raises(TypeError):
        len(Text("a"))  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["left", "right"])
def test_ten_thousand_pieces_need_no_recursion(side: str) -> None:
    with low_recursion_limit():
        texts = [Text(""), Text("")]
        for each in range(2):
            for number in range(NUM_MANY):
                texts[each] = texts[each] + str(number) if side == "left" else str(number) + texts[each]
        one, other = texts
        assert one == other
        assert hash(one) == hash(other)
        assert len(one.segments()) == NUM_MANY
        assert repr(one).startswith("Text('0123" if side == "left" else "Text('99999998")
        del one, other, texts


def test_ten_thousand_nested_branches_need_no_recursion() -> None:
    with low_recursion_limit():
        one, other = Text("a"), Text("a")
        for number in range(NUM_MANY):
            one = parallel(one, str(number)) + "c"
            other = parallel(str(number), other) + "c"
        assert one == other
        assert hash(one) == hash(other)
        assert repr(one).startswith("Text('a0c1c2c3c")
        assert len(one.segments()) == 2 * NUM_MANY + 1
        del one, other


def test_a_prompt_that_grows_piece_by_piece_is_not_walked_again() -> None:
    text = Text("0")
    for number in range(2_000):
        text = text + str(number)
        assert len(text.tips()) == 1
    assert len(text.segments()) == 2_001


@pytest.mark.parametrize("value", [b"a", 1, None, ["a"]])
def test_only_strings_make_texts(value: Any) -> None:
    with pytest.raises(InvalidText, match=f"not {type(value).__name__}"):
        Text(value)
    with pytest.raises(TypeError):
        Text("a") + value
    with pytest.raises(TypeError):
        value + Text("a")


def test_a_lone_surrogate_is_refused_when_the_text_is_built() -> None:
    with pytest.raises(InvalidText, match="lone surrogate"):
        Text("a") + "\ud800"


def test_a_negative_start_is_refused_when_the_text_is_built() -> None:
    with pytest.raises(PromptError, match="start=-1"):
        Text("a", start=-1)


def test_an_explicit_start_is_part_of_the_name() -> None:
    plain, placed = Text("a") + "b", Text("a") + Text("b", start=7)
    assert plain != placed
    assert [segment.start for segment in placed.segments()] == [None, 7]
    assert placed.segments()[0] == plain.segments()[0]


def test_a_namespace_is_the_parent_of_every_first_segment() -> None:
    text = parallel("a", "b") + "c"
    first, second, last = text.segments("tenant")
    root = namespace_id("tenant")
    assert first.parent_ids == second.parent_ids == (root,)
    assert first.id == segment_id("a", parents=[root] if root else [])
    assert (first.parents, {segment.namespace for segment in (first, second, last)}) == ((), {"tenant"})
    assert not set(text.segments("tenant")) & set(text.segments()) & set(text.segments("other"))


def test_texts_of_models_in_different_namespaces_differ() -> None:
    ours, theirs = RecordingRunner("ours"), RecordingRunner("theirs")
    assert Text("a", ours) == Text("a", ours)
    assert Text("a", ours) != Text("a", theirs)
    assert Text("a", ours) != Text("a")
    assert Text("a", ours).segments() != Text("a", theirs).segments()
    assert Text("a", ours).segments() == Text("a").segments("ours")


def test_texts_of_one_model_in_two_handles_are_not_mixed() -> None:
    one, other = Text("a", RecordingRunner()), Text("b", RecordingRunner())
    mixes: list[Callable[[], Text]] = [lambda: one + other, lambda: one + ("c" + other), lambda: parallel(one, other)]
    for mix in mixes:
        with pytest.raises(PromptError, match="different models"):
            mix()


def test_a_text_takes_the_model_of_what_it_joins() -> None:
    runner = RecordingRunner("tenant")
    for text in (Text("a", runner) + "b", "b" + Text("a", runner), parallel("b", Text("a", runner)) + "c"):
        assert text.model is runner
        assert text.segments()[0].namespace == "tenant"


def test_a_text_without_a_model_cannot_be_run() -> None:
    for attempt in (Text("a"), lambda: Text("a").model, lambda: Text("a").seams()):
        with pytest.raises(PromptError, match="no model"):
            attempt()


def test_running_a_text_keeps_its_representation() -> None:
    runner = RecordingRunner()
    text = Text("a", runner) + "b"
    assert not text.model_repr
    assert runner.ran == []
    found = text()
    assert text.model_repr is found
    assert runner.ran == [text]
    assert found.past_key_values == ["a", "b"]
    assert [seam.left for seam in text.seams()] == ["ab"]


def test_an_eager_text_and_what_is_built_from_it_run_at_once() -> None:
    runner = RecordingRunner()
    context = Text("a", runner, eager=True)
    prompt = context + "b"
    branches = parallel(prompt, "c")
    assert [str(text) for text in runner.ran] == ["a", "ab", "abc"]
    assert None not in (context.model_repr, prompt.model_repr, branches.model_repr)


def test_an_eager_text_waits_for_its_model() -> None:
    runner = RecordingRunner()
    text = Text("a", eager=True)
    assert text.model_repr is None
    joined = Text("b", runner) + text
    assert joined.model_repr is not None
    assert runner.ran == [joined]


def test_an_empty_eager_text_runs_nothing() -> None:
    runner = RecordingRunner()
    assert Text("", runner, eager=True).model_repr is None
    assert runner.ran == []


def test_a_pair_becomes_the_runner_that_was_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module._Runners, "from_pair", text_module._Runners.from_pair)
    pairs, runner = [], RecordingRunner()

    def runner_of(model: Any, tokenizer: Any) -> Runner:
        pairs.append((model, tokenizer))
        return runner

    register_pair_runner(runner_of)
    text = Text("a", ("model", "tokenizer")) + "b"
    assert text.model is runner
    assert pairs == [("model", "tokenizer")]


def test_a_text_in_an_f_string_says_what_to_do() -> None:
    text = Text("Facts. ")
    with pytest.raises(PromptError, match=r"becomes a plain string.*Add strings to it with \+"):
        f"{text}Question?"
    assert f"{text!s}Question?" == "Facts. Question?"
