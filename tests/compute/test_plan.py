"""What is missing, in which packs, and who sees whom: against definitions written out the slow way."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.compute import plan
from backprompt_db.compute.inference.masks import attention_mask
from backprompt_db.errors import ContextLengthExceeded
from backprompt_db.prompt.representation import OWN_PARTS, Part
from backprompt_db.prompt.segments import Segment, ancestry
from backprompt_db.prompt.text import Text
from tests.support.families import graphs

GRAPHS = graphs(alphabet="abc", max_leaves=10)
FORESTS = st.lists(GRAPHS, min_size=1, max_size=3)


def segments_of(texts: list[Text]) -> list[Segment]:
    return ancestry([tip for text in texts for tip in text.tips()])


def num_tokens_of(segments: Collection[Segment]) -> dict[Segment, int]:
    return {segment: len(segment.string) for segment in segments}


def visible(segment: Segment) -> set[Segment]:
    return set(ancestry(segment.parents))


@given(FORESTS, st.sets(st.integers(0, 30)), st.sampled_from([None, 1, 2]))
def test_packs_hold_every_missing_segment_once_after_everything_that_it_sees(
    texts: list[Text], stored: set[int], max_segments: int | None
) -> None:
    segments = segments_of(texts)
    missing = [segment for number, segment in enumerate(segments) if number not in stored]
    packs = plan.packs(missing, num_tokens_of(segments), max_segments=max_segments)
    computed: set[Segment] = {segment for number, segment in enumerate(segments) if number in stored}
    assert [segment for pack in packs for segment in pack.segments] == missing
    for pack in packs:
        assert set(pack.context) == set().union(*map(visible, pack.segments)) - set(pack.segments)
        assert set(pack.context) <= computed
        assert {segment for segment, _ in pack.needs} <= computed
        computed.update(pack.segments)


@given(FORESTS, st.sets(st.integers(0, 30)))
def test_the_mask_is_reachability_and_causal_inside_a_segment(texts: list[Text], stored: set[int]) -> None:
    segments = segments_of(texts)
    num_tokens = num_tokens_of(segments)
    missing = [segment for number, segment in enumerate(segments) if number not in stored]
    for pack in plan.packs(missing, num_tokens):
        mask = attention_mask(pack, num_tokens)
        rows = [(segment, i) for segment in pack.segments for i in range(num_tokens[segment])]
        columns = [(segment, i) for segment in (*pack.context, *pack.segments) for i in range(num_tokens[segment])]
        expected = [[s in visible(own) or (s == own and j <= i) for s, j in columns] for own, i in rows]
        assert np.array_equal(mask, expected)


@given(FORESTS)
def test_positions_follow_the_largest_position_among_the_parents(texts: list[Text]) -> None:
    segments = segments_of(texts)
    num_tokens = num_tokens_of(segments)
    starts = plan.positions(segments, num_tokens)
    for segment in segments:
        last = [starts[parent] + num_tokens[parent] - 1 for parent in segment.parents]
        assert starts[segment] == (1 + max(last) if last else 0)


@given(GRAPHS, st.sets(st.tuples(st.integers(0, 15), st.sampled_from(OWN_PARTS))))
def test_what_is_missing_can_be_computed_from_what_is_stored(text: Text, stored: set[tuple[int, Part]]) -> None:
    segments = text.segments()
    have = {
        (segment, part) for number, segment in enumerate(segments) for part in OWN_PARTS if (number, part) in stored
    }
    wanted = dict.fromkeys(segments[-2:], frozenset({Part.SCORES}))
    missing = plan.missing_parts(wanted, is_stored=lambda segment, part: (segment, part) in have)
    assert all(((segment, Part.SCORES) in have) or segment in missing for segment in wanted)
    for segment in missing:
        assert all((other, Part.KV) in have or other in missing for other in visible(segment))
        if len(segment.parents) == 1:
            assert (segment.parents[0], Part.LOGITS) in have or segment.parents[0] in missing


def test_a_stored_leaf_needs_nothing_of_its_ancestors() -> None:
    leaf = (Text("a") + "b" + "c").segments()[-1]
    wanted = {leaf: frozenset({Part.SCORES})}
    assert plan.missing_parts(wanted, is_stored=lambda segment, part: segment == leaf) == {}


def test_unrelated_prompts_are_not_packed_without_bound() -> None:
    segments = segments_of([Text("x" * 700 + str(number)) for number in range(6)])
    num_tokens = num_tokens_of(segments)
    divided = plan.packs(segments, num_tokens)
    assert len(divided) > 1
    for pack in divided:
        assert sum(num_tokens[segment] for segment in pack.segments) <= plan.MAX_PACK_TOKENS


@given(FORESTS, st.integers(1, 30))
def test_a_pass_of_several_segments_has_no_more_columns_than_fit(texts: list[Text], max_columns: int) -> None:
    segments = segments_of(texts)
    num_tokens = num_tokens_of(segments)
    packs = plan.packs(segments, num_tokens, max_columns=max_columns)
    assert [segment for pack in packs for segment in pack.segments] == segments
    for pack in packs:
        num_columns = sum(num_tokens[segment] for segment in (*pack.context, *pack.segments))
        assert num_columns <= max_columns or len(pack.segments) == 1


def test_siblings_share_a_pass_and_their_context() -> None:
    context = Text("y" * 900)
    segments = segments_of([context + f"request {number}" for number in range(100)])
    packs = plan.packs(segments[1:], num_tokens_of(segments))
    assert [pack.context for pack in packs] == [(segments[0],)] * len(packs)
    assert 1 < len(packs) < 8  # some hundred tokens each: neither a pass for every ten tokens nor a vast mask


LENGTHS = st.lists(st.sampled_from([1, 4, 12, 60, 150, 400, 900]), min_size=1, max_size=40)


def excess(pack: Sequence[int], context: int, costs: plan.Costs) -> float:
    """What a pass over siblings costs beside their tokens."""
    num_pairs = sum(pack) * (context + sum(pack))
    num_seen = sum(n * (context + n / 2) for n in pack)
    return costs.tokens_per_pass + (num_pairs - num_seen) / costs.pairs_per_token


@given(LENGTHS, st.sampled_from([0, 600]), st.sampled_from([plan.Costs(), plan.Costs(256, 20_000)]))
def test_packs_cost_little_more_than_the_best_division(lengths: list[int], context: int, costs: plan.Costs) -> None:
    prefix = Text("y" * context)
    texts = [prefix + (f"{number:02}" + "x" * length)[-length:] for number, length in enumerate(lengths)]
    segments = segments_of(texts)[bool(context) :]
    num_tokens = num_tokens_of(segments_of(texts))
    lengths = [num_tokens[segment] for segment in segments]
    best = [0.0]
    for end in range(1, len(lengths) + 1):
        best.append(min(best[begin] + excess(lengths[begin:end], context, costs) for begin in range(end)))
    divided = plan.packs(segments, num_tokens, costs=costs)
    actual = sum(excess([num_tokens[segment] for segment in pack.segments], context, costs) for pack in divided)
    assert sum(lengths) + actual <= 1.25 * (sum(lengths) + best[-1])


def test_a_context_is_ordered_the_same_however_the_text_was_written() -> None:
    texts = [Text("a") + bp.parallel(*order) + "q" for order in (["b", "cc"], ["cc", "b"])]
    contexts = []
    for text in texts:
        segments = text.segments()
        (pack,) = plan.packs(segments[-1:], num_tokens_of(segments))
        contexts.append(pack.context)
    assert contexts[0] == contexts[1]


def test_planning_a_chain_of_ten_thousand_pieces_does_not_recurse() -> None:
    text = Text("a")
    for _ in range(10_000):
        text += "b"
    segments = text.segments()
    num_tokens = num_tokens_of(segments)
    packs = plan.packs(segments, num_tokens)
    assert sum(len(pack.segments) for pack in packs) == 10_001
    assert plan.positions(segments, num_tokens)[segments[-1]] == 10_000


def test_a_prompt_that_is_too_long_says_how_long() -> None:
    segments = (Text("abc") + "defg").segments()
    num_tokens = num_tokens_of(segments)
    starts = plan.positions(segments, num_tokens)
    plan.check_context_length(starts, num_tokens, 7)
    plan.check_context_length(starts, num_tokens, None)
    with pytest.raises(ContextLengthExceeded, match="needs 7 positions, this model takes 6"):
        plan.check_context_length(starts, num_tokens, 6)


def test_logits_that_predict_a_first_token_are_computed_again_where_they_alone_are_gone() -> None:
    first, second = (Text("before") + " after").segments()
    have = {(first, Part.SCORES), (first, Part.KV)}
    missing = plan.missing_parts({second: frozenset({Part.SCORES})}, is_stored=lambda *need: need in have)
    assert missing == {first: {Part.LOGITS}, second: {Part.SCORES}}
