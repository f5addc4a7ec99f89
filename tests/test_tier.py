"""The memory tier: within its budget, the least recently used goes first; what is there is what was put."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backprompt_db.tier import MemoryTier, default_budget_nbytes

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 6), st.integers(0, 60)),
        st.tuples(st.just("get"), st.integers(0, 6), st.just(0)),
        st.tuples(st.just("discard"), st.integers(0, 6), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_it_is_a_dict_that_forgets_what_was_used_longest_ago(steps: list[tuple[str, int, int]]) -> None:
    tier, model = MemoryTier(100), dict[int, int]()  # a dict keeps the order of insertion: here, that of use
    for step, key, nbytes in steps:
        if step == "get":
            assert tier.get(key) == model.get(key)
            if key in model:
                model[key] = model.pop(key)
        else:
            model.pop(key, None)
            tier.put(key, nbytes, nbytes=nbytes) if step == "put" else tier.discard(key)
        if step == "put" and nbytes <= 100:
            model[key] = nbytes
            while sum(model.values()) > 100:
                del model[next(iter(model))]
        assert tier.nbytes == sum(model.values()) <= 100
    assert {key: tier.get(key) for key in range(7) if tier.get(key) is not None} == model


def test_the_best_of_a_kind_is_taken_out() -> None:
    tier = MemoryTier(100)
    for number in (3, 9, 4):
        tier.put(number, number, nbytes=number)
    tier.put("other", "a string", nbytes=1)
    assert tier.take_best(int, lambda value: value) == 9
    assert tier.take_best(int, lambda value: value if value < 4 else 0) == 3
    assert tier.take_best(int, lambda value: 0) is None
    assert (tier.get(4), tier.get("other"), tier.nbytes) == (4, "a string", 5)
    tier.clear()
    assert (tier.get(4), tier.nbytes) == (None, 0)


def test_nothing_is_kept_without_a_budget() -> None:
    tier = MemoryTier(0)
    tier.put("key", "value", nbytes=1)
    assert tier.get("key") is None


def test_the_default_budget_is_a_part_of_what_is_free() -> None:
    assert 0 < default_budget_nbytes() < 1 << 45
