"""A database with a secret believes nobody who does not know it, and is opened by nobody else."""

from __future__ import annotations

import contextlib
import io
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import backprompt_db as bp
from backprompt_db.catalog.records import GreedyPath
from backprompt_db.codec.blob import encode
from backprompt_db.database.manifest import FILE_VARIABLE, VARIABLE, secret_id
from backprompt_db.errors import FormatError, UnsafeLocation
from backprompt_db.operations.bundles.transfer import export_bundle, import_bundle, merge
from backprompt_db.operations.doctor import diagnose
from backprompt_db.operations.doctor_checks import Status
from backprompt_db.operations.verify import verify
from backprompt_db.prompt.ids import Address, WeightsId
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Blob, Key
from backprompt_db.store.lmdb import LmdbStore
from backprompt_db.store.records import Digest, keyed_blake3, xxh3_128
from tests.conftest import tiny_gpt2
from tests.support.databases import address, expected, new_part, values, wanted
from tests.support.operations import back_door

SECRET, OTHER = "a secret of sixteen bytes or more", "another secret of sixteen bytes"
LARGE = 600_000
"""Values of a part that takes several chunks."""


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, SECRET)


@pytest.fixture
def place(tmp_path: Path, secret: None) -> Path:
    """A database with the secret, and a small and a large part."""
    with bp.open(tmp_path / "db") as db:
        db.put([new_part("small"), new_part("large", num_values=LARGE)])
    return tmp_path / "db"


def snapshot(place: Path) -> dict[str, bytes]:
    """All bytes, but those of the lock that readers take too."""
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file() and path.name != "lock.mdb"}


def forge(place: Path, text: str, digest: Digest, *, num_values: int = 8) -> None:
    """Put another value in the place of a stored one, as one who may write the files."""
    part = new_part(text, num_values=num_values)
    bad = {"logits": new_part("a lie", num_values=num_values).arrays["logits"]}
    with contextlib.closing(LmdbStore(place / "store", digest=digest)) as store:
        store.delete([part.key])
        assert store.put([Blob(part.key, encode(Part.LOGITS, bad, part.origin))]) == [part.key]


class TestParts:
    def test_are_found_again_with_the_secret(self, place: Path) -> None:
        with bp.open(place, memory_nbytes=0) as db:
            assert values(db.fetch(wanted("small"))) == expected("small")
            assert values(db.fetch(wanted("large"))) == expected("large", num_values=LARGE)
            assert (db.counters.num_disk_hits, db.counters.num_quarantined) == (2, 0)
            assert verify(db).is_clean

    @pytest.mark.parametrize("digest", [xxh3_128, keyed_blake3(OTHER.encode())], ids=["no secret", "another secret"])
    @pytest.mark.parametrize(("text", "num_values"), [("small", 8), ("large", LARGE)])
    def test_of_one_who_does_not_know_the_secret_are_misses_and_counted(
        self, place: Path, text: str, num_values: int, digest: Digest
    ) -> None:
        forge(place, text, digest, num_values=num_values)
        with bp.open(place, memory_nbytes=0) as db:
            assert db.fetch(wanted(text)) == {}
            assert (db.counters.num_quarantined, db.counters.num_misses) == (1, 1)
            db.put([new_part(text, num_values=num_values)])
            db.flush()
            assert values(db.fetch(wanted(text))) == expected(text, num_values=num_values)
            assert db.counters.num_quarantined == 1

    def test_of_one_who_knows_it_are_believed(self, place: Path) -> None:
        forge(place, "small", keyed_blake3(SECRET.encode()))
        with bp.open(place) as db:
            assert values(db.fetch(wanted("small"))) == {address("small"): expected("a lie")[address("a lie")]}

    def test_under_another_address_are_misses(self, place: Path) -> None:
        key, other = (Key(address(text), Part.LOGITS) for text in ("small", "elsewhere"))
        with back_door(place) as transaction:
            record = transaction.get(key.address + key.part.value + bytes(4))
            transaction.put(other.address + other.part.value + bytes(4), record)
        with bp.open(place) as db:
            assert db.fetch(wanted("elsewhere")) == {}
            assert db.counters.num_quarantined == 1

    def test_digests_need_the_secret_and_depend_on_every_byte(self) -> None:
        digest = keyed_blake3(SECRET.encode())
        assert digest(b"ab", b"c") == digest(b"abc") != digest(b"abd")
        assert len({each(b"abc") for each in (digest, keyed_blake3(OTHER.encode()), xxh3_128)}) == 3


