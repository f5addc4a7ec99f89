"""A run of the library on any version of Python, without torch and without pytest: `python tests/package/smoke.py`.

`make smoke` runs it on every version that can be found. It prints nothing and ends with 0 when all is well.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import backprompt_db as bp
from backprompt_db.database.database import Database
from backprompt_db.database.writer import NewPart
from backprompt_db.prompt.ids import Address, SegmentId, TokenizerId, WeightsId, address, segment_id
from backprompt_db.prompt.representation import OWN_PARTS, Array, Arrays, Origin, Part
from backprompt_db.prompt.segments import Segment
from backprompt_db.store.contract import Key

VECTORS = Path(__file__).parents[1] / "data" / "golden_keys.json"
WEIGHTS, TOKENIZER = WeightsId(b"w" * 32), TokenizerId(b"t" * 32)


def check_ids() -> None:
    """Ids are those of the golden vectors, and those of a graph follow from its parts."""
    golden: dict[str, list[dict[str, Any]]] = json.loads(VECTORS.read_text(encoding="ascii"))
    for vector in golden["segments"]:
        parents = [SegmentId(bytes.fromhex(parent)) for parent in vector["parents"]]
        string = vector["string"] * int(vector.get("times", 1))
        assert segment_id(string, parents=parents, start=vector["start"]).hex() == vector["segment_id"], vector["about"]
    context, left, right, end = prompt().segments()
    assert context.id == segment_id("Pick the endpoint.\n")
    assert {left.parents, right.parents} == {(context,)}
    assert end.parent_ids == tuple(sorted({left.id, right.id}))


def prompt() -> bp.Text:
    """A context, two branches, and what follows both."""
    return bp.Text("Pick the endpoint.\n") + bp.parallel("One. ", "Zwei \N{EN DASH} δύο. ") + "Which?"


def address_of(segment: Segment) -> Address:
    """The address of a segment under the model that the parts claim to be from."""
    return address(segment.id, WEIGHTS, TOKENIZER)


def parts_of(segment: Segment) -> dict[Part, Arrays]:
    """Parts of which every value follows from the segment's id."""
    dice = np.random.default_rng(list(segment.id))
    num_tokens = len(segment.string)
    numbers = {name: dice.normal(size=(2, 2, num_tokens, 4)).astype(np.float32) for name in ("keys", "values")}
    scores = {
        "input_ids": Array.from_numpy(np.arange(num_tokens, dtype=np.int32)),
        "token_logprobs": Array.from_numpy(-dice.random(num_tokens, dtype=np.float32)),
    }
    logits = {"logits": Array.from_numpy(dice.random(32, dtype=np.float32))}
    kv = {name: Array.from_numpy(array) for name, array in numbers.items()}
    return {Part.SCORES: scores, Part.LOGITS: logits, Part.KV: kv}


def put(db: Database) -> None:
    """Store all parts of the prompt."""
    for segment in prompt().segments():
        origin = Origin(
            text=segment.string,
            parents=segment.parent_ids,
            start=segment.start,
            weights_id=WEIGHTS,
            tokenizer_id=TOKENIZER,
            num_tokens=len(segment.string),
            compute_seconds=0.5,
        )
        db.put([NewPart(Key(address_of(segment), part), arrays, origin) for part, arrays in parts_of(segment).items()])
    db.flush()


def check_parts(db: Database) -> None:
    """All parts are there as they were put."""
    segments = prompt().segments()
    found = db.fetch({address_of(segment): OWN_PARTS for segment in segments})
    for segment in segments:
        for part, arrays in parts_of(segment).items():
            for name, array in arrays.items():
                assert np.array_equal(found[Key(address_of(segment), part)][name].numpy(), array.numpy())
    assert (db.counters.num_hits, db.counters.num_misses) == (len(segments), 0)


def command(*words: str) -> str:
    """What a command prints. Every warning is an error there too."""
    line = [sys.executable, "-W", "error", "-m", "backprompt_db", *words]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


def check_directory(directory: Path) -> None:
    """A database on disk is written, read, opened again, and looked at from the command line."""
    with bp.open(directory) as db:
        put(db)
        check_parts(db)
    with bp.open(directory, mode="r") as db:
        check_parts(db)
    stats = json.loads(command("stats", "--json", "--db", str(directory)))
    assert stats["num_representations"] == len(prompt().segments()), stats
    assert "Which?" in command("ls", "--db", str(directory))
    command("verify", "--db", str(directory))


def check_memory() -> None:
    """A database in memory is written and read."""
    with bp.open(":memory:") as db:
        put(db)
        check_parts(db)


def main() -> None:
    """Check everything."""
    check_ids()
    check_memory()
    with tempfile.TemporaryDirectory() as directory:
        check_directory(Path(directory) / "db")
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
