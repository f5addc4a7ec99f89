"""`docs/formats.md` is enough to read what the library writes: a reader that knows nothing else does."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import backprompt_db as bp
from backprompt_db.database.config import Config
from backprompt_db.database.lineage import origin_of
from backprompt_db.database.manifest import Manifest
from backprompt_db.database.writer import NewPart
from backprompt_db.prompt.ids import Address, SegmentId, TokenizerId, WeightsId, address, namespace_id, segment_id
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from tests.conftest import VOCAB_SIZE, cases
from tests.support import independent_reader
from tests.support.blobs import tree
from tests.support.cli import run
from tests.support.independent_reader import StoredPart, Unreadable, read_bundle, read_database, values

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
KEY_TEXT = "sixteen bytes or more"
MANY_TOKENS = "A prompt is built by plain concatenation. " * 30


class Written(NamedTuple):
    """A database that was written and closed, and how."""

    directory: Path
    lm: Callable[[], bp.LanguageModel]
    namespace: str
    secret: bytes | None


CONTINUATIONS = ([5, 6, 5], [-1, 0, 0], [-0.25, -1.5, -3.0])


@pytest.fixture(scope="module")
def model() -> Any:
    """A model with 8 KiB of keys and values for each token, so that a long text has several chunks."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_positions=512, n_embd=256, n_layer=4, n_head=4)).eval()


@pytest.fixture(
    params=cases(["exact", "bfloat16", "int8", "secret", "namespace"], by_default={"exact", "int8", "secret"})
)
def written(
    request: pytest.FixtureRequest, tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Written]:
    fidelity = request.param if request.param in ("bfloat16", "int8") else "exact"
    namespace = "tenant-7" if request.param == "namespace" else ""
    secret = KEY_TEXT.encode() if request.param == "secret" else None
    if secret is not None:
        monkeypatch.setenv("BACKPROMPT_DB_SECRET", KEY_TEXT)
    opened: list[bp.Database] = []

    def lm() -> bp.LanguageModel:
        opened.append(bp.open(tmp_path / "db", fidelity=fidelity, namespace=namespace))
        return bp.LanguageModel(model, tokenizer, db=opened[-1])

    first = lm()
    first(prompts(first), keep="all")
    first.score("Yes or no?", [" Yes.", " No."])
    first.db.flush()
    add_continuations(
        first.db, address(prompts(first)[0].segments(namespace)[-1].id, first.weights_id, first.tokenizer_id)
    )
    first.db.close()
    yield Written(tmp_path / "db", lm, namespace, secret)
    for db in opened:
        db.close()


def prompts(lm: bp.LanguageModel) -> list[bp.Text]:
    """Chains, branches, an explicit start, and characters of every width."""
    context = lm.text("Pick the endpoint.\n")
    return [
        context + "Request: list users" + "\nEndpoint:",
        context + bp.parallel("Document one. ", "Document two. ") + "Which?",
        context + lm.text("At a fixed place.", start=64),
        lm.text(MANY_TOKENS) + "é 漢 🙂",
    ]


def add_continuations(db: bp.Database, where: Address) -> None:
    """Store what may follow a segment."""
    origin = origin_of(db.store, where)
    assert origin is not None
    db.put_later(NewPart(Key(where, Part.CONTINUATIONS), tree(*CONTINUATIONS), origin))


def joined(parts: Sequence[StoredPart], name: str, *, axis: int) -> np.ndarray[Any, Any]:
    return np.concatenate([values(part, name) for part in parts], axis=axis)


