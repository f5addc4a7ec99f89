"""What may follow a segment is carried, listed, verified and removed like every other part, and grows everywhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.catalog.records import Selection
from backprompt_db.codec.blob import encode
from backprompt_db.database.opening import open_existing
from backprompt_db.database.writer import NewPart
from backprompt_db.errors import FormatError
from backprompt_db.operations.bundles.transfer import export_bundle, import_bundle, merge
from backprompt_db.operations.inspection import Kind
from backprompt_db.operations.purge import purge
from backprompt_db.operations.reindex import reindex
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.representation import Part
from backprompt_db.store import records
from backprompt_db.store.contract import Key
from tests.support import blobs
from tests.support.bundles import bundle_of, exported, imported, new_parts, stored, tar_of
from tests.support.bundles import chain as prompt
from tests.support.cli import run_json
from tests.support.operations import catalog_of, put_blob, remove_blob, stored_keys, totals, verified

CONTEXT, LAST = prompt("A context.", " A request.")
TREE = Key(LAST.address, Part.CONTINUATIONS)


def continuations(num_tokens: int) -> NewPart:
    return NewPart(TREE, blobs.chain(range(num_tokens)), LAST)


def made(place: Path, num_tokens: int) -> Path:
    """A closed database of a prompt of two segments, and of so many tokens that may follow."""
    with bp.open(place) as db:
        db.put(new_parts([CONTEXT, LAST]))
        db.put_later(continuations(num_tokens))
    return place


def num_known(db: bp.Database) -> int:
    return db.fetch({TREE.address: [TREE.part]})[TREE]["parents"].shape[0]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return made(tmp_path / "db", 50)


def test_it_is_listed_and_counted(directory: Path) -> None:
    size = totals(directory).nbytes[Part.CONTINUATIONS]
    assert size > 50 * 12
    assert run_json("stats", "--db", directory)["nbytes"]["continuations"] == size
    [row] = [row for row in run_json("ls", "--db", directory) if row["address"] == TREE.address.hex()]
    assert row["nbytes"]["continuations"] == size
    [shown] = run_json("show", TREE.address.hex(), "--db", directory)
    assert [part["part"] for part in shown["parts"]] == ["scores", "logits", "kv", "continuations"]
    assert verified(directory).is_clean


def test_a_reindexing_finds_it(directory: Path) -> None:
    before = totals(directory)
    catalog_of(directory).unlink()
    with open_existing(directory) as db:
        assert reindex(db).num_added == 7
    assert totals(directory).nbytes == before.nbytes


def test_the_catalog_has_its_size_after_it_has_grown(directory: Path) -> None:
    with bp.open(directory) as db:
        before = totals(directory).nbytes[Part.CONTINUATIONS]
        assert num_known(db) == 50
        db.put_later(continuations(80))
        db.flush()
        assert num_known(db) == 80
        assert totals(directory).nbytes[Part.CONTINUATIONS] == before + 30 * 12 == db.store.size(TREE)
    assert verified(directory).is_clean


def test_a_bundle_carries_it_and_the_larger_one_wins(directory: Path, tmp_path: Path) -> None:
    with bp.open(directory) as db:
        bundle = exported(db)
    for name, num_tokens, expected, num_stored in [("less", 20, 50, 1), ("same", 50, 50, 0), ("more", 90, 90, 0)]:
        with bp.open(made(tmp_path / name, num_tokens)) as db:
            assert num_known(db) == num_tokens
            assert imported(db, bundle).num_stored == num_stored
            assert num_known(db) == expected
        assert verified(tmp_path / name).is_clean


def test_merging_takes_over_what_has_grown(directory: Path, tmp_path: Path) -> None:
    for name, num_tokens, expected, num_stored in [("less", 20, 50, 1), ("more", 90, 90, 0)]:
        with bp.open(made(tmp_path / name, num_tokens)) as db:
            assert merge(db, directory).num_stored == num_stored
            assert num_known(db) == expected
        assert verified(tmp_path / name).is_clean


def test_it_leaves_without_the_segment_itself_too(directory: Path) -> None:
    for part in (Part.SCORES, Part.LOGITS, Part.KV):
        remove_blob(directory, Key(LAST.address, part))
    stream = io.BytesIO()
    with bp.open(directory) as db:
        export_bundle(db, stream)
    with bp.open(":memory:") as db:
        import_bundle(db, io.BytesIO(stream.getvalue()))
        assert {key.part for key in stored(db) if key.address == TREE.address} == {Part.CONTINUATIONS}


def test_what_is_no_tree_is_refused_in_a_bundle() -> None:
    arrays = blobs.tree([5, 6], [-1, 0], [-1.0, -1.0])
    good = encode(Part.CONTINUATIONS, arrays, LAST)
    bad = good.replace(bytes(arrays["parents"].data), b"\xff\xff\xff\xff\x01\x00\x00\x00")
    assert bad != good
    with bp.open(":memory:") as db:
        with pytest.raises(FormatError, match="does not come after the one before it"):
            imported(db, tar_of(bundle_of([(TREE, bad)])))
        assert stored(db) == {}
        assert imported(db, tar_of(bundle_of([(TREE, good)]))).num_stored == 1


def test_what_is_no_tree_is_found_and_removed(directory: Path) -> None:
    remove_blob(directory, TREE)
    arrays = blobs.tree([5, 6], [-1, 0], [-1.0, -1.0])
    bad = encode(Part.CONTINUATIONS, arrays, LAST).replace(bytes(arrays["input_ids"].data), b"\xff" * 8)
    put_blob(directory, TREE, bad)
    [problem] = verified(directory).problems
    assert (problem.address, problem.part, problem.kind) == (*TREE, Kind.MALFORMED)
    assert TREE not in stored_keys(directory)


def test_a_purge_leaves_nothing_of_it(directory: Path) -> None:
    with bp.open(directory) as db:
        assert num_known(db) == 50
        assert purge(db, Selection(text_contains="request")).num_parts == 4
        assert db.fetch({TREE.address: [TREE.part]}) == {}
    assert {key.address for key in stored_keys(directory)} == {CONTEXT.address}
    assert totals(directory).nbytes[Part.CONTINUATIONS] == 0


def test_an_earlier_version_leaves_it_where_it_is(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as earlier:
        earlier.delitem(records._PARTS, TREE.part.value)
        with open_existing(directory) as db:
            found = verify(db)
            db.store.compact()
        assert {problem.kind for problem in found.problems} == {Kind.FOREIGN}
        assert found.num_parts == 6
    assert verified(directory).is_clean
