"""Models in files: a second process loads nothing, and changed files are other keys."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import backprompt_db as bp
from backprompt_db.catalog.records import Source
from backprompt_db.compute.inference.loading import source_key
from backprompt_db.errors import ContextLengthExceeded, ModelMismatch, PromptError, StoreError
from backprompt_db.prompt.ids import ModelIds
from tests.conftest import tiny_gpt2
from tests.support.scripts import run_here, run_in_a_process

assert sys.platform != "win32"

ALPHABET = pre_tokenizers.ByteLevel.alphabet()

RUN = """
import json, sys
import backprompt_db as bp
with bp.open(sys.argv[1]) as db:
    lm = bp.LanguageModel.from_pretrained(sys.argv[2], db=db)
    prompt = lm.text("The quick brown fox", split=3) + " jumps over"
    scores = lm.score(prompt, [" the lazy dog", " the dog"])
    result = prompt()
    print(json.dumps({
        "scores": [float(score).hex() for score in scores],
        "modules": [name for name in ("torch", "transformers", "tokenizers") if name in sys.modules],
        "calls": lm.counters.num_model_calls,
        "computed": result.num_computed_tokens,
        "is_loaded": lm.is_loaded,
        "last": float(result.logits[-1]).hex(),
    }))
"""


@pytest.fixture
def model_directory(tmp_path: Path, tokenizer: Any) -> Path:
    return save_model(tmp_path / "a model", tokenizer)


def save_model(directory: Path, tokenizer: Any) -> Path:
    tiny_gpt2().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class FirstRun(NamedTuple):
    """What this process has left behind when it had loaded a model and computed."""

    database: Path
    model: Path
    answer: dict[str, Any]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> FirstRun:
    place = tmp_path_factory.mktemp("first run")
    model = save_model(place / "a model", tokenizer)
    return FirstRun(place / "db", model, run_here(RUN, place / "db", model))


def test_the_second_process_loads_no_model_and_computes_nothing(first_run: FirstRun) -> None:
    first, second = first_run.answer, run_in_a_process(RUN, first_run.database, first_run.model)
    assert first["calls"] > 0
    assert (second["calls"], second["computed"], second["modules"], second["is_loaded"]) == (0, 0, [], False)
    assert (second["scores"], second["last"]) == (first["scores"], first["last"])


PLAN = """
import json, sys
import backprompt_db as bp
with bp.open(sys.argv[1]) as db:
    lm = bp.LanguageModel.from_pretrained(sys.argv[2], db=db)
    plan = lm.plan([lm.text("The quick brown fox", split=3) + " jumps over"], [" the lazy dog", " the dog"])
    shown = str(plan)
    print(json.dumps({
        "modules": [name for name in ("torch", "transformers", "tokenizers") if name in sys.modules],
        "num_stored_texts": plan.num_stored_texts,
        "num_tokens": [plan.num_cached_tokens, plan.num_missing_tokens],
        "dtype": plan.dtype,
        "total_nbytes": plan.memory.total_nbytes,
        "shown": shown,
    }))