class TestOpening:
    def test_the_manifest_tells_secrets_apart_and_does_not_tell_the_secret(self, place: Path) -> None:
        manifest = json.loads((place / "manifest.json").read_text())
        assert (manifest["digest"], manifest["secret_id"]) == ("blake3-keyed", secret_id(SECRET.encode()))
        assert all(SECRET.encode() not in content for content in snapshot(place).values())

    @pytest.mark.parametrize(
        ("variables", "error", "message"),
        [
            ({}, FormatError, r"made with a secret, and none is set.*Set or unset \$BACKPROMPT_DB_SECRET"),
            ({VARIABLE: OTHER}, FormatError, r"made with another secret than is set"),
            (
                {VARIABLE: "short"},
                FormatError,
                r"the secret in \$BACKPROMPT_DB_SECRET has 5 bytes, 16 are needed.*rand",
            ),
            ({FILE_VARIABLE: "{tmp}/short"}, FormatError, r"\$BACKPROMPT_DB_SECRET_FILE has 5 bytes, 16 are needed"),
            ({FILE_VARIABLE: "{tmp}/other"}, FormatError, r"made with another secret than is set"),
            ({FILE_VARIABLE: "{tmp}/missing"}, FormatError, r"missing, cannot be read: No such file.*Correct"),
            ({FILE_VARIABLE: "{tmp}"}, FormatError, r"cannot be read: Is a directory"),
            ({FILE_VARIABLE: "{tmp}/empty"}, FormatError, r"\$BACKPROMPT_DB_SECRET_FILE has 0 bytes, 16 are needed"),
            ({FILE_VARIABLE: "{db}/secret"}, UnsafeLocation, r"is inside the database.*Keep it elsewhere"),
            ({FILE_VARIABLE: "{tmp}/link"}, UnsafeLocation, r"is inside the database"),
        ],
    )
    def test_without_its_own_secret_it_is_not_opened_and_nothing_is_touched(
        self,
        place: Path,
        monkeypatch: pytest.MonkeyPatch,
        variables: dict[str, str],
        error: type[Exception],
        message: str,
    ) -> None:
        (place.parent / "short").write_text("short")
        (place.parent / "other").write_text(OTHER)
        (place.parent / "empty").touch()
        (place / "secret").write_text(SECRET)
        (place.parent / "link").symlink_to(place / "secret")
        before = snapshot(place)
        with monkeypatch.context() as patch:
            patch.delenv(VARIABLE)
            for name, value in variables.items():
                patch.setenv(name, value.format(tmp=place.parent, db=place))
            for mode in ("a", "r"):
                with pytest.raises(error, match=message):
                    bp.open(place, mode=mode)
            with pytest.raises(error, match=message):
                bp.open(place.parent / "mine", base=place)
            [check] = [check for check in diagnose(place) if check.name == "secret"]
            assert (check.status, check.what, check.remedy) == (Status.PROBLEM, *_said(error, place))
        assert snapshot(place) == before
        assert not (place.parent / "mine").exists()
        with bp.open(place) as db:
            assert values(db.fetch(wanted("small"))) == expected("small")

    def test_the_secret_may_come_from_a_file_with_white_space_around_it(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (place.parent / "file").write_text(f"\n{SECRET} \n")
        monkeypatch.delenv(VARIABLE)
        monkeypatch.setenv(FILE_VARIABLE, str(place.parent / "file"))
        with bp.open(place) as db:
            assert values(db.fetch(wanted("small"))) == expected("small")
        [check] = [check for check in diagnose(place) if check.name == "secret"]
        assert (check.status, check.what) == (Status.OK, "Digests are keyed with a secret.")

    def test_a_database_without_a_secret_is_refused_while_one_is_set(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with bp.open(tmp_path / "db") as db:
            db.put([new_part("a")])
        before = snapshot(tmp_path / "db")
        monkeypatch.setenv(VARIABLE, SECRET)
        with pytest.raises(FormatError, match="without a secret, and one is set: whoever may write there could have"):
            bp.open(tmp_path / "db")
        [check] = [check for check in diagnose(tmp_path / "db") if check.name == "secret"]
        assert check.status is Status.PROBLEM
        assert "made without a secret, and one is set" in check.what
        assert snapshot(tmp_path / "db") == before

    @pytest.mark.parametrize("variable", [VARIABLE, FILE_VARIABLE])
    def test_no_database_is_made_with_a_secret_that_is_too_short(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
    ) -> None:
        (tmp_path / "file").write_text("short")
        monkeypatch.setenv(variable, {VARIABLE: "short", FILE_VARIABLE: str(tmp_path / "file")}[variable])
        with pytest.raises(FormatError, match="16 are needed"):
            bp.open(tmp_path / "db")
        monkeypatch.delenv(variable)
        with bp.open(tmp_path / "db") as db:
            assert not db.readonly


def _said(error: type[Exception], place: Path) -> tuple[str, str]:
    """What opening says."""
    with pytest.raises(error) as caught:
        bp.open(place)
    said: Any = caught.value
    return f"{said.message}.", said.hint


@contextlib.contextmanager
def catalog_of(place: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(place / "catalog.sqlite")) as connection, connection:
        yield connection


MakeLM = Callable[..., bp.LanguageModel]


@pytest.fixture(params=["without a secret", "with a secret"])
def any_secret(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither needs to be known to edit a row; both show that somebody has."""
    if request.param == "with a secret":
        monkeypatch.setenv(VARIABLE, SECRET)


@pytest.mark.usefixtures("any_secret")
class TestNotes:
    """What the catalog says of models, their files and long strings."""

    def test_a_forged_verdict_is_ignored_and_the_model_proves_itself_again(
        self, tmp_path: Path, make_lm: MakeLM
    ) -> None:
        with bp.open(tmp_path / "db") as db:
            make_lm(db=db)("The quick brown fox")
        refuse(tmp_path / "db")
        with bp.open(tmp_path / "db") as db:
            lm = make_lm(tiny_gpt2(), db=db)
            assert lm("The quick brown fox jumps").num_computed_tokens > 0
            assert db.catalog is not None
            assert db.catalog.models()[0].verdict == "packs"

    @pytest.mark.parametrize(
        "forgery",
        [
            "UPDATE sources SET signature = NULL",
            "UPDATE sources SET signature = zeroblob(16)",
            "UPDATE sources SET weights_id = randomblob(32)",
        ],
    )
    def test_where_the_ids_of_files_are_forged_the_model_is_loaded(
        self, tmp_path: Path, tokenizer: Any, forgery: str
    ) -> None:
        save_model(tmp_path / "model", tokenizer)
        with bp.open(tmp_path / "db") as db:
            right = bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db).weights_id
            assert not bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db).is_loaded
        with catalog_of(tmp_path / "db") as connection:
            assert connection.execute("SELECT length(signature) FROM sources").fetchall() == [(16,)]
            connection.execute("PRAGMA foreign_keys = OFF")
            connection.execute(forgery)
        with bp.open(tmp_path / "db") as db:
            lm = bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db)
            assert (lm.is_loaded, lm.weights_id) == (True, right)
            assert not bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db).is_loaded, "it is signed again"

    def test_forged_cuts_are_ignored(self, tmp_path: Path, make_lm: MakeLM) -> None:
        string = "The quick brown fox jumps over the lazy dog, and the dog does not mind."
        with bp.open(tmp_path / "db") as db:
            right = pieces_of(make_lm(db=db).text(string, split=4))
        with catalog_of(tmp_path / "db") as connection:
            assert connection.execute("UPDATE cuts SET offsets = '[1, 2, 3]'").rowcount == 1
        with bp.open(tmp_path / "db") as db:
            assert pieces_of(make_lm(db=db).text(string, split=4)) == right
            assert len(right) > 3

    def test_forged_greedy_paths_are_ignored(self, tmp_path: Path) -> None:
        right = GreedyPath(Address(b"r" * 32), (1, 2))
        with bp.open(tmp_path / "db") as db:
            db.model_metadata.save(right, GreedyPath(Address(b"f" * 32), (1, 2)))
        with catalog_of(tmp_path / "db") as connection:
            forged = connection.execute("UPDATE greedy_paths SET token_ids = '[1, 3]' WHERE address = ?", (b"f" * 32,))
            assert forged.rowcount == 1
        with bp.open(tmp_path / "db") as db:
            assert db.model_metadata.greedy_paths([right.address, Address(b"f" * 32)]) == {right.address: (1, 2)}

    def test_what_is_said_of_tokenizers_has_no_signature(self, tmp_path: Path, make_lm: MakeLM) -> None:
        with bp.open(tmp_path / "db") as db:
            make_lm(db=db)("The quick brown fox")
            assert db.catalog is not None
            [tokenizer] = db.catalog.tokenizers()
            assert (tokenizer.vocab_size > 0, hasattr(tokenizer, "signature")) == (True, False)
            assert db.catalog.models()[0].signature is not None

    def test_over_a_base_in_memory_forged_notes_of_the_base_are_ignored(self, tmp_path: Path, make_lm: MakeLM) -> None:
        with bp.open(tmp_path / "db") as db:
            make_lm(db=db)("The quick brown fox")
        refuse(tmp_path / "db")
        with bp.open(":memory:", base=tmp_path / "db") as db:
            assert make_lm(tiny_gpt2(), db=db)("The quick brown fox jumps").num_computed_tokens > 0


def refuse(place: Path) -> None:
    """Let the catalog say that the model cannot be used."""
    with catalog_of(place) as connection:
        assert connection.execute("UPDATE models SET verdict = 'refused', reason = 'forged'").rowcount == 1


def save_model(place: Path, tokenizer: Any) -> None:
    tiny_gpt2().save_pretrained(place)
    tokenizer.save_pretrained(place)


def pieces_of(text: bp.Text) -> list[str]:
    return [segment.string for segment in text.segments()]


class TestTransfer:
    """Between databases with and without secrets, or with different ones, values go as bundles."""

    @pytest.mark.parametrize("here", ["", OTHER])
    def test_a_bundle_is_stored_with_the_secret_of_where_it_goes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_lm: MakeLM, here: str
    ) -> None:
        monkeypatch.setenv(VARIABLE, here)
        with bp.open(tmp_path / "theirs") as db:
            right = make_lm(db=db)("The quick brown fox")
            export_bundle(db, stream := io.BytesIO())
        monkeypatch.setenv(VARIABLE, SECRET)
        with bp.open(tmp_path / "ours") as db:
            stream.seek(0)
            assert import_bundle(db, stream).num_stored == 3
            assert verify(db).is_clean
            assert db.catalog is not None
            [model] = db.catalog.models()
            assert (model.verdict, model.signature) == ("unchecked", None)
            found = make_lm(db=db)("The quick brown fox")
            assert found.num_computed_tokens == 0
            assert torch.equal(found.logits, right.logits)
            assert WeightsId(model.weights_id) == make_lm(db=db).weights_id

    def test_a_database_with_the_same_secret_is_merged(self, place: Path) -> None:
        with bp.open(place.parent / "other") as db:
            assert merge(db, place).num_stored == 2
            assert values(db.fetch(wanted("small"))) == expected("small")
            assert verify(db).is_clean

    @pytest.mark.parametrize("theirs", ["", OTHER])
    def test_a_database_with_another_secret_or_none_is_not_merged(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str
    ) -> None:
        monkeypatch.setenv(VARIABLE, theirs)
        with bp.open(tmp_path / "theirs") as db:
            db.put([new_part("a")])
        before = snapshot(tmp_path / "theirs")
        monkeypatch.setenv(VARIABLE, SECRET)
        with bp.open(tmp_path / "ours") as db:
            with pytest.raises(FormatError, match="secret"):
                merge(db, tmp_path / "theirs")
            assert list(db.store.keys()) == []
        assert snapshot(tmp_path / "theirs") == before
