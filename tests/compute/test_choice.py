"""The search for the best completions: the same as from sorting all values, from no more tokens than can matter."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from backprompt_db.compute.choice import Choice
from backprompt_db.compute.token_tree import Continuations, TokenTree

TOKENS = st.integers(0, 3)
COMPLETIONS = st.lists(st.tuples(st.integers(0, 1), st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=12)


def choice_of(tree: TokenTree, num_wanted: int, values: np.random.Generator) -> Choice:
    num = len(tree.paths)
    bias, weight, offset = values.normal(size=num), values.uniform(0.2, 2, size=num), values.normal(size=num)
    return Choice(tree, num_wanted, bias, weight, offset)


def all_values(choice: Choice, logprobs: np.ndarray) -> np.ndarray:
    sums = [logprobs[path[path >= 0]].sum() for path in choice.tree.paths]
    values: np.ndarray = choice.bias + choice.weight * (choice.offset + np.array(sums))
    return values


@given(COMPLETIONS, st.integers(1, 14), st.integers(0, 99), st.sampled_from([0.1, 3.0, 100.0]), st.integers(0, 1))
def test_the_best_are_those_of_sorting_all(
    completions: list[tuple[int, list[int]]], num_wanted: int, seed: int, budget: float, num_ties: int
) -> None:
    values = np.random.default_rng(seed)
    tree = TokenTree(completions)
    choice = choice_of(tree, num_wanted, values)
    logprobs = -values.exponential(size=len(tree))
    if num_ties:
        logprobs = np.floor(logprobs)
        choice.bias, choice.weight, choice.offset = (np.full(len(tree.paths), each) for each in (0.0, 1.0, -1.0))
    for root in {root for root, _ in completions}:
        choice.learn({node: logprobs[node] for node in tree.children(-1 - root)})
    held: set[int] = set()
    while choice.open:
        new = choice.next_nodes(held, budget=budget)
        assert new == sorted(set(new) - held)
        assert all(tree.nodes[node][0] < 0 or tree.nodes[node][0] in held or tree.nodes[node][0] in new for node in new)
        held.update(new)
        choice.learn({child: logprobs[child] for node in new for child in tree.children(node)})
    expected = all_values(choice, logprobs)
    best = np.argsort(-expected, kind="stable")[:num_wanted].tolist()
    assert choice.best == best
    assert np.allclose([choice.value(each) for each in best], expected[best])


def test_what_cannot_be_among_the_best_is_left() -> None:
    """Of 100 completions that begin with likely or unlikely tokens, only the likely ones are followed."""
    tree = TokenTree([(0, [first, 0, 1, 2]) for first in range(100)])
    ones = np.ones(100)
    choice = Choice(tree, 1, 0 * ones, ones, 0 * ones)
    choice.learn({node: -0.1 if tree.nodes[node][1] == 7 else -9.0 for node in tree.children(-1)})
    new = choice.next_nodes(set(), budget=1)
    assert [tree.nodes[node][1] for node in new] == [7, 0, 1]
    choice.learn({child: -0.2 for node in new for child in tree.children(node)})
    assert choice.open == []
    assert choice.best == [7]


@given(COMPLETIONS, COMPLETIONS, st.integers(0, 99))
def test_what_was_learned_of_one_tree_is_known_in_another(
    some: list[tuple[int, list[int]]], others: list[tuple[int, list[int]]], seed: int
) -> None:
    """Of a tree that is stored and read again, each token that both have after the same ones is known, and no other."""
    tree, other = TokenTree(some), TokenTree(others)
    logprobs = np.where(np.random.default_rng(seed).random(len(tree)) < 0.7, -np.arange(len(tree)) / 7, np.nan)
    for root in (0, 1):
        known = Continuations()
        known.learn(tree, logprobs, root=root)
        known = Continuations(known.arrays())
        assert not known.learn(tree, logprobs, root=root)
        expected = {}
        for (of, ids), path in zip(some, tree.paths, strict=True):
            for end in range(1, len(ids) + 1):
                if of == root and not np.isnan(logprobs[path[:end]]).any():
                    expected[tuple(ids[:end])] = np.float32(logprobs[path[end - 1]])
        found = known.known(other, root=root)
        for (of, ids), path in zip(others, other.paths, strict=True):
            for end in range(1, len(ids) + 1):
                if of == root:
                    assert found.get(int(path[end - 1])) == expected.get(tuple(ids[:end]))
