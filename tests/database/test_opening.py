"""Where a database can be, and what its manifest must say."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import platformdirs
import pytest

import backprompt_db as bp
from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.database import opening
from backprompt_db.database.database import Database
from backprompt_db.database.manifest import Manifest, read_manifest, write_manifest
from backprompt_db.errors import BackpromptError, FormatError, FormatTooNew, PromptError, UnsafeLocation
from backprompt_db.system.locks import file_lock
from tests.support.databases import expected, new_part, values, wanted

Open = Callable[..., Database]


def test_the_default_place_is_that_of_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKPROMPT_DB", str(tmp_path / "here"))
    with bp.open() as db:
        assert db.directory == tmp_path / "here"
    assert (tmp_path / "here" / "manifest.json").exists()


@pytest.mark.parametrize("variable", [None, ""])
def test_the_default_place_is_the_users_cache(
    variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BACKPROMPT_DB", raising=False)
    if variable is not None:
        monkeypatch.setenv("BACKPROMPT_DB", variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert opening.default_location() == Path(platformdirs.user_cache_dir("backprompt-db", appauthor=False))
    with bp.open() as db:
        assert db.directory == opening.default_location()


@pytest.mark.parametrize("name", ["with space", "quo'te\"", "per%cent?#", b"\xff\xfe".decode(errors="surrogateescape")])
def test_any_name_of_a_directory_will_do(name: str, tmp_path: Path) -> None:
    for _ in range(2):
        with bp.open(tmp_path / name / "deeper") as db:
            db.put([new_part("a")])
            db.flush()
            assert db.counters.num_write_failures == 0
            assert values(db.fetch(wanted("a"))) == expected("a")
            assert db.catalog is not None


def test_everything_in_the_directory_is_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with bp.open(tmp_path / "db") as db:
            db.put([new_part("a")])
            db.flush()
    finally:
        os.umask(old)
    for path in [tmp_path / "db", *(tmp_path / "db").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_file_is_no_place_for_a_database(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UnsafeLocation):
            bp.open(place)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["location", "base"])
def test_an_empty_string_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafeLocation, match="an empty string is no directory"):
        bp.open(**{"location": ":memory:"} | {name: ""})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UnsafeLocation, match="not a backprompt-db database"):
        bp.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


_WRONG_DIGESTS: list[object] = ["blake3", 7, None, []]
_WRONG_SECRET_IDS: list[object] = [7, []]

MANIFEST = {
    "format": 1, "fidelity": "exact", "digest": "xxh3-128", "lmdb": {"generation": 0, "chunk_nbytes": (1 << 20) - 16}
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "error"),
    [
        *[(text, FormatError) for text in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format": "1"}')],
        *[(json.dumps(MANIFEST | {"format": each}).encode(), FormatError) for each in (0, -1, True, 1.5, None)],
        (json.dumps(MANIFEST | {"lmdb": {}}).encode(), FormatError),
        (json.dumps(MANIFEST | {"lmdb": None}).encode(), FormatError),
        (json.dumps(MANIFEST | {"format": 2}).encode(), FormatTooNew),
        (json.dumps({"format": 99}).encode(), FormatTooNew),
        *[
            (b'{"format": 1, "fidelity": %s}' % each, FormatTooNew)
            for each in (b'"int4"', b'"EXACT"', b"null", b"8", b"[]")
        ],
        *[(json.dumps(MANIFEST | {"digest": each}).encode(), FormatTooNew) for each in _WRONG_DIGESTS],
        *[(json.dumps(MANIFEST | {"secret_id": each}).encode(), FormatError) for each in _WRONG_SECRET_IDS],
        (json.dumps(MANIFEST | {"format": 2, "lmdb": 7}).encode(), FormatTooNew),
        (json.dumps(MANIFEST | {"lmdb": {"generation": True, "chunk_nbytes": 1.5}}).encode(), FormatError),
        (json.dumps(MANIFEST | {"lmdb": {"generation": 1, "chunk_nbytes": (1 << 20) - 16}}).encode(), FormatTooNew),
    ],
)
def test_a_manifest_that_cannot_be_followed_is_refused(
    open_db: Open, tmp_path: Path, content: bytes, error: type[BackpromptError]
) -> None:
    open_db(tmp_path / "db").close()
    (tmp_path / "db" / "manifest.json").write_bytes(content)
    with pytest.raises(error) as caught:
        bp.open(tmp_path / "db")
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 0}, "it names no format"),
        ({"created_at": "\ud800"}, "a string in it has a lone surrogate"),
        ({"fidelity": "int4"}, "uses fidelity 'int4' and digest 'xxh3-128'"),
        ({"lmdb": {"generation": 1, "chunk_nbytes": 7}}, "LMDB's generation 1 with chunks of 7 bytes"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said_in_words(tmp_path: Path, change: dict[str, object], words: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | change))
    with pytest.raises(FormatError, match=words):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(FormatError, match="it names no format"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_manifest_is_read_in_any_encoding_that_an_editor_gives_it(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST), encoding=encoding)
    found = read_manifest(tmp_path)
    assert found is not None
    assert found.digest == "xxh3-128"


@pytest.mark.parametrize("fidelity", Fidelity)
def test_a_manifest_says_how_keys_and_values_are_kept(tmp_path: Path, fidelity: Fidelity) -> None:
    write_manifest(tmp_path, Manifest(fidelity=fidelity))
    assert json.loads((tmp_path / "manifest.json").read_text())["fidelity"] == fidelity.value
    found = read_manifest(tmp_path)
    assert found is not None
    assert found.fidelity is fidelity


def test_a_manifest_that_does_not_say_how_they_are_kept_means_exactly(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(
        json.dumps({name: MANIFEST[name] for name in MANIFEST if name != "fidelity"})
    )
    found = read_manifest(tmp_path)
    assert found is not None
    assert found.fidelity is Fidelity.EXACT


def test_a_manifest_with_more_fields_is_read(open_db: Open, tmp_path: Path) -> None:
    open_db(tmp_path / "db").close()
    (tmp_path / "db" / "manifest.json").write_text(json.dumps(MANIFEST | {"mood": "sunny"}))
    assert open_db(tmp_path / "db").directory == tmp_path / "db"


@pytest.mark.parametrize("name", ["manifest.lock", "catalog.sqlite.lock"])
def test_a_lock_keeps_out_an_older_version_and_is_kept_out_by_it(tmp_path: Path, name: str) -> None:
    """Older versions made a database, and upgraded its catalog, under locks of filelock."""
    older = filelock.FileLock(tmp_path / name, timeout=0)
    with older, pytest.raises(TimeoutError), file_lock(tmp_path / name, timeout_seconds=0):
        pass
    with file_lock(tmp_path / name), pytest.raises(filelock.Timeout), older:
        pass
    with (
        file_lock(tmp_path / name),
        pytest.raises(TimeoutError),
        file_lock(tmp_path / name, is_alone=False, timeout_seconds=0.01),
    ):
        pass
    with file_lock(tmp_path / name, is_alone=False), file_lock(tmp_path / name, is_alone=False, timeout_seconds=0):
        pass


def test_a_manifest_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UnsafeLocation):
        bp.open(tmp_path)


@pytest.mark.parametrize("namespace", [5, None, b"a"])
def test_a_namespace_that_is_no_string_is_refused(namespace: Any, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"namespace=.* is not a name"):
        bp.open(tmp_path / "db", namespace=namespace)
    assert not (tmp_path / "db").exists()
