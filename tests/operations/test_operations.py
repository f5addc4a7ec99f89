"""Statistics, verifying and describing, on databases that real runs have made and tests have damaged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import backprompt_db as bp
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import Totals
from backprompt_db.database.opening import manifest_of, open_catalog, open_existing, open_store
from backprompt_db.database.reconcile import Reindexing
from backprompt_db.errors import UnsafeLocation
from backprompt_db.operations.describe import describe
from backprompt_db.operations.inspection import Inspection, Kind
from backprompt_db.operations.stats import gather, sums, sums_by_model
from backprompt_db.operations.verify import Verification, verify
from backprompt_db.prompt.representation import OWN_PARTS, Part
from backprompt_db.store.contract import Key
from backprompt_db.store.lmdb import LmdbStore
from tests.support.database_files import copies_after
from tests.support.operations import (
    FOREIGN,
    catalog_of,
    flip_a_bit,
    put_blob,
    read_blob,
    reindexed,
    remove_blob,
    remove_row,
    run_prompts,
    stored_keys,
    totals,
    verified,
)

original, directory = copies_after(run_prompts)


def kinds(found: Verification) -> list[Kind]:
    return [problem.kind for problem in found.problems]


class TestStats:
    def test_the_sums_are_those_of_the_catalog(self, directory: Path) -> None:
        expected = totals(directory)
        found = sums(catalog_of(directory))
        assert {name: getattr(found, name) for name in Totals.__slots__} == {
            name: getattr(expected, name) for name in Totals.__slots__
        }
        assert expected.num_representations == 4
        assert expected.num_hits > 0
        [by_model] = sums_by_model(catalog_of(directory)).values()
        assert by_model.num_representations == expected.num_representations
        assert by_model.nbytes == expected.nbytes

    def test_everything_is_known_with_a_catalog(self, directory: Path) -> None:
        found = gather(directory)
        assert found.catalog_problem is None
        assert (found.num_segments, found.num_models, found.format, found.fidelity) == (4, 1, 1, "exact")
        assert found.file_nbytes > sum(found.nbytes.values()) > 0
        assert found.created_at == manifest_of(directory).created_at

    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"garbage" * 999), Path.touch])
    def test_without_a_usable_catalog_the_store_is_counted(
        self, directory: Path, damage: Callable[[Path], object]
    ) -> None:
        with_catalog = gather(directory)
        if damage is Path.touch:
            catalog_of(directory).unlink()
        damage(catalog_of(directory))
        found = gather(directory)
        assert found.catalog_problem is not None
        assert found.num_representations == with_catalog.num_representations
        assert found.nbytes == with_catalog.nbytes
        assert found.num_tokens is found.num_hits is found.saved_seconds is found.num_models is None

    def test_a_database_that_was_never_used_is_empty(self, db: bp.Database) -> None:
        assert db.directory is not None
        db.close()
        found = gather(db.directory)
        assert (found.num_representations, sum(found.nbytes.values())) == (0, 0)

    def test_it_answers_while_the_database_is_open_for_writing(self, lm: bp.LanguageModel) -> None:
        lm("Request: create an order")
        lm.db.flush()
        assert lm.db.directory is not None
        assert gather(lm.db.directory).num_representations == 1

    @pytest.mark.parametrize("ask", [gather, open_existing, open_store, open_catalog])
    def test_nothing_is_made_where_there_is_no_database(
        self, tmp_path: Path, ask: Callable[[Path], bp.Stats | bp.Database | LmdbStore | Catalog]
    ) -> None:
        with pytest.raises(UnsafeLocation, match="there is no database"):
            ask(tmp_path / "nothing")
        assert not (tmp_path / "nothing").exists()


class TestVerify:
    def test_an_undamaged_database_is_clean(self, directory: Path) -> None:
        found = verified(directory)
        assert found.is_clean
        assert found.num_parts == len(stored_keys(directory)) == 12
        assert found.nbytes == sum(gather(directory).nbytes.values())

    def test_a_flipped_bit_is_found_and_the_part_removed(self, directory: Path) -> None:
        key = stored_keys(directory)[4]
        flip_a_bit(directory, key)
        [problem] = verified(directory).problems
        assert (problem.address, problem.part, problem.kind) == (*key, Kind.DAMAGED)
        assert key not in stored_keys(directory)

    def test_after_reindexing_a_removed_part_is_no_problem_any_more(self, directory: Path) -> None:
        flip_a_bit(directory, stored_keys(directory)[0])
        assert kinds(verified(directory)) == [Kind.DAMAGED]
        assert kinds(verified(directory)) == [Kind.MISSING]
        assert reindexed(directory) == Reindexing(0, 1, 0, None)
        assert verified(directory).is_clean

    def test_a_blob_under_a_foreign_address_is_found_and_removed(self, directory: Path) -> None:
        key = stored_keys(directory)[0]
        put_blob(directory, Key(FOREIGN, key.part), read_blob(directory, key))
        [problem] = verified(directory).problems
        assert (problem.address, problem.kind) == (FOREIGN, Kind.MISPLACED)
        assert key.address.hex() in problem.detail
        assert verified(directory).is_clean

    def test_a_blob_under_another_part_is_misplaced(self, directory: Path) -> None:
        scores = next(key for key in stored_keys(directory) if key.part is Part.SCORES)
        blob = read_blob(directory, scores)
        remove_blob(directory, Key(scores.address, Part.KV))
        put_blob(directory, Key(scores.address, Part.KV), blob)
        assert kinds(verified(directory)) == [Kind.MISPLACED]

    def test_bytes_that_are_no_part_are_malformed_and_removed(self, directory: Path) -> None:
        put_blob(directory, Key(FOREIGN, Part.KV), b"not a safetensors blob")
        assert kinds(verified(directory)) == [Kind.MALFORMED]
        assert Key(FOREIGN, Part.KV) not in stored_keys(directory)

    def test_a_part_of_a_newer_version_is_reported_and_kept(self, directory: Path) -> None:
        key = stored_keys(directory)[0]
        blob = read_blob(directory, key).replace(b'\\"format\\":1', b'\\"format\\":9')
        remove_blob(directory, key)
        put_blob(directory, key, blob)
        assert kinds(verified(directory)) == [Kind.TOO_NEW]
        assert key in stored_keys(directory)

    def test_a_row_without_a_blob_is_found(self, directory: Path) -> None:
        key = stored_keys(directory)[5]
        remove_blob(directory, key)
        [problem] = verified(directory).problems
        assert (problem.address, problem.part, problem.kind) == (*key, Kind.MISSING)

    def test_a_blob_without_a_row_is_found(self, directory: Path) -> None:
        key = stored_keys(directory)[7]
        remove_row(directory, key)
        [problem] = verified(directory).problems
        assert (problem.address, problem.part, problem.kind) == (*key, Kind.UNRECORDED)

    def test_the_store_is_read_even_if_the_catalog_is_garbage(self, directory: Path) -> None:
        flip_a_bit(directory, stored_keys(directory)[0])
        catalog_of(directory).write_bytes(b"garbage" * 999)
        found = verified(directory)
        assert kinds(found) == [Kind.DAMAGED]
        assert found.catalog_problem is not None
        assert found.num_parts == 12

    def test_a_missing_catalog_is_a_problem_and_is_not_made(self, directory: Path) -> None:
        catalog_of(directory).unlink()
        found = verified(directory)
        assert "missing" in (found.catalog_problem or "")
        assert not catalog_of(directory).exists()

    def test_progress_sees_every_part(self, directory: Path) -> None:
        seen = list[Inspection]()

        def watch(inspections: Iterator[Inspection]) -> Iterator[Inspection]:
            for inspection in inspections:
                seen.append(inspection)
                yield inspection

        with open_existing(directory) as db:
            verify(db, progress=watch)
        assert [inspection.key for inspection in seen] == stored_keys(directory)

    def test_a_database_in_memory_has_no_catalog_to_disagree_with(
        self, make_lm: Callable[..., bp.LanguageModel]
    ) -> None:
        with bp.open(":memory:") as db:
            make_lm(db=db)("Request: create an order")
            db.flush()
            assert verify(db) == Verification(3, db.counters.num_stored_nbytes, (), None)


class TestDescribe:
    def test_a_representation_is_described_from_catalog_and_store(self, directory: Path) -> None:
        with open_catalog(directory) as catalog, contextlib.closing(open_store(directory)) as store:
            context = next(row for row in catalog.rows() if row.text.startswith("Pick"))
            [found] = describe(store, catalog, context.address.hex())
            [child, *_] = describe(store, catalog, found.children[0].hex())
        assert len(found.children) == 3
        assert found.parents == ()
        assert child.parents == (context.segment_id,)
        assert [part.part for part in found.parts] == list(OWN_PARTS)
        assert [array.name for array in found.parts[2].arrays] == ["keys", "values"]
        assert len(found.tokens) == context.num_tokens
        assert np.isnan(found.tokens[0].logprob)
        assert found.tokens[1].logprob < 0
        assert "torch" in found.versions

    def test_missing_and_damaged_parts_are_told_apart_and_nothing_is_removed(self, directory: Path) -> None:
        address = stored_keys(directory)[0].address
        flip_a_bit(directory, Key(address, Part.KV))
        remove_blob(directory, Key(address, Part.SCORES))
        with open_catalog(directory) as catalog, contextlib.closing(open_store(directory)) as store:
            [found] = describe(store, catalog, address.hex())
        problems = {part.part: (part.problem or "").split(":")[0] for part in found.parts}
        assert problems == {Part.SCORES: "missing", Part.LOGITS: "", Part.KV: "damaged"}
        assert found.tokens == ()
        assert Key(address, Part.KV) in stored_keys(directory)