def test_the_reader_finds_what_the_library_returns(written: Written) -> None:
    stored = {(part.address, part.name): part for part in read_database(written.directory, secret=written.secret)}
    lm = written.lm()
    for prompt in prompts(lm):
        segments = prompt.segments(written.namespace)
        names = [address(segment.id, lm.weights_id, lm.tokenizer_id) for segment in segments]
        r = lm(prompt)
        assert r.num_computed_tokens == 0
        scores = [stored[name, "scores"] for name in names]
        assert [part.about["text"] for part in scores] == [segment.string for segment in segments]
        np.testing.assert_array_equal(joined(scores, "input_ids", axis=0), r.input_ids)
        np.testing.assert_array_equal(joined(scores, "token_logprobs", axis=0), r.token_logprobs)
        np.testing.assert_array_equal(values(stored[names[-1], "logits"], "logits"), r.logits)
        kv = [stored[name, "kv"] for name in names]
        for layer, cached in enumerate(r.past_key_values.layers):
            np.testing.assert_array_equal(joined(kv, "keys", axis=2)[layer], cached.keys[0])
            np.testing.assert_array_equal(joined(kv, "values", axis=2)[layer], cached.values[0])
    assert lm.counters.num_model_calls == 0


def test_the_reader_finds_what_may_follow(written: Written) -> None:
    [found] = [part for part in read_database(written.directory, secret=written.secret) if part.name == "continuations"]
    assert found.about["text"] == "\nEndpoint:"
    assert [found.arrays[name].tolist() for name in ("input_ids", "parents", "token_logprobs")] == list(CONTINUATIONS)


def test_of_a_completion_only_scores_are_there(written: Written) -> None:
    stored = read_database(written.directory, secret=written.secret)
    assert {part.name for part in stored if part.about["text"] == " Yes."} == {"scores"}
    assert {part.about["namespace"] for part in stored} == {written.namespace}


@pytest.mark.parametrize("written", ["exact"], indirect=True)
def test_a_long_part_lies_in_several_chunks(written: Written) -> None:
    (part,) = [
        part for part in read_database(written.directory) if part.name == "kv" and part.about["text"] == MANY_TOKENS
    ]
    assert sum(array.nbytes for array in part.arrays.values()) > 2 * 1_048_560


@pytest.mark.parametrize("written", ["secret"], indirect=True)
def test_with_another_secret_nothing_is_read(written: Written) -> None:
    with pytest.raises(Unreadable, match="secret"):
        read_database(written.directory, secret=b"another secret of 16 bytes")


def test_the_reader_reads_bundles(written: Written, tmp_path: Path) -> None:
    bundle = tmp_path / "all.bundle"
    assert run("export", bundle, "--db", written.directory).exit_code == 0
    told = {(part.address, part.name): part.about for part in read_bundle(bundle)}
    stored = read_database(written.directory, secret=written.secret)
    assert told == {(part.address, part.name): part.about for part in stored}


def test_the_reader_knows_nothing_but_the_page() -> None:
    source = Path(independent_reader.__file__).read_text(encoding="utf-8")
    names = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    assert names & {"backprompt_db", "safetensors", "torch", "tests"} == set()


def test_the_digests_of_the_example_are_the_librarys() -> None:
    first = segment_id("The shop opens at nine.\n")
    second = segment_id("When does it open?", parents=[first])
    root = namespace_id("tenant-7")
    assert root is not None
    expected = [
        first,
        second,
        address(second, WeightsId(b"w" * 32), TokenizerId(b"t" * 32)),
        segment_id("When does it open?", parents=[SegmentId(root)]),
    ]
    assert re.findall(r"^[0-9a-f]{64}$", PAGE, flags=re.MULTILINE) == [each.hex() for each in expected]


def test_the_page_names_every_file_and_field(written: Written) -> None:
    (shown,) = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)]
    manifest = json.loads((written.directory / "manifest.json").read_text())
    assert set(shown) == set(manifest) - {"secret_id"}
    assert {name: shown[name] for name in ("format", "lmdb")} == {name: manifest[name] for name in ("format", "lmdb")}
    told = set(re.findall(r"`(\w+)`", PAGE))
    assert set(Manifest.__dataclass_fields__) | set(Config.__dataclass_fields__) <= told
    files = set(re.findall(r"`([\w.-]+)(?:/\*?)?`", PAGE))
    assert {path.name for path in written.directory.iterdir()} <= files
