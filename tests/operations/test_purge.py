"""Purging leaves nothing of a text in any file, whatever the catalog knew, and nothing else goes."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

import backprompt_db as bp
from backprompt_db.catalog.records import GreedyPath, Selection
from backprompt_db.cli.app import app
from backprompt_db.database.database import Database
from backprompt_db.database.writer import NewPart
from backprompt_db.errors import PromptError
from backprompt_db.operations.purge import Purged, doomed, purge
from backprompt_db.prompt.ids import TokenizerId, WeightsId
from backprompt_db.prompt.representation import Origin, Part
from backprompt_db.prompt.text import Text
from backprompt_db.store.contract import Key
from tests.support.databases import logits
from tests.support.single_flight import addresses_of

JANE = Selection(text_contains="Jane Doe")
A, B = WeightsId(b"A" * 32), WeightsId(b"B" * 32)


def put(db: Database, text: Text, *, weights: WeightsId = A) -> list[Key]:
    """Store the logits of all segments of a text, and return their keys."""
    origins = [
        Origin(segment.string, segment.parent_ids, None, weights, TokenizerId(b"t" * 32), 1, 0.5, "")
        for segment in text.segments()
    ]
    parts = [NewPart(Key(each.address, Part.LOGITS), {"logits": logits(each.text)}, each) for each in origins]
    db.put(parts)
    db.flush()
    return [part.key for part in parts]


def stored(db: Database) -> set[Key]:
    return {key for key, _ in db.store.keys()}


def files_with(directory: Path, text: bytes) -> list[str]:
    return [path.name for path in directory.rglob("*") if path.is_file() and text in path.read_bytes()]


def test_nothing_of_a_text_and_of_what_follows_it_stays_in_any_file(tmp_path: Path) -> None:
    with bp.open(tmp_path / "db") as db:
        put(db, Text("Jane Doe asks.") + " A secret answer." + " And thanks.")
        kept = put(db, Text("Somebody else."))
        assert files_with(tmp_path, b"secret answer")
        assert purge(db, JANE) == Purged(num_representations=3, num_parts=3)
        assert stored(db) == set(kept)
    assert not files_with(tmp_path, b"Jane Doe")
    assert not files_with(tmp_path, b"secret answer")


def test_how_a_model_went_on_after_a_text_goes_with_it(tmp_path: Path) -> None:
    with bp.open(tmp_path / "db") as db:
        (gone,), (kept,) = put(db, Text("Jane Doe asks.")), put(db, Text("Somebody else."))
        db.model_metadata.save(GreedyPath(gone.address, (1, 2)), GreedyPath(kept.address, (3,)))
        purge(db, JANE)
        assert db.model_metadata.greedy_paths([gone.address, kept.address]) == {kept.address: (3,)}


def test_prompts_forget_that_they_go_on_with_what_is_purged(tmp_path: Path) -> None:
    with bp.open(tmp_path / "db") as db:
        asked, *_ = put(db, Text("Who asks?") + " It is" + " Jane Doe.")
        db.model_metadata.save(GreedyPath(asked.address, (32001, 32002, 32003)))
        purge(db, JANE)
        assert db.model_metadata.greedy_paths([asked.address]) == {}
    assert not files_with(tmp_path, b"32002")


def test_prompts_forget_the_tokens_that_may_follow_with_what_is_purged(
    tmp_path: Path, make_lm: Callable[..., bp.LanguageModel]
) -> None:
    """Also how strings of completions are encoded, which says what they are."""
    with bp.open(tmp_path / "db") as db:
        lm = make_lm(db=db)
        lm.best("Who asks?", [" Jane Doe.", " Nobody.", " The quick brown fox."], k=3)
        db.flush()
        prompt = Key(addresses_of(lm, lm.text("Who asks?"))[0], Part.CONTINUATIONS)
        assert db.has(prompt)
        purge(db, Selection(text_prefix="Who asks? Jane"))
        assert not db.has(prompt)
        assert db.catalog is not None
        assert Part.CONTINUATIONS not in next(iter(db.catalog.select(Selection(text_contains="Who asks")))).nbytes
    with closing(sqlite3.connect(tmp_path / "db" / "catalog.sqlite")) as file:
        assert file.execute("SELECT count(*) FROM encodings").fetchone() == (0,)


def test_what_the_catalog_does_not_list_is_purged_too(tmp_path: Path) -> None:
    with bp.open(tmp_path / "db") as db:
        put(db, Text("Jane Doe asks."))
    (tmp_path / "db" / "catalog.sqlite").unlink()
    with bp.open(tmp_path / "db") as db:
        assert purge(db, JANE).num_parts == 1
        assert not stored(db)
    assert not files_with(tmp_path, b"Jane Doe")


def test_what_is_stored_while_somebody_is_asked_goes_too(tmp_path: Path) -> None:
    with bp.open(tmp_path / "db") as db:
        put(db, Text("Jane Doe asks."))
        assert len(doomed(db, JANE)) == 1
        put(db, Text("Jane Doe asks.") + " A late answer.")
        assert purge(db, JANE).num_representations == 2
        assert not stored(db)


def test_what_is_stored_again_meanwhile_stays_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bp.open(tmp_path / "db") as db:
        keys = put(db, Text("Jane Doe asks."))
        compact = db.store.compact
        monkeypatch.setattr(db.store, "compact", lambda: (compact(), put(db, Text("Jane Doe asks."))))
        purge(db, JANE)
        assert db.catalog is not None
        assert stored(db) == set(itertools.starmap(Key, db.catalog.keys())) == set(keys)


def test_what_another_model_has_of_it_stays_with_what_follows(tmp_path: Path) -> None:
    text = Text("Jane Doe asks.") + " An answer."
    with bp.open(tmp_path / "db") as db:
        first, _ = put(db, text, weights=A)
        kept = put(db, text, weights=B)
        purge(db, Selection(address_prefix=first.address.hex()))
        assert stored(db) == set(kept)


@pytest.mark.parametrize("selection", [Selection(), Selection(text_prefix=""), Selection(text_contains="")])
def test_nothing_is_purged_where_nothing_is_said(tmp_path: Path, selection: Selection) -> None:
    with bp.open(tmp_path / "db") as db:
        keys = put(db, Text("Jane Doe asks."))
        with pytest.raises(PromptError, match="nothing says what to purge"):
            purge(db, selection)
        assert stored(db) == set(keys)


def test_the_command_asks_before_it_removes(tmp_path: Path) -> None:
    with bp.open(tmp_path / "db") as db:
        keys = put(db, Text("Jane Doe asks.") + " An answer.")
        arguments = ["purge", "--db", str(tmp_path / "db"), "--contains", "Jane Doe"]
        refused = CliRunner().invoke(app, arguments, input="n\n")
        assert refused.exit_code == 1
        assert "Remove 2 representations for good?" in refused.stderr
        assert stored(db) == set(keys)
        assert CliRunner().invoke(app, arguments, input="y\n").exit_code == 0
        assert not stored(db)
