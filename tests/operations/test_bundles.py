"""Bundles: what goes in comes out, bit for bit, in another database."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.catalog.records import ModelRecord, Row, Selection
from backprompt_db.database.database import MEMORY, Database
from backprompt_db.errors import CatalogError, FormatError, PromptError, StoreReadOnly
from backprompt_db.operations.bundles.transfer import export_bundle
from backprompt_db.prompt.ids import Address, WeightsId, namespace_id
from backprompt_db.prompt.representation import Origin, Part
from backprompt_db.store.contract import Blob, Key
from backprompt_db.store.memory import MemoryStore
from tests.support.bundles import (
    IDS,
    REQUESTS,
    SUBJECTS,
    blobs,
    bundle_of,
    chain,
    closed,
    exported,
    files,
    imported,
    index,
    members_of,
    new_parts,
    part_name,
    path_of,
    run_prompts,
    stored,
    tar_of,
)
from tests.support.database_files import copies_after
from tests.support.operations import flip_a_bit, put_blob, verified

original, directory = copies_after(run_prompts)


@pytest.fixture
def filled(directory: Path, make_lm: Callable[..., bp.LanguageModel], open_db: Any) -> bp.LanguageModel:
    """Two subjects with two requests each."""
    return make_lm(db=open_db(directory))


@pytest.fixture
def small() -> Iterator[bp.Database]:
    """A database in memory with a chain of two segments."""
    with bp.open(MEMORY) as db:
        db.put(new_parts(chain("a", "b")))
        db.flush()
        yield db


@pytest.fixture
def empty() -> Iterator[bp.Database]:
    with bp.open(MEMORY) as db:
        yield db


def rows(db: bp.Database, **selection: Any) -> list[Row]:
    assert db.catalog is not None
    return list(db.catalog.select(Selection(**selection)))


def texts(db: bp.Database) -> set[str]:
    return {row.text for row in rows(db)}


class TestAnotherDatabase:
    def test_answers_everything_bit_for_bit_without_a_model_call(
        self, filled: bp.LanguageModel, make_lm: Callable[..., bp.LanguageModel], open_db: Any
    ) -> None:
        db = open_db()
        done = imported(db, exported(filled.db))
        assert (done.num_stored, done.num_known, done.num_orphaned, done.catalog_problem) == (18, 0, 0, None)
        assert stored(db) == stored(filled.db)
        other = make_lm(db=db)
        for subject in SUBJECTS:
            for request in REQUESTS:
                ours, theirs = (each(each.text(subject) + request) for each in (filled, other))
                assert theirs.num_computed_tokens == 0
                assert torch.equal(ours.logits, theirs.logits)
                assert torch.equal(ours.token_logprobs.nan_to_num(), theirs.token_logprobs.nan_to_num())
        assert (db.counters.num_computed_tokens, db.counters.num_stored) == (0, 18)
        assert verified(path_of(other)).is_clean

    def test_goes_on_from_what_came(
        self, filled: bp.LanguageModel, make_lm: Callable[..., bp.LanguageModel], open_db: Any
    ) -> None:
        db = open_db()
        imported(db, exported(filled.db))
        other = make_lm(db=db)
        again = other(other.text(SUBJECTS[0]) + "Request: delete it")
        expected = filled(filled.text(SUBJECTS[0]) + "Request: delete it")
        assert 0 < again.num_computed_tokens == expected.num_computed_tokens < len(expected.input_ids)
        assert torch.allclose(again.logits, expected.logits, atol=1e-4)

    def test_takes_names_labels_and_pins_but_no_verdict(self, filled: bp.LanguageModel, open_db: Any) -> None:
        assert filled.db.catalog is not None
        addresses = [row.address for row in rows(filled.db, text_prefix=SUBJECTS[0] + REQUESTS[0])]
        filled.db.catalog.label(addresses, "mine")
        filled.db.catalog.pin(addresses)
        db = open_db()
        imported(db, exported(filled.db))
        assert [row.address for row in rows(db, label="mine")] == addresses
        assert [row.address for row in rows(db) if row.is_pinned] == addresses
        [ours], [theirs] = filled.db.catalog.models(), db.catalog.models()
        assert ours.verdict == "packs"
        assert theirs == ModelRecord(
            ours.weights_id, ours.name, ours.architecture, ours.dtype, ours.num_layers, ours.num_kv_heads,
            ours.head_dim, ours.vocab_size, ours.max_positions, "unchecked", None, None, None, None,
        )  # fmt: skip
        [tokenizer] = filled.db.catalog.tokenizers()
        assert db.catalog.tokenizers() == [dataclasses.replace(tokenizer, definition=None)]

    def test_keeps_its_own_labels_names_and_verdicts(
        self, filled: bp.LanguageModel, make_lm: Callable[..., bp.LanguageModel], open_db: Any
    ) -> None:
        other = make_lm(db=open_db())
        run_prompts(other)
        other.db.flush()
        assert filled.db.catalog is not None
        assert other.db.catalog is not None
        filled.db.catalog.label([row.address for row in rows(filled.db)], "theirs")
        mine = rows(other.db)[0].address
        other.db.catalog.label([mine], "mine")
        models = other.db.catalog.models()
        done = imported(other.db, exported(filled.db))
        assert (done.num_stored, done.num_known) == (0, 18)
        assert other.db.catalog.models() == models
        assert {row.address: row.label for row in rows(other.db)} == {
            row.address: "mine" if row.address == mine else "theirs" for row in rows(filled.db)
        }

    def test_of_another_fidelity_refuses_and_says_what_to_do(self, small: bp.Database, open_db: Any) -> None:
        for fidelity in ("bfloat16", "int8"):
            db = open_db(fidelity=fidelity)
            with pytest.raises(FormatError, match=r"exact, the database .*\. Import it into .*fidelity='exact'"):
                imported(db, exported(small))
            with pytest.raises(FormatError, match=rf"keeps keys and values {fidelity}, the database exact"):
                imported(small, exported(db))

    @pytest.mark.parametrize("fidelity", ["bfloat16", "int8"])
    def test_of_the_same_fidelity_takes_them(self, fidelity: str) -> None:
        with bp.open(MEMORY, fidelity=fidelity) as ours, bp.open(MEMORY, fidelity=fidelity) as theirs:
            ours.put(new_parts(chain("a", "b")))
            assert imported(theirs, exported(ours)).num_stored == 6
            assert stored(theirs) == stored(ours)

    def test_that_may_only_be_read_takes_nothing(self, small: bp.Database) -> None:
        db = Database(MemoryStore(), directory=None, readonly=True)
        with pytest.raises(StoreReadOnly):
            imported(db, exported(small))

    def test_has_the_parts_when_its_catalog_cannot_be_used(self, small: bp.Database, open_db: Any) -> None:
        db = open_db()
        (db.directory / "catalog.sqlite").write_bytes(b"no catalog" * 1000)
        done = imported(db, exported(small))
        assert done.num_stored == 6
        assert "catalog" in done.catalog_problem

    def test_takes_a_bundle_twice_as_once(self, small: bp.Database, empty: bp.Database) -> None:
        bundle = exported(small)
        assert imported(empty, bundle).num_stored == 6
        again = imported(empty, bundle)
        assert (again.num_stored, again.num_known, again.num_orphaned) == (0, 6, 0)
        assert stored(empty) == stored(small)


class TestWhatIsSelected:
    def test_is_a_subtree_with_what_it_follows(self, filled: bp.LanguageModel, open_db: Any) -> None:
        db = open_db()
        imported(db, exported(filled.db, selection=Selection(text_prefix=SUBJECTS[0] + "Request: list")))
        assert texts(db) == {SUBJECTS[0], REQUESTS[0]}

    def test_by_label_goes_with_what_it_follows(
        self, filled: bp.LanguageModel, make_lm: Callable[..., bp.LanguageModel], open_db: Any
    ) -> None:
        assert filled.db.catalog is not None
        leaf = rows(filled.db, text_prefix=SUBJECTS[1] + REQUESTS[1])
        filled.db.catalog.label([row.address for row in leaf], "one")
        db = open_db()
        imported(db, exported(filled.db, selection=Selection(label="one")))
        assert texts(db) == {SUBJECTS[1], REQUESTS[1]}
        other = make_lm(db=db)
        assert other(other.text(SUBJECTS[1]) + REQUESTS[1]).num_computed_tokens == 0

    def test_by_model_namespace_and_age(self, open_db: Any) -> None:
        db, root = open_db(), namespace_id("tenant")
        assert root is not None
        theirs = [replace(each, namespace="tenant") for each in chain("theirs", "more", parents=[root])]
        other = replace(chain("other model")[0], weights_id=WeightsId(b"v" * 32))
        db.put(new_parts([*chain("ours"), *theirs, other]))
        db.flush()

        def selected(**selection: Any) -> set[str]:
            target = open_db()
            imported(target, exported(db, selection=Selection(**selection)))
            assert verified(target.directory).is_clean
            return texts(target)

        assert selected(namespace="tenant") == {"theirs", "more"}
        assert selected(namespace="", model="77" * 4) == {"ours"}
        assert selected(model="76" * 32) == {"other model"}
        assert selected(used_before=2**40, text_prefix="theirsm") == {"theirs", "more"}

    def test_nothing_is_an_error_before_anything_is_written(self, filled: bp.LanguageModel) -> None:
        stream = io.BytesIO()
        with pytest.raises(PromptError, match="nothing is selected"):
            export_bundle(filled.db, stream, selection=Selection(label="none"))
        assert stream.getvalue() == b""

    def test_needs_a_catalog_but_everything_does_not(self, filled: bp.LanguageModel, open_db: Any) -> None:
        directory = path_of(filled)
        filled.db.close()
        (directory / "catalog.sqlite").write_bytes(b"no catalog" * 1000)
        db = open_db(directory)
        with pytest.raises(CatalogError):
            exported(db, selection=Selection(label="x"))
        stream, target = io.BytesIO(), open_db()
        assert export_bundle(db, stream).catalog_problem is not None
        assert imported(target, stream.getvalue()).num_stored == 18

    def test_includes_what_is_still_queued(self) -> None:
        with bp.open(MEMORY) as db, bp.open(MEMORY) as target:
            db.put(new_parts(chain("a")))
            assert imported(target, exported(db)).num_stored == 3

    def test_leaves_out_keys_and_values_that_nobody_could_use(self, empty: bp.Database) -> None:
        a, b, c = chain("a", "b", "c")
        with bp.open(MEMORY) as db:
            db.put(new_parts([a, b, c]))
            db.flush()
            db.store.delete([Key(a.address, Part.KV)])
            stream = io.BytesIO()
            done = export_bundle(db, stream)
        assert (done.num_representations, done.num_parts, done.num_orphaned) == (3, 6, 2)
        imported(empty, stream.getvalue())
        assert {key.part for key in stored(empty)} == {Part.SCORES, Part.LOGITS}

    def test_leaves_out_what_is_damaged_or_misplaced(self, filled: bp.LanguageModel, open_db: Any) -> None:
        directory, keys = path_of(filled), sorted(stored(filled.db), key=lambda key: key.part.value)
        filled.db.close()
        flip_a_bit(directory, keys[-1])  # scores
        put_blob(directory, Key(Address(b"x" * 32), Part.LOGITS), blobs(chain("a"))[1][1])
        db, target, stream = open_db(directory), open_db(), io.BytesIO()
        done = export_bundle(db, stream)
        assert (done.num_parts, done.num_unusable) == (17, 2)
        assert imported(target, stream.getvalue()).num_stored == 17

    def test_an_empty_database_makes_an_empty_bundle(self, empty: bp.Database) -> None:
        assert [name for name, _ in members_of(exported(empty))] == ["bundle.json", "end.json"]
        assert imported(empty, exported(empty)).num_stored == 0


class TestTheFormat:
    def test_is_a_tar_file_of_plain_files_that_safetensors_reads(self, filled: bp.LanguageModel) -> None:
        members = members_of(exported(filled.db))
        assert [name for name, _ in members[:2]] == ["bundle.json", "index-000001.jsonl"]
        assert json.loads(members[0][1]).keys() == {"format", "fidelity", "created_at"}
        contents = dict(members)
        for key, blob in stored(filled.db).items():
            assert contents[part_name(key)] == blob
            assert safetensors.numpy.load(blob)
        assert len(members) == 3 + 18

    def test_is_what_the_documentation_says(self, small: bp.Database) -> None:
        members, names = members_of(exported(small)), {part_name(key): key for key in stored(small)}
        found = [(names[name], blob) for name, blob in members[2:-1]]
        assert members == closed([members[0], index(found), *files(found)])

    def test_made_by_hand_is_read(self, small: bp.Database, empty: bp.Database) -> None:
        assert imported(empty, tar_of(bundle_of(blobs(chain("a", "b"))))).num_stored == 6
        assert stored(empty) == stored(small)

    def test_has_parents_before_children(self, small: bp.Database) -> None:
        a, b = chain("a", "b")
        names = [name for name, _ in members_of(exported(small))]
        assert names.index(part_name(Key(a.address, Part.KV))) < names.index(part_name(Key(b.address, Part.KV)))

    def test_deep_prompts_need_no_recursion(self, empty: bp.Database) -> None:
        deep = chain(*map(str, range(1100)))
        with bp.open(MEMORY) as db:
            db.put(new_parts(deep, [Part.KV]))
            assert imported(empty, exported(db)).num_stored == 1100


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[Origin, set[Part]]]:
    """Segments that follow each other in any way, each after its parents, with some of their parts."""
    found: list[tuple[Origin, set[Part]]] = []
    for number in range(draw(st.integers(0, 6))):
        known = [origin.segment_id for origin, _ in found]
        parents = draw(st.sets(st.sampled_from(known), max_size=2)) if known else set()
        start, num_tokens = draw(st.none() | st.integers(0, 9)), draw(st.integers(0, 3))
        origin = Origin(f"text {number}", tuple(sorted(parents)), start, *IDS, num_tokens, 0.5)
        found.append((origin, draw(st.sets(st.sampled_from(Part)))))
    return found


@given(graphs())
def test_any_database_comes_out_as_it_went_in_but_for_what_nobody_could_use(
    graph: list[tuple[Origin, set[Part]]],
) -> None:
    with_kv = set[bytes]()
    for origin, parts in graph:
        if Part.KV in parts and with_kv.issuperset(origin.parents):
            with_kv.add(origin.segment_id)
    whole = dict(each for origin, parts in graph for each in blobs([origin], parts))
    usable = {
        key: blob
        for origin, parts in graph
        for key, blob in blobs([origin], parts)
        if key.part is not Part.KV or origin.segment_id in with_kv
    }
    with bp.open(MEMORY) as db, bp.open(MEMORY) as target:
        db.store.put([Blob(*each) for each in whole.items()])
        stream = io.BytesIO()
        done = export_bundle(db, stream)
        assert (done.num_parts, done.num_orphaned) == (len(usable), len(whole) - len(usable))
        arrivals = imported(target, stream.getvalue())
        assert (arrivals.num_stored, arrivals.num_orphaned, arrivals.num_known) == (len(usable), 0, 0)
        assert stored(target) == usable
