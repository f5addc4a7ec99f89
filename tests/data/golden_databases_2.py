"""How `golden_databases_2.tar.gz` and `golden_databases_2.json` were made, by the code of commit 4e044e1.

In a checkout of that commit, with the environment that its `make test` sets up:

    PYTHONPATH=. .venv/bin/python golden_databases_2.py OUT

Four databases: exact, bfloat16 and int8, and an exact one with a secret, of a tiny GPT-2; each with representations,
hits, a pin, labels, a cut, a greedy path, a description of the tokenizer, an eviction and an event. And a bundle of
what has a label. The JSON file holds the digest of every blob, every row of every catalog, and what is in the bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

from backprompt_db.keys import address
from backprompt_db.maintenance.existing import open_store

import backprompt_db as bp
from backprompt_db.catalog.records import Event, GreedyPath
from tests.conftest import tiny_gpt2, train_tokenizer

SECRET = "a secret of more than sixteen bytes"  # noqa: S105 - of a database that everybody may read
CONTEXT = "Pick the endpoint.\n"


def command(*words: object) -> Any:
    line = [sys.executable, "-m", "backprompt_db", *map(str, words), "--json"]
    return json.loads(subprocess.run(line, capture_output=True, check=True).stdout)


def fill(directory: Path, fidelity: str) -> None:
    with bp.open(directory, fidelity=fidelity) as db:
        lm = bp.LanguageModel(tiny_gpt2(), train_tokenizer(), db=db, progress=False)
        context = lm.text(CONTEXT)
        for _ in range(2):
            lm(context + "GET /users")
            db.flush()
        lm.text("The quick brown fox jumps", split=2)
        lm(context + "to be evicted")
        lm.pin(context, label="golden")
        lm.seams(context + "GET")
        if fidelity == "exact" and "secret" not in directory.name:
            lm(context + bp.parallel("One. ", "Zwei. ") + "Which?")
            lm(context + lm.text("At 64.", start=64))
            lm.score(context, [" POST"])
            lm.generate(context, max_new_tokens=3, do_sample=False)
        tip = (context + "GET /users").tips()[0]
        ids = lm.weights_id, lm.tokenizer_id
        assert db.catalog is not None
        db.catalog.log([Event(1.5, "quarantine", address(context.tips()[0].id, *ids), "for this test")])
        db.notes.save(GreedyPath(address(tip.id, *ids), (7, 300, 1)))
    if fidelity == "exact" and "secret" not in directory.name:
        with bp.open(directory, namespace="tenant") as db:
            bp.LanguageModel(tiny_gpt2(), train_tokenizer(), db=db, progress=False)("In a tenant.")
    command("label", "users", "--contains", "GET /users", "--db", directory)
    command("evict", "--contains", "to be evicted", "--db", directory)
    command("compact", "--db", directory)
    command("config", "--max-size", "2GB", "--ttl", "3650d", "--db", directory)


def blobs(directory: Path) -> dict[str, tuple[int, str]]:
    with closing(open_store(directory)) as store:
        found = {key: store.get(key) for key, _ in store.keys()}
    return {
        f"{key.address.hex()}.{key.part.name.lower()}": (blob.nbytes, hashlib.sha256(blob).hexdigest())
        for key, blob in found.items()
        if blob is not None
    }


def rows(catalog: Path) -> dict[str, list[list[object]]]:
    """Every row of every table, in the order of the columns."""
    with closing(sqlite3.connect(catalog)) as file:
        names = [name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        return {
            name: sorted(([hexed(value) for value in row] for row in file.execute(f"SELECT * FROM {name}")), key=repr)  # noqa: S608
            for name in names
        }


def hexed(value: object) -> object:
    """Bytes as hex digits, long ones as those of their digest."""
    if not isinstance(value, bytes):
        return value
    return value.hex() if len(value) <= 64 else hashlib.sha256(value).hexdigest()


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return None if member.name.endswith((".lock", "lock.mdb")) else member


def main(out: Path) -> None:
    expected: dict[str, Any] = {}
    for name, fidelity in (("exact", "exact"), ("bfloat16", "bfloat16"), ("int8", "int8"), ("secret", "exact")):
        if name == "secret":
            os.environ["BACKPROMPT_DB_SECRET"] = SECRET
        directory = out / name
        fill(directory, fidelity)
        listed = command("ls", "--limit", 100, "--sort", "newest", "--db", directory)
        expected[name] = {"blobs": blobs(directory), "rows": rows(directory / "catalog.sqlite"), "ls": listed}
        if name == "exact":
            bundle = command("export", out / "users.bundle", "--label", "users", "--db", directory)
            with tarfile.open(out / "users.bundle") as archive:
                listing = [(member.name, member.size) for member in archive]
            expected["bundle"] = {"report": bundle, "listing": listing}
    with tarfile.open(out / "golden_databases_2.tar.gz", "w:gz") as archive:
        for name in ("exact", "bfloat16", "int8", "secret", "users.bundle"):
            archive.add(out / name, name, filter=anonymous)
    (out / "golden_databases_2.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
