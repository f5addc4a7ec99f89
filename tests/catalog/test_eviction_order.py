"""What goes first when a database is full."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import EvictionCandidate, Selection, StoredPart
from backprompt_db.prompt.ids import Address, TokenizerId
from backprompt_db.prompt.representation import OWN_PARTS, Origin, Part
from tests.support.catalogs import OTHER_WEIGHTS, evicted_at, new_catalog, origin_of, stored

DAY = 86_400.0
NOW = 1000 * DAY
ALL = 2**62


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with new_catalog(tmp_path / "catalog.sqlite") as opened:
        yield opened


def record(catalog: Catalog, *parts: StoredPart, at: float = NOW - DAY) -> None:
    catalog.record(parts, at=at)


def scores(text: str, *, nbytes: int = 100, seconds: float = 1.0) -> StoredPart:
    return stored(origin_of(text, compute_seconds=seconds), Part.SCORES, nbytes)


def candidates(
    catalog: Catalog, nbytes: int = ALL, *, ttl: float | None = None, grace: float = 10.0, limit: int = 10_000
) -> list[EvictionCandidate]:
    return catalog.eviction_order(nbytes, at=NOW, grace_seconds=grace, ttl_seconds=ttl, limit=limit)


def texts(catalog: Catalog, chosen: list[EvictionCandidate]) -> list[str]:
    of = {row.address: row.text for row in catalog.rows()}
    return [of[candidate.address] for candidate in chosen]


def test_the_fewest_seconds_per_byte_go_first_until_there_is_enough_room(catalog: Catalog) -> None:
    record(catalog, scores("dear", seconds=3.0), scores("cheap", seconds=1.0), scores("big", nbytes=1000, seconds=5.0))
    assert texts(catalog, candidates(catalog)) == ["big", "cheap", "dear"]
    assert texts(catalog, candidates(catalog, 1)) == ["big"]
    assert texts(catalog, candidates(catalog, 1000)) == ["big"]
    assert texts(catalog, candidates(catalog, 1001)) == ["big", "cheap"]


def test_a_candidate_says_what_it_is_and_why(catalog: Catalog) -> None:
    part = scores("text", nbytes=7, seconds=0.25)
    record(catalog, part)
    assert candidates(catalog) == [EvictionCandidate(part.address, Part.SCORES, 7, 0.25, NOW - DAY, "value")]
    assert candidates(catalog, ttl=DAY / 2) == [
        EvictionCandidate(part.address, Part.SCORES, 7, 0.25, NOW - DAY, "expired")
    ]


def test_a_day_without_use_halves_what_a_part_is_worth(catalog: Catalog) -> None:
    record(catalog, scores("new", seconds=1.01), at=NOW - DAY)
    record(catalog, scores("old", seconds=1.0), at=NOW - DAY)
    record(catalog, scores("older", seconds=1.49), at=NOW - 2 * DAY)
    assert texts(catalog, candidates(catalog)) == ["older", "old", "new"]
    catalog.touch({row.address: 1 for row in catalog.rows() if row.text == "older"}, at=NOW - DAY)
    assert texts(catalog, candidates(catalog)) == ["old", "new", "older"]


def test_the_order_is_that_of_the_formula(catalog: Catalog) -> None:
    chance = random.Random(0)
    worth: dict[tuple[Address, Part], float] = {}
    for number in range(200):
        origin = origin_of(str(number), compute_seconds=chance.random())
        part, nbytes, age = chance.choice(list(Part)), chance.randrange(1, 10_000), chance.random() * 30 * DAY + 60
        record(catalog, stored(origin, part, nbytes), at=NOW - age)
        worth[origin.address, part] = origin.compute_seconds / nbytes / (1 + age / DAY)
    found = [(candidate.address, candidate.part) for candidate in candidates(catalog)]
    assert found == sorted(worth, key=worth.__getitem__)
    assert [candidate[:2] for candidate in candidates(catalog, limit=50)] == found[:50]


def test_what_may_follow_goes_after_all_else_of_its_segment_however_large_it_is(catalog: Catalog) -> None:
    sizes = {Part.SCORES: 300, Part.LOGITS: 200, Part.KV: 4_000, Part.CONTINUATIONS: 50_000}
    record(catalog, *(stored(origin_of("prompt"), part, nbytes) for part, nbytes in sizes.items()))
    assert [(candidate.part, candidate.nbytes) for candidate in candidates(catalog)] == [
        (Part.KV, 4_000), (Part.SCORES, 300), (Part.LOGITS, 200), (Part.CONTINUATIONS, 50_000),
    ]  # fmt: skip


def test_what_may_follow_is_worth_as_much_as_the_smallest_part_beside_it(catalog: Catalog) -> None:
    beside = [scores("beside", nbytes=100), stored(origin_of("beside", compute_seconds=1.0), Part.CONTINUATIONS, 900)]
    alone = stored(origin_of("alone", compute_seconds=1.0), Part.CONTINUATIONS, 900)
    record(catalog, alone, *beside, scores("less", nbytes=101), scores("more", nbytes=99))
    assert texts(catalog, candidates(catalog)) == ["alone", "less", "beside", "beside", "more"]


@pytest.mark.parametrize("first", [0, 1, 255])
def test_the_order_is_that_of_the_formula_also_among_thousands(catalog: Catalog, first: int) -> None:
    """Also where those whose addresses begin with some byte are worth the least, or the most."""
    chance = random.Random(0)
    parts = list[StoredPart]()
    for number in range(4_000):
        origin = origin_of(str(number))
        seconds = chance.random() * (0.001 if origin.address[0] == first else 1000.0 if first == 255 else 1.0)
        origin = dataclasses.replace(origin, compute_seconds=seconds)
        parts.append(stored(origin, Part.SCORES, chance.randrange(1, 10_000)))
    record(catalog, *parts)
    worth = {part.address: part.origin.compute_seconds / part.nbytes for part in parts}
    nbytes = {part.address: part.nbytes for part in parts}
    order = sorted(worth, key=worth.__getitem__)
    for limit in (1, 10, 300, 3_999):
        assert [candidate.address for candidate in candidates(catalog, limit=limit)] == order[:limit]
        needed = sum(nbytes[address] for address in order[:limit])
        assert [candidate.address for candidate in candidates(catalog, needed)] == order[:limit]


def test_among_thousands_too_all_that_is_expired_goes_and_what_is_young_goes_last(catalog: Catalog) -> None:
    dear = [scores(f"dear {number}", seconds=99.0) for number in range(600)]
    record(catalog, *dear, at=NOW - 8 * DAY)
    record(catalog, *(scores(f"old {number}", seconds=number) for number in range(600)), at=NOW - 60)
    record(catalog, *(scores(f"young {number}", seconds=0.0) for number in range(600)), at=NOW - 5)
    assert {candidate.address for candidate in candidates(catalog, 1, ttl=7 * DAY)} == {part.address for part in dear}
    assert texts(catalog, candidates(catalog, 600 * 100 + 1, ttl=7 * DAY))[600:] == ["old 0"]
    kinds = [text.split()[0] for text in texts(catalog, candidates(catalog, 1_201 * 100, ttl=7 * DAY))]
    assert (kinds[:600], kinds[600:1_200], kinds[1_200:]) == (["dear"] * 600, ["old"] * 600, ["young"])


def test_what_is_expired_goes_first_and_all_of_it(catalog: Catalog) -> None:
    record(catalog, scores("expired", seconds=99.0), scores("expired too", seconds=99.0), at=NOW - 8 * DAY)
    record(catalog, scores("cheap", seconds=0.0), at=NOW - 6 * DAY)
    found = candidates(catalog, 150, ttl=7 * DAY)
    assert sorted(texts(catalog, found)) == ["expired", "expired too"]
    assert {candidate.reason for candidate in found} == {"expired"}
    assert len(candidates(catalog, 1, ttl=7 * DAY)) == 2
    assert [candidate.reason for candidate in candidates(catalog, 201, ttl=7 * DAY)] == ["expired", "expired", "value"]


def test_without_a_need_only_what_is_expired_goes(catalog: Catalog) -> None:
    record(catalog, scores("expired"), at=NOW - 8 * DAY)
    record(catalog, scores("kept"), at=NOW - 6 * DAY)
    assert texts(catalog, candidates(catalog, 0, ttl=7 * DAY)) == ["expired"]
    assert candidates(catalog, 0) == []


def test_what_was_just_made_or_used_goes_when_nothing_else_is_left(catalog: Catalog) -> None:
    record(catalog, scores("used", seconds=0.0), scores("dear", seconds=9.0), at=NOW - 60)
    record(catalog, scores("made", seconds=0.1), at=NOW - 5)
    catalog.touch({row.address: 1 for row in catalog.rows() if row.text == "used"}, at=NOW - 5)
    assert texts(catalog, candidates(catalog, 100)) == ["dear"]
    assert texts(catalog, candidates(catalog)) == ["dear", "used", "made"]


def test_pinned_ones_never_go(catalog: Catalog) -> None:
    pinned, other = scores("pinned", seconds=0.0), scores("other")
    record(catalog, pinned, other, at=NOW - 90 * DAY)
    catalog.pin([pinned.address])
    assert texts(catalog, candidates(catalog, ttl=DAY)) == ["other"]
    catalog.pin([pinned.address], is_pinned=False)
    assert len(candidates(catalog, ttl=DAY)) == 2


def test_what_a_clock_that_was_set_back_has_left_is_taken_for_new(catalog: Catalog) -> None:
    record(catalog, scores("tomorrow", seconds=0.0), at=NOW + DAY)
    record(catalog, scores("today"), at=NOW - 60)
    assert texts(catalog, candidates(catalog)) == ["today", "tomorrow"]
    assert texts(catalog, candidates(catalog, 0, ttl=1.0)) == ["today"]


def test_parts_without_bytes_or_seconds_are_ranked_too(catalog: Catalog) -> None:
    record(catalog, scores("dear", seconds=1.0), scores("empty", nbytes=0), scores("free", seconds=0.0))
    assert texts(catalog, candidates(catalog)) == ["free", "dear", "empty"]


def test_the_parts_of_a_representation_go_by_themselves(catalog: Catalog) -> None:
    origin = origin_of("text")
    record(catalog, *(stored(origin, part, nbytes) for part, nbytes in zip(OWN_PARTS, (10, 100, 1000), strict=True)))
    assert [candidate.part for candidate in candidates(catalog)] == [Part.KV, Part.LOGITS, Part.SCORES]
    assert [candidate.part for candidate in candidates(catalog, 1001)] == [Part.KV, Part.LOGITS]


class TestKeysAndValues:
    """An ancestor's keys and values go after those of all that follows it."""

    CONTEXT = origin_of("context", compute_seconds=0.0)
    BRANCHES = (origin_of("left", CONTEXT), origin_of("right", CONTEXT))
    QUESTION = origin_of("question", *BRANCHES, compute_seconds=99.0)

    def everything(self) -> list[Origin]:
        return [self.CONTEXT, *self.BRANCHES, self.QUESTION]

    def test_leaves_go_before_their_ancestors(self, catalog: Catalog) -> None:
        record(catalog, *map(stored, self.everything()))
        rounds = []
        while chosen := candidates(catalog):
            rounds.append(sorted(texts(catalog, chosen)))
            catalog.evict([candidate[:2] for candidate in chosen], at=NOW)
        assert rounds == [["question"], ["left", "right"], ["context"]]
        assert catalog.rows() == []

    def test_the_order_of_recording_does_not_matter(self, catalog: Catalog) -> None:
        for origin in reversed(self.everything()):
            record(catalog, stored(origin))
        assert texts(catalog, candidates(catalog)) == ["question"]

    def test_a_part_that_is_stored_again_counts_once(self, catalog: Catalog) -> None:
        for _ in range(2):
            record(catalog, *map(stored, self.everything()))
        catalog.evict([(self.QUESTION.address, Part.KV)] * 2, at=NOW)
        assert sorted(texts(catalog, candidates(catalog))) == ["left", "right"]
        record(catalog, stored(self.QUESTION))
        assert texts(catalog, candidates(catalog)) == ["question"]

    def test_the_other_parts_of_an_ancestor_may_go(self, catalog: Catalog) -> None:
        record(catalog, *map(stored, self.everything()))
        record(catalog, *(stored(origin, Part.SCORES) for origin in self.everything()))
        assert [candidate.part for candidate in candidates(catalog)].count(Part.SCORES) == 4

    def test_only_keys_and_values_need_those_before_them(self, catalog: Catalog) -> None:
        record(catalog, stored(self.CONTEXT), *(stored(branch, Part.SCORES) for branch in self.BRANCHES))
        assert len(candidates(catalog)) == 3

    def test_what_others_compute_does_not_matter(self, catalog: Catalog) -> None:
        other_model = dataclasses.replace(self.BRANCHES[0], weights_id=OTHER_WEIGHTS)
        other_tokenizer = dataclasses.replace(self.BRANCHES[1], tokenizer_id=TokenizerId(b"T" * 32))
        record(catalog, stored(self.CONTEXT), stored(other_model), stored(other_tokenizer))
        assert len(candidates(catalog)) == 3

    def test_a_pinned_descendant_keeps_its_ancestors(self, catalog: Catalog) -> None:
        record(catalog, *map(stored, self.everything()))
        catalog.pin([self.QUESTION.address])
        assert candidates(catalog) == []

    def test_ancestors_are_kept_also_from_expiring(self, catalog: Catalog) -> None:
        record(catalog, stored(self.BRANCHES[0]), at=NOW - DAY)
        record(catalog, stored(self.CONTEXT), stored(self.CONTEXT, Part.SCORES), at=NOW - 90 * DAY)
        assert [candidate.part for candidate in candidates(catalog, 0, ttl=7 * DAY)] == [Part.SCORES]
        catalog.evict([(self.BRANCHES[0].address, Part.KV)], at=NOW)
        assert {candidate.part for candidate in candidates(catalog, 0, ttl=7 * DAY)} == {Part.SCORES, Part.KV}

    def test_computing_a_segment_uses_those_before_it(self, catalog: Catalog) -> None:
        record(catalog, stored(self.CONTEXT), at=NOW - 9 * DAY)
        record(catalog, stored(self.BRANCHES[0], Part.SCORES), at=NOW - DAY)
        assert [row.last_used_at for row in catalog.find(self.CONTEXT.address.hex())] == [None]
        record(catalog, stored(self.BRANCHES[0]), at=NOW - DAY)
        record(catalog, stored(self.BRANCHES[1]), at=NOW - 2 * DAY)
        assert [row.last_used_at for row in catalog.find(self.CONTEXT.address.hex())] == [NOW - DAY]
        assert [row.num_hits for row in catalog.rows()] == [0, 0, 0]

    def test_parallel_branches_of_any_number_are_used_at_once(self, catalog: Catalog) -> None:
        branches = [origin_of(str(number), self.CONTEXT) for number in range(40)]
        record(catalog, stored(self.CONTEXT), *map(stored, branches), at=NOW - 9 * DAY)
        record(catalog, stored(origin_of("question", *branches)), at=NOW)
        used = {row.text: row.last_used_at for row in catalog.rows()}
        assert all(used[branch.text] == NOW for branch in branches)


