"""The memory cache: within its budget, the least recently used goes first; what is there is what was put."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprompt_db.database.memory_cache import FreeShare, MemoryCache, default_budget_nbytes

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
    cache, model = MemoryCache(100), dict[int, int]()  # a dict keeps the order of insertion: here, that of use
    for step, key, nbytes in steps:
        if step == "get":
            assert cache.get(key) == model.get(key)
            if key in model:
                model[key] = model.pop(key)
        else:
            model.pop(key, None)
            cache.put(key, nbytes, nbytes=nbytes) if step == "put" else cache.discard(key)
        if step == "put" and nbytes <= 100:
            model[key] = nbytes
            while sum(model.values()) > 100:
                del model[next(iter(model))]
        assert cache.nbytes == sum(model.values()) <= 100
    assert {key: cache.get(key) for key in range(7) if cache.get(key) is not None} == model


def test_the_best_of_a_group_is_taken_out() -> None:
    cache = MemoryCache(100)
    for number in (3, 9, 4):
        cache.put(number, number, nbytes=number, group="numbers")
    cache.put("other", 50, nbytes=1, group="others")
    cache.put("none", 60, nbytes=1)
    assert cache.take_best("numbers", lambda value: (value,)) == 9
    assert cache.take_best("numbers", lambda value: (value,) if value < 4 else None) == 3
    assert cache.take_best("numbers", lambda value: None) is None
    assert cache.take_best("unknown", lambda value: (value,)) is None
    assert (cache.get(4), cache.get("other"), cache.nbytes, cache.room_nbytes) == (4, 50, 6, 94)
    cache.clear()
    assert (cache.get(4), cache.nbytes) == (None, 0)
    assert cache.take_best("others", lambda value: (value,)) is None


def test_the_later_numbers_of_a_rank_decide_between_equals() -> None:
    cache = MemoryCache(100)
    for key, value in (("a", (1, 2)), ("b", (1, 3)), ("c", (0, 9))):
        cache.put(key, value, nbytes=1, group="pairs")
    assert cache.take_best("pairs", lambda value: value) == (1, 3)


def test_a_group_holds_only_what_is_still_there() -> None:
    cache = MemoryCache(10)
    cache.put("gone", 9, nbytes=5, group="numbers")
    cache.put("moved", 8, nbytes=1, group="numbers")
    cache.put("moved", 7, nbytes=1, group="others")
    cache.put("big", "it drives out the oldest", nbytes=8)
    assert cache.take_best("numbers", lambda value: (value,)) is None
    assert cache.take_best("others", lambda value: (value,)) == 7


def test_taking_looks_at_nothing_outside_the_group() -> None:
    cache, seen = MemoryCache(10_000), list[int]()
    for number in range(1_000):
        cache.put(number, number, nbytes=1, group=number % 500)
    assert cache.take_best(7, lambda value: seen.append(value) or (value,)) == 507  # type: ignore[func-returns-value]
    assert seen == [7, 507]


def test_a_closed_tier_keeps_nothing() -> None:
    cache = MemoryCache(100)
    cache.put("key", "value", nbytes=1, group="group")
    cache.close()
    cache.put("late", "value", nbytes=1, group="group")
    cache.put("empty", "value", nbytes=0, group="group")
    assert cache.nbytes == 0
    assert [cache.get(key) for key in ("key", "late", "empty")] == [None] * 3
    assert cache.take_best("group", lambda value: (1,)) is None


def test_nothing_is_kept_without_a_budget() -> None:
    cache = MemoryCache(0)
    cache.put("key", "value", nbytes=1)
    assert cache.get("key") is None


def container(place: Path, limit: str, usage: str, *, version: int = 2, cached: int = 0) -> Path:
    """Files as the kernel shows them in a container."""
    names = {2: ("memory.max", "memory.current"), 1: ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")}
    for name, content in zip(names[version], (limit, usage), strict=True):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(f"{content}\n")
    (place / name).with_name("memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 3\n")
    return place


@pytest.mark.parametrize("version", [1, 2])
def test_the_default_budget_is_a_part_of_what_a_container_may_use(tmp_path: Path, version: int) -> None:
    place = container(tmp_path, "9000", "1003", version=version)
    assert default_budget_nbytes(cgroups=place) == 1000
    place = container(tmp_path, "9000", "9003", version=version, cached=1600)
    assert default_budget_nbytes(cgroups=place) == 200  # files that are cached do not count
    place = container(tmp_path, "9000", "9900", version=version)
    assert default_budget_nbytes(cgroups=place) == 0


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", "", "?"])
def test_a_container_without_a_limit_may_use_what_the_machine_has(tmp_path: Path, limit: str) -> None:
    assert default_budget_nbytes(cgroups=container(tmp_path, limit, "1000")) > 1 << 20
    assert default_budget_nbytes(cgroups=tmp_path / "none") > 1 << 20


def test_eight_processes_leave_memory_free() -> None:
    total, caches = 150_000, list[MemoryCache]()

    def free() -> int:
        return total - sum(cache.nbytes for cache in caches)

    caches += [MemoryCache(total // 8, share=FreeShare(free)) for _ in range(8)]
    for number in range(1000):
        for cache in caches:
            cache.put(number, number, nbytes=100)
    assert all(9_000 < cache.nbytes < 12_000 for cache in caches)
    assert free() > total // 3


def test_what_others_take_is_given_back_with_the_next_value(monkeypatch: pytest.MonkeyPatch) -> None:
    free, now = [8_000], [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    cache = MemoryCache(1_000, share=FreeShare(lambda: free[0]))
    cache.put("old", "value", nbytes=300)
    cache.put("new", "value", nbytes=300)
    free[0], now[0] = 2_600, 10.0
    cache.put("newest", "value", nbytes=50)
    assert (cache.get("old"), cache.nbytes, cache.budget_nbytes) == (None, 350, 400)
    free[0], now[0] = 8_000, 20.0
    cache.put("again", "value", nbytes=600)
    assert cache.nbytes == 950
    cache.close()
    cache.put("late", "value", nbytes=1)
    assert (cache.nbytes, cache.budget_nbytes) == (0, 0)


def test_the_free_memory_is_not_measured_for_each_value() -> None:
    measured: list[int] = []
    cache = MemoryCache(1 << 40, share=FreeShare(lambda: measured.append(1) or 1 << 40))  # type: ignore[func-returns-value]
    for number in range(1000):
        cache.put(number, number, nbytes=2048)
    assert len(measured) < 10


def test_the_default_budget_is_a_part_of_what_is_free() -> None:
    assert 0 < default_budget_nbytes() < 1 << 45