"""


def test_a_plan_of_what_is_stored_loads_neither_model_nor_tokenizer(first_run: FirstRun) -> None:
    plan = run_in_a_process(PLAN, first_run.database, first_run.model)
    assert (plan["modules"], plan["num_stored_texts"], plan["total_nbytes"]) == ([], 1, 0)
    assert "memory" in plan["shown"]
    with bp.open(first_run.database) as db:
        lm = bp.LanguageModel.from_pretrained(str(first_run.model), db=db)
        prompt, endings = lm.text("The quick brown fox", split=3) + " jumps over", [" the lazy dog", " the dog"]
        num_tokens = len(prompt().input_ids) + sum(len(lm.tokenizer(each)["input_ids"]) for each in endings)
        assert plan["num_tokens"] == [num_tokens, 0]
        assert plan["dtype"] == lm.plan(["Something else"]).dtype


def test_a_partial_hit_loads_the_model_and_continues(open_db: Callable[..., bp.Database], first_run: FirstRun) -> None:
    lm = bp.LanguageModel.from_pretrained(str(first_run.model), db=open_db(first_run.database))
    loaded_before = lm.is_loaded
    result = (lm.text("The quick brown fox", split=3) + " jumps over" + " the lazy cat")()
    assert (loaded_before, lm.is_loaded) == (False, True)
    with torch.no_grad():
        plain = lm.model(result.input_ids[None]).logits[0, -1]
    assert torch.allclose(result.logits, plain, atol=1e-4)
    assert 0 < result.num_computed_tokens < len(result.input_ids)


def test_given_objects_and_files_of_the_same_model_share_their_representations(
    open_db: Callable[..., bp.Database], model_directory: Path, tokenizer: Any
) -> None:
    db = open_db()
    bp.LanguageModel(tiny_gpt2(), tokenizer, db=db)("The quick brown fox")
    lm = bp.LanguageModel.from_pretrained(str(model_directory), db=db)
    assert lm("The quick brown fox").num_computed_tokens == 0


def test_changed_files_are_another_model(open_db: Callable[..., bp.Database], model_directory: Path) -> None:
    db = open_db()
    before = bp.LanguageModel.from_pretrained(str(model_directory), db=db)
    before("The quick brown fox")
    tiny_gpt2(seed=1).save_pretrained(model_directory)
    after = bp.LanguageModel.from_pretrained(str(model_directory), db=db)
    assert after.weights_id != before.weights_id
    assert after("The quick brown fox").num_cached_tokens == 0


def test_files_that_change_between_the_hit_and_the_miss_are_noticed(
    open_db: Callable[..., bp.Database], model_directory: Path
) -> None:
    db = open_db()
    bp.LanguageModel.from_pretrained(str(model_directory), db=db)("The quick brown fox")
    lm = bp.LanguageModel.from_pretrained(str(model_directory), db=db)
    assert not lm.is_loaded
    tiny_gpt2(seed=1).save_pretrained(model_directory)
    with pytest.raises(ModelMismatch, match="not the model that was recorded"):
        lm("something new")
    assert lm("something new").num_cached_tokens == 0


def other_tokenizer() -> Any:
    """A tokenizer with one token for each byte."""
    bpe = Tokenizer(models.BPE(vocab={each: number for number, each in enumerate(sorted(ALPHABET))}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def record_wrongly(db: bp.Database, model: Path, **wrong: bytes) -> ModelIds:
    """Record other ids for the files of a model than theirs, and return theirs."""
    right = bp.LanguageModel.from_pretrained(str(model), db=db)
    ids = {"weights_id": right.weights_id, "tokenizer_id": right.tokenizer_id}
    key = source_key(str(model), {})
    assert key is not None
    db.model_metadata.save(Source(key, str(model), **(ids | wrong)))  # type: ignore[arg-type]
    return ModelIds(right.weights_id, right.tokenizer_id)


@pytest.mark.parametrize("wrong", ["weights_id", "tokenizer_id"])
def test_wrong_ids_of_unchanged_files_are_noticed_once_and_corrected(
    open_db: Callable[..., bp.Database], model_directory: Path, wrong: str
) -> None:
    db = open_db()
    right = record_wrongly(db, model_directory, **{wrong: b"w" * 32})
    lm = bp.LanguageModel.from_pretrained(str(model_directory), db=db)
    with pytest.raises(ModelMismatch, match="not the model that was recorded"):
        lm("The quick brown fox")
    assert lm("The quick brown fox").ids == right
    again = bp.LanguageModel.from_pretrained(str(model_directory), db=db)
    assert (again("The quick brown fox").num_computed_tokens, again.is_loaded) == (0, False)
    assert again.weights_id == right.weights_id


def test_wrong_ids_are_corrected_even_where_the_model_is_loaded_before_it_is_used(
    open_db: Callable[..., bp.Database], model_directory: Path
) -> None:
    db = open_db()
    right = record_wrongly(db, model_directory, weights_id=b"w" * 32)
    assert bp.LanguageModel.from_pretrained(str(model_directory), db=db).model is not None
    assert bp.LanguageModel.from_pretrained(str(model_directory), db=db).weights_id == right.weights_id


def split(lm: bp.LanguageModel) -> list[str]:
    return [segment.string for segment in lm.text("The quick brown fox jumps over the lazy dog", split=5).segments()]


def healed(lm: bp.LanguageModel) -> list[str]:
    return [segment.string for segment in lm(lm.text("The quick brown fo") + "x ju").segments]


@pytest.mark.parametrize("pieces", [split, healed])
def test_cuts_are_not_remembered_for_a_tokenizer_that_was_wrongly_recorded(
    open_db: Callable[..., bp.Database], model_directory: Path, gpt2: Any, pieces: Callable[..., list[str]]
) -> None:
    other = bp.LanguageModel(gpt2, other_tokenizer(), db=(db := open_db()))
    record_wrongly(db, model_directory, tokenizer_id=other.tokenizer_id)
    lm = bp.LanguageModel.from_pretrained(str(model_directory), db=db)
    assert pieces(lm) == pieces(bp.LanguageModel.from_pretrained(str(model_directory), db=open_db()))
    assert pieces(other) == pieces(bp.LanguageModel(gpt2, other_tokenizer(), db=open_db())) != pieces(lm)


def test_a_dtype_argument_is_another_source(model_directory: Path) -> None:
    keys = {
        source_key(str(model_directory), arguments)
        for arguments in ({}, {"dtype": "bfloat16"}, {"dtype": torch.float16})
    }
    assert len(keys) == 3
    assert source_key(str(model_directory), {"dtype": torch.float16}) in keys


def test_a_source_without_a_fixed_description_has_no_key(model_directory: Path) -> None:
    assert source_key(str(model_directory), {"trust_remote_code": True}) is None
    assert source_key(str(model_directory), {"device_map": {"": "cpu"}}) is None
    assert source_key("nobody/has-this-model", {}) is None
    (model_directory / "adapter_config.json").write_text("{}")
    assert source_key(str(model_directory), {}) is None


def test_blobs_of_the_hub_cache_are_known_by_their_names(model_directory: Path, tmp_path: Path) -> None:
    snapshots = []
    for number in range(2):
        snapshot, blobs = tmp_path / f"cache{number}" / "snapshot", tmp_path / f"cache{number}" / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for index, path in enumerate(sorted(model_directory.iterdir())):
            blob = blobs / f"{index:064x}"
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(blob)
        snapshots.append(snapshot)
    first, second = (source_key(str(snapshot), {}) for snapshot in snapshots)
    assert first is not None
    assert first == second
    os.utime(snapshots[0] / "config.json")
    assert source_key(str(snapshots[0]), {}) == first


def test_a_touched_file_is_looked_at_again(model_directory: Path) -> None:
    before = source_key(str(model_directory), {})
    os.utime(model_directory / "config.json", ns=(0, 1))
    assert source_key(str(model_directory), {}) != before


@pytest.mark.parametrize("prompt", ["", bp.Text(""), bp.parallel("", "")])
def test_an_empty_prompt_is_refused(lm: bp.LanguageModel, prompt: bp.Text | str) -> None:
    with pytest.raises(PromptError, match="empty"):
        lm(prompt)
    with pytest.raises(PromptError, match="empty"):
        lm.score(prompt, [" GET"])


def test_completions_that_nothing_predicts_are_refused(lm: bp.LanguageModel) -> None:
    branches = lm.text("a") + bp.parallel("b", "c")
    with pytest.raises(PromptError, match="nothing predicts"):
        lm.score(branches, [" GET"])
    with pytest.raises(PromptError, match="empty"):
        lm.score("prompt", [" GET", ""])
    with pytest.raises(PromptError, match="list of completions"):
        lm.score("prompt", " GET")


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_computed(lm: bp.LanguageModel) -> None:
    context = lm.text("7" * 250)
    context()
    calls = lm.counters.num_model_calls
    with pytest.raises(ContextLengthExceeded, match="needs 260 positions, this model takes 256"):
        lm([context + "7" * 5, context + "8" * 10])
    assert lm.counters.num_model_calls == calls
    with pytest.raises(ContextLengthExceeded, match="needs 259 positions"):
        (lm.text("far", start=255) + "x")()
    assert (context + "7" * 6)().num_computed_tokens == 6


def test_the_last_token_of_a_completion_needs_no_position(lm: bp.LanguageModel) -> None:
    context = lm.text("7" * 250)
    (logprob,) = lm.score(context, ["7" * 7])
    ids = torch.tensor(lm.tokenizer("7" * 257)["input_ids"])
    plain = lm.model(ids[None, :256]).logits[0, 249:].log_softmax(-1).gather(1, ids[250:, None]).sum()
    assert abs(logprob - plain.item()) < 1e-4
    with pytest.raises(ContextLengthExceeded, match="needs 257 positions"):
        lm.score(context, ["7" * 8])
    with pytest.raises(ContextLengthExceeded, match="needs 257 positions"):
        _ = (context + "7" * 7)().logits


def test_a_tokenizer_of_another_model_is_refused(gpt2: Any, tokenizer: Any, db: bp.Database) -> None:
    gpt2.resize_token_embeddings(100)
    with pytest.raises(ModelMismatch, match="below 100"):
        bp.LanguageModel(gpt2, tokenizer, db=db)("The quick brown fox")


def test_texts_of_two_models_do_not_mix(lm: bp.LanguageModel, make_lm: Callable[..., bp.LanguageModel]) -> None:
    other = make_lm(tiny_gpt2(seed=1))
    with pytest.raises(PromptError, match="different models"):
        lm.text("a") + other.text("b")
    with pytest.raises(PromptError, match="different models"):
        lm([other.text("b")])


def test_a_full_disk_does_not_fail_the_computation(lm: bp.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    try:
        result = lm("The quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n" * 2)
        with pytest.raises(StoreError):
            lm.db.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert result.num_computed_tokens == len(result.input_ids)
    assert lm.db.counters.num_write_failures > 0


def test_what_is_no_text_is_refused_by_its_type(lm: bp.LanguageModel) -> None:
    with pytest.raises(bp.errors.InvalidText, match="a text is made of str, not int"):
        lm(5)  # type: ignore[call-overload]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_value_among_texts_is_named_by_its_number(lm: bp.LanguageModel, missing: Any) -> None:
    texts = ["a", "b", missing]
    calls: dict[str, list[Callable[[], object]]] = {
        "prompt": [
            lambda: lm(texts),
            lambda: lm.generate(texts),
            lambda: lm.score(texts, ["c"]),
            lambda: lm.warm(texts),
            lambda: lm.plan(texts),
        ],
        "completion": [lambda: lm.score("c", texts), lambda: lm.warm(["c"], texts), lambda: lm.plan(["c"], texts)],
    }
    for what, several in calls.items():
        for call in several:
            with pytest.raises(bp.errors.InvalidText, match=f"^{what} 2, counted from 0: a text is made of str, not"):
                call()


def test_whole_numbers_of_numpy_are_numbers(lm: bp.LanguageModel) -> None:
    number: Any = np.int64(2)
    string = "the quick brown fox jumps over the lazy dog"
    told = ("max_new_tokens", "num_return_sequences", "num_beams", "seed")
    found, again = ([e.token_ids.tolist() for e in lm.generate("a", **dict.fromkeys(told, n))] for n in (number, 2))
    assert found == again
    assert lm.text(string, split=number).segments() == lm.text(string, split=2).segments()
    assert lm.text(string, start=number).segments() == lm.text(string, start=2).segments()
    assert lm(string).top_k(number) == lm(string).top_k(2)
    assert lm.warm([string, "b", "c"], batch_size=number).num_texts == 3
    assert lm.plan([string, "b", "c"], batch_size=number).num_texts == 3
    for refused in (np.float64(2), np.array([2])):
        with pytest.raises(PromptError, match="is not a number of tokens"):
            lm.text(string, split=refused)  # type: ignore[arg-type]


def test_control_characters_in_the_name_of_a_model_are_shown_as_escapes(
    gpt2: Any, make_lm: Callable[..., bp.LanguageModel]
) -> None:
    gpt2.name_or_path = "a\x1b[31mred"
    assert r"a\x1b[31mred" in repr(make_lm(gpt2))


def test_names_in_place_of_objects_are_told_of_from_pretrained(gpt2: Any, tokenizer: Any, tmp_path: Path) -> None:
    for model, other in (("gpt2", tokenizer), (gpt2, "gpt2"), (tmp_path, tokenizer)):
        with pytest.raises(bp.errors.PromptError, match=r"not of their names.*from_pretrained"):
            bp.LanguageModel(model, other)


def test_the_directory_of_a_database_is_opened(gpt2: Any, tokenizer: Any, tmp_path: Path) -> None:
    for place in (str(tmp_path / "one"), tmp_path / "two"):
        lm = bp.LanguageModel(gpt2, tokenizer, db=place)
        assert lm.db.directory == Path(place)
        lm.db.close()
    gpt2.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=str(tmp_path / "three")).db as db:
        assert db.directory == tmp_path / "three"


@pytest.mark.parametrize("name", ["{}/none", "{}", "{}/config.json", "./none", "../none", "~/none", "there", "folder"])
def test_a_path_where_no_model_is_is_refused_at_once(
    db: bp.Database, model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "elsewhere" / "folder").mkdir(parents=True)
    (tmp_path / "elsewhere" / "there").write_bytes((model_directory / "config.json").read_bytes())
    (tmp_path / "elsewhere" / "config.json").touch()
    (tmp_path / "elsewhere" / "folder" / "weights.bin").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = name.format(tmp_path / "elsewhere" if name.endswith(".json") else tmp_path)
    with pytest.raises(ModelMismatch, match="is not a directory with the files of a model"):
        bp.LanguageModel.from_pretrained(path, db=db)


def test_a_model_in_a_folder_of_a_directory_is_found(db: bp.Database, model_directory: Path) -> None:
    lm = bp.LanguageModel.from_pretrained(str(model_directory.parent), db=db, subfolder=model_directory.name)
    assert lm("The quick").num_computed_tokens > 0
