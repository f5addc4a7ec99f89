"""What of a forest is shown: the heaviest nodes, each with its parent, and how much is hidden where."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backprompt_db.operations.forest import Branch, Forest, Hidden, Measure, Node, prune
from backprompt_db.prompt.ids import Address, SegmentId, TokenizerId, WeightsId

_TOKENIZER_ID = TokenizerId(b"t" * 32)


def node(text: str, num_tokens: int, *parents: int) -> Node:
    name = text.encode().ljust(32)
    return Node(
        segment_id=SegmentId(name), address=Address(name), weights_id=WeightsId(b"w" * 32), tokenizer_id=_TOKENIZER_ID,
        model_name="gpt2", namespace="", text=text, start=None, num_tokens=num_tokens, nbytes={}, compute_seconds=1.0,
        created_at=0.0, last_used_at=None, num_hits=0, is_pinned=False, label=None, parents=parents,
        num_absent_parents=0,
    )  # fmt: skip


def forest_of(*nodes: Node) -> Forest:
    return Forest(nodes, at=1.0, is_whole=True)


def tree() -> Forest:
    return forest_of(
        node("context", 100),
        node("small", 1, 0),
        node("large", 50, 0),
        node("middle", 20, 0),
        node("after large", 5, 2),
        node("other", 30),
    )


def pruned(forest: Forest, *, limit: int = 100, max_depth: int | None = None) -> list[str]:
    """The texts that are shown, indented by how deep they are."""
    found = prune(forest, forest.weights(Measure.TOKENS), limit=limit, max_depth=max_depth)
    return ["  " * branch.depth + forest.nodes[branch.node].text for branch in found.branches()]


def test_the_heaviest_come_first_and_what_follows_alone_is_as_deep_as_its_parent() -> None:
    assert pruned(tree()) == ["context", "  large", "  after large", "  middle", "  small", "other"]


def test_a_limit_keeps_what_weighs_most_with_what_follows_it() -> None:
    assert pruned(tree(), limit=3) == ["context", "  large", "other"]


def test_a_depth_counts_branchings() -> None:
    assert pruned(tree(), max_depth=0) == ["context", "other"]
    chain = [node(str(number), 1, *([number - 1] if number else [])) for number in range(5)]
    assert len(pruned(forest_of(*chain), max_depth=0)) == 5


def test_a_node_weighs_what_it_weighs_and_not_what_sums_of_fractions_leave() -> None:
    forest = forest_of(node("context", 1), *(node(name, 1, 0) for name in "abc"))
    weights = [0.0, 0.1, 0.2, 0.7]
    found = prune(forest, weights, limit=100, max_depth=None)
    assert {branch.node: branch.weight for branch in found.branches()} == dict(enumerate(weights))


def test_what_is_hidden_is_counted_where_it_would_stand() -> None:
    forest = tree()
    found = prune(forest, forest.weights(Measure.TOKENS), limit=2, max_depth=None)
    (context,) = found.roots
    assert found.hidden == Hidden(1, 30)
    assert context.hidden == Hidden(2, 21)
    assert context.children[0].hidden == Hidden(1, 5)
    assert (found.total, context.total, context.weight) == (206, 176, 100)


def test_a_node_with_several_parents_stands_below_the_first() -> None:
    joined = forest_of(node("context", 9), node("one", 5, 0), node("two", 4, 0), node("join", 1, 1, 2))
    assert pruned(joined) == ["context", "  one", "  join", "  two"]


def test_a_chain_of_thousands_is_no_recursion() -> None:
    chain = [node(str(number), 1, *([number - 1] if number else [])) for number in range(5_000)]
    assert len(pruned(forest_of(*chain), limit=5_000)) == 5_000


FORESTS = st.lists(st.tuples(st.integers(0, 20), st.integers(-1, 30)), max_size=30).map(
    lambda facts: forest_of(
        *(
            node(str(number), weight, *([parent % number] if number and parent >= 0 else []))
            for number, (weight, parent) in enumerate(facts)
        )
    )
)


@given(FORESTS, st.integers(1, 12), st.none() | st.integers(0, 3))
def test_what_is_shown_and_what_is_hidden_is_everything(forest: Forest, limit: int, max_depth: int | None) -> None:
    found = prune(forest, forest.weights(Measure.TOKENS), limit=limit, max_depth=max_depth)
    shown = found.branches()
    assert len({branch.node for branch in shown}) == len(shown) <= limit
    assert len(shown) + found.hidden.num_nodes + sum(each.hidden.num_nodes for each in shown) == len(forest.nodes)
    assert found.total == sum(forest.weights(Measure.TOKENS))
    assert sum(map(own, shown)) + found.hidden.total + sum(each.hidden.total for each in shown) == found.total
    assert all(own(each) == forest.nodes[each.node].num_tokens for each in shown)


def own(branch: Branch) -> float:
    return branch.weight