def test_a_selection_restricts_the_choice(catalog: Catalog) -> None:
    record(catalog, scores("here"), stored(origin_of("there", weights_id=OTHER_WEIGHTS), Part.SCORES))
    found = catalog.eviction_order(ALL, at=NOW, grace_seconds=0.0, selection=Selection(model=OTHER_WEIGHTS.hex()))
    assert texts(catalog, found) == ["there"]


class TestRemovable:
    """What was chosen may have been used, pinned or built on by the time that it is to go."""

    def test_what_was_chosen_may_go(self, catalog: Catalog) -> None:
        origins = [origin_of(str(number)) for number in range(5)]
        record(catalog, *(stored(origin, part) for origin in origins for part in Part))
        chosen = [candidate[:2] for candidate in candidates(catalog)]
        assert len(chosen) == 20
        assert catalog.removable(chosen) == set(chosen)

    def test_not_what_is_unknown_or_gone(self, catalog: Catalog) -> None:
        there, gone = scores("there"), scores("gone")
        record(catalog, there, gone)
        catalog.forget([(gone.address, Part.SCORES)])
        keys = [(address, part) for address in (there.address, gone.address) for part in Part]
        assert catalog.removable(keys) == {(there.address, Part.SCORES)}
        assert catalog.removable([]) == set()

    def test_not_what_is_pinned_by_now(self, catalog: Catalog) -> None:
        pinned, other = scores("pinned"), scores("other")
        record(catalog, pinned, other)
        chosen = [candidate[:2] for candidate in candidates(catalog)]
        catalog.pin([pinned.address])
        assert catalog.removable(chosen) == {(other.address, Part.SCORES)}

    def test_not_keys_and_values_that_others_build_on_by_now(self, catalog: Catalog) -> None:
        context = origin_of("context")
        record(catalog, stored(context), stored(context, Part.SCORES))
        chosen = [candidate[:2] for candidate in candidates(catalog)]
        child = stored(origin_of("child", context))
        record(catalog, child)
        assert catalog.removable([*chosen, (child.address, Part.KV)]) == {
            (context.address, Part.SCORES),
            (child.address, Part.KV),
        }

    def test_more_than_a_statement_takes(self, catalog: Catalog) -> None:
        parts = [scores(str(number)) for number in range(2000)]
        record(catalog, *parts)
        keys = {(part.address, part.part) for part in parts}
        assert catalog.removable(iter(keys)) == keys


def test_choosing_changes_nothing(catalog: Catalog) -> None:
    record(catalog, *map(stored, (origin_of("a"), origin_of("b"))))
    before = catalog.rows()
    assert candidates(catalog) == candidates(catalog)
    assert catalog.rows() == before


def test_when_something_was_evicted_is_remembered(catalog: Catalog) -> None:
    part = scores("text")
    record(catalog, part)
    assert evicted_at(catalog, part.address) is None
    catalog.evict([(part.address, Part.SCORES)], at=5.0)
    assert (catalog.rows(), evicted_at(catalog, part.address)) == ([], 5.0)
    record(catalog, part)
    catalog.evict([(part.address, Part.SCORES)], at=7.0)
    assert evicted_at(catalog, part.address) == 7.0
    catalog.erase([(part.address, Part.SCORES)])
    assert evicted_at(catalog, part.address) is None
    catalog.evict([], at=9.0)
    assert evicted_at(catalog, part.address) is None
