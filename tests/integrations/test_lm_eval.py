"""lm-evaluation-harness: the answers of its own `hf` model, out of the database from the second time on."""

from __future__ import annotations

import functools
import json
import runpy
import sqlite3
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import backprompt_db as bp
from backprompt_db.errors import ModelMismatch, PromptError
from backprompt_db.integrations.lm_eval import BackpromptLM
from tests.conftest import CORPUS, tiny_gpt2, train_tokenizer
from tests.support.harness import DATA, SHOTS, hf_model, requests, save_model

Make = Callable[..., BackpromptLM]

CONTEXTS = [SHOTS + "Question: Who lists orders?\nAnswer:", SHOTS + "Question: Which dog? ", "The quick brown fox", ""]
CONTINUATIONS = [" GET", " POST /orders.", "\n\n", "é 🙂", "x", " the endpoint for the request"]
PAIRS = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
METRICS = {"acc", "acc_norm", "exact_match", "byte_perplexity", "word_perplexity"}
UNTIL = {"until": ["\n", " the"], "max_gen_toks": 12}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def hf(directory: str) -> Any:
    return hf_model(directory)


@pytest.fixture
def make(directory: str, tmp_path: Path) -> Iterator[Make]:
    """Make the model anew, as another process would, each time on the same database."""
    opened: list[bp.Database] = []

    def make_one(**arguments: Any) -> BackpromptLM:
        for db in opened:
            db.close()
        opened.append(bp.open(tmp_path / "db"))
        return BackpromptLM(directory, db=opened[-1], **arguments)

    yield make_one
    for db in opened:
        db.close()


def greedy_continuation(hf: Any, context: str, num_tokens: int) -> str:
    ids = torch.tensor([hf.tok_encode(context)])
    with torch.no_grad():
        for _ in range(num_tokens):
            ids = torch.cat([ids, hf.model(ids).logits[:, -1:].argmax(-1)], 1)
    string: str = hf.tokenizer.decode(ids[0, -num_tokens:])
    return string


def assert_same(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]], pairs: list[Any], hf: Any) -> None:
    for (mine, is_greedy), (expected, was_greedy), (_, continuation) in zip(ours, theirs, pairs, strict=True):
        assert abs(mine - expected) < 1e-4 * max(1, len(hf.tok_encode(continuation)))
        assert is_greedy == was_greedy


class TestLoglikelihood:
    def test_answers_are_those_of_the_hf_model(self, make: Make, hf: Any) -> None:
        asked = requests("loglikelihood", PAIRS)
        assert_same(make().loglikelihood(asked), hf.loglikelihood(asked), PAIRS, hf)

    def test_the_second_time_the_model_is_not_loaded(self, make: Make) -> None:
        asked = requests("loglikelihood", PAIRS)
        first = make().loglikelihood(asked)
        again = make()
        assert again.loglikelihood(asked) == first
        assert not again.is_loaded
        assert again.counters.num_model_calls == again.counters.num_computed_tokens == 0

    def test_what_the_model_itself_would_write_is_greedy(self, make: Make, hf: Any) -> None:
        context = CONTEXTS[0]
        written = greedy_continuation(hf, context, 6)
        pairs = [(context, written), (context, written[:-1]), (context, written[:3] + "x"), (context, written + "x")]
        pairs = [pair for pair in pairs if "�" not in pair[1]]
        asked = requests("loglikelihood", pairs)
        ours = make().loglikelihood(asked)
        assert_same(ours, hf.loglikelihood(asked), pairs, hf)
        assert any(is_greedy for _, is_greedy in ours)
        again = make()
        assert again.loglikelihood(asked) == ours
        assert not again.is_loaded

    def test_a_changed_last_example_recomputes_only_what_follows(self, make: Make) -> None:
        lm = make()
        lm.loglikelihood(requests("loglikelihood", [(CONTEXTS[0], " GET"), (CONTEXTS[0], " POST")]))
        changed = CONTEXTS[0].replace("the dog is lazy", "the fox is quick")
        again = make()
        again.loglikelihood(requests("loglikelihood", [(changed, " GET"), (changed, " POST")]))
        begin = changed.index("\nQuestion: Does the dog")
        rest = len(lm.tok_encode(changed[begin:])) + 2
        assert 0 < again.counters.num_computed_tokens <= rest

    def test_a_question_more_computes_only_the_question(self, make: Make) -> None:
        lm = make()
        lm.loglikelihood(requests("loglikelihood", [(CONTEXTS[0], " GET")]))
        before = lm.counters.num_computed_tokens
        question = "Question: A new one?\nAnswer:"
        lm.loglikelihood(requests("loglikelihood", [(SHOTS + question, " GET")]))
        assert lm.counters.num_computed_tokens - before == len(lm.tok_encode("\n" + question + " GET"))

    def test_too_long_a_context_loses_its_beginning(self, make: Make, hf: Any) -> None:
        pairs = [(SHOTS * 4, " GET /users"), (SHOTS * 4 + "Answer:", " the"), ("x", SHOTS * 4)][:2]
        asked = requests("loglikelihood", pairs)
        ours = make().loglikelihood(asked)
        assert_same(ours, hf.loglikelihood(asked), pairs, hf)
        again = make()
        assert again.loglikelihood(asked) == ours
        assert not again.is_loaded

    def test_a_request_cut_inside_a_character_is_answered_all_the_same(
        self, make: Make, hf: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        ids = hf.tok_encode("a dog 🙂 is lazy")
        pairs = [(("a dog", " is lazy"), ids[:6], ids[6:])]
        lm = make()
        assert_same(lm._loglikelihood_tokens(pairs), hf._loglikelihood_tokens(pairs), [("", "xxxxxx")], hf)
        assert "inside a character" in caplog.text
        assert lm.counters.num_model_calls == 1

    def test_a_continuation_without_tokens_of_its_own_is_refused(self, make: Make) -> None:
        with pytest.raises(PromptError, match="a continuation has 0 tokens"):
            make()._loglikelihood_tokens([(("a", ""), [5], [])])

    @pytest.mark.parametrize("context", ["   ", "\n\n"])
    def test_a_context_without_tokens_is_refused(self, make: Make, context: str) -> None:
        with pytest.raises(PromptError, match="nothing predicts"):
            make().loglikelihood(requests("loglikelihood", [(context, "x")]))

    def test_without_a_catalog_answers_are_the_same(self, directory: str, hf: Any) -> None:
        asked = requests("loglikelihood", PAIRS)
        with bp.open(":memory:") as db:
            lm = BackpromptLM(directory, db=db)
            first = lm.loglikelihood(asked)
            calls = lm.counters.num_model_calls
            assert lm.loglikelihood(asked) == first
            assert lm.counters.num_model_calls == calls
        assert_same(first, hf.loglikelihood(asked), PAIRS, hf)

    def test_scores_without_their_greedy_paths_are_completed(self, make: Make) -> None:
        asked = requests("loglikelihood", PAIRS)
        first = make().loglikelihood(asked)
        lm = make()
        assert lm.db.directory is not None
        lm.db.close()
        (lm.db.directory / "catalog.sqlite").unlink()
        again = make().loglikelihood(asked)
        assert [is_greedy for _, is_greedy in again] == [is_greedy for _, is_greedy in first]
        assert [logprob for logprob, _ in again] == [logprob for logprob, _ in first]

    def test_paths_are_not_followed_with_another_model_than_was_recorded(self, tmp_path: Path, hf: Any) -> None:
        place = save_model(tmp_path / "model")
        pairs = [(context, greedy_continuation(hf, context, 3)) for context in ("GET /users", "the")]
        asked = requests("loglikelihood", pairs)
        with bp.open(tmp_path / "db") as db:
            first = BackpromptLM(place, db=db).loglikelihood(asked)
            assert any(is_greedy for _, is_greedy in first)
            lm = bp.LanguageModel.from_pretrained(place, db=db)
            for context, _ in pairs:
                lm(context)
        with sqlite3.connect(tmp_path / "db" / "catalog.sqlite") as connection:
            connection.execute("DELETE FROM greedy_paths")
        connection.close()
        with bp.open(tmp_path / "db") as db:
            stale = BackpromptLM(place, db=db)
            assert not stale.is_loaded
            tiny_gpt2(seed=1).save_pretrained(place)
            with pytest.raises(ModelMismatch):
                stale.loglikelihood(asked)
            assert db.catalog is not None
            assert db.catalog.greedy_paths(row.address for row in db.catalog.rows()) == {}

    def test_only_scores_are_kept_of_questions_and_answers(self, make: Make) -> None:
        lm = make()
        lm.loglikelihood(requests("loglikelihood", [(CONTEXTS[0], " GET"), (CONTEXTS[0], " the endpoint")]))
        lm.db.flush()
        assert lm.db.catalog is not None
        kept = {row.text: set(row.nbytes) for row in lm.db.catalog.rows()}
        assert {len(parts) for text, parts in kept.items() if text.startswith("\nQuestion: Who lists orders?")} == {1}
        assert len(kept[" GET"]) == len(kept[" the endpoint"]) == 1
        assert {len(parts) for text, parts in kept.items() if text.endswith(".\n")} == {3}


class TestRolling:
    STRINGS = [(string,) for string in (*CORPUS, "a", SHOTS * 5, "")]  # noqa: RUF012 - of a test

    def test_sums_are_those_of_the_hf_model(self, make: Make, hf: Any) -> None:
        asked = requests("loglikelihood_rolling", self.STRINGS)
        ours = make().loglikelihood_rolling(asked)
        for mine, expected, (string,) in zip(ours, hf.loglikelihood_rolling(asked), self.STRINGS, strict=True):
            assert abs(mine - expected) < 1e-4 * max(1, len(hf.tok_encode(string)))

    def test_the_second_time_the_model_is_not_loaded(self, make: Make) -> None:
        asked = requests("loglikelihood_rolling", self.STRINGS)
        first = make().loglikelihood_rolling(asked)
        again = make()
        assert again.loglikelihood_rolling(asked) == first
        assert not again.is_loaded


class TestGeneration:
    PROMPTS = [*CORPUS, SHOTS + "Question: Who?\nAnswer:", SHOTS * 4, "Pick"]  # noqa: RUF012 - of a test

    def test_strings_are_those_of_the_hf_model(self, make: Make, hf: Any) -> None:
        asked = requests("generate_until", [(prompt, dict(UNTIL)) for prompt in self.PROMPTS])
        assert make().generate_until(asked) == hf.generate_until(asked)

    def test_the_second_time_the_model_is_not_loaded(self, make: Make) -> None:
        asked = requests("generate_until", [(prompt, dict(UNTIL)) for prompt in self.PROMPTS])
        first = make().generate_until(asked)
        again = make()
        assert again.generate_until(asked) == first
        assert not again.is_loaded

    def test_fewer_tokens_of_what_was_written_need_no_model(self, make: Make, hf: Any) -> None:
        longer = requests("generate_until", [(prompt, {"until": [], "max_gen_toks": 12}) for prompt in CORPUS])
        make().generate_until(longer)
        shorter = requests("generate_until", [(prompt, {"until": ["e"], "max_gen_toks": 5}) for prompt in CORPUS])
        lm = make()
        assert lm.generate_until(shorter) == hf.generate_until(shorter)
        assert not lm.is_loaded

    def test_more_tokens_than_were_written_are_generated(self, make: Make, hf: Any) -> None:
        for num_tokens in (3, 12):
            asked = requests(
                "generate_until", [(prompt, {"until": [], "max_gen_toks": num_tokens}) for prompt in CORPUS]
            )
            assert make().generate_until(asked) == hf.generate_until(asked)

    def test_a_stop_string_that_the_prompt_begins_does_not_stop(self, make: Make, hf: Any) -> None:
        (written,) = hf.generate_until(requests("generate_until", [("The quick", {"until": [], "max_gen_toks": 8})]))
        told = {"until": ["k" + written[0]], "max_gen_toks": 8}
        asked = requests("generate_until", [("The quick", told), ("The quick brown", told)])
        assert make().generate_until(asked) == hf.generate_until(asked)

    @pytest.mark.parametrize("until", ["", [""], ["\n", ""]])
    def test_the_empty_stop_string_is_in_the_first_token(self, make: Make, hf: Any, until: Any) -> None:
        asked = requests("generate_until", [("The quick", {"until": until, "max_gen_toks": 6})])
        expected = hf.generate_until(asked)
        assert [make().generate_until(asked) for _ in range(2)] == [expected, expected]

    def test_a_special_token_stops_a_path_that_is_known_beyond_it(self, tmp_path: Path) -> None:
        tokenizer = train_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["*"]})  # the tiny model writes it second
        place = save_model(tmp_path / "model", tokenizer=tokenizer)
        tolds = [{"until": until, "max_gen_toks": 10} for until in ([], ["*"])]
        asked = [requests("generate_until", [("Pick the endpoint", told)]) for told in tolds]
        theirs = hf_model(place)
        expected = [theirs.generate_until(each) for each in asked]
        assert expected[0] != expected[1]
        with bp.open(tmp_path / "db") as db:
            lm = BackpromptLM(place, db=db)
            assert [lm.generate_until(each) for each in asked] == expected

    def test_a_prompt_without_tokens_is_refused(self, make: Make) -> None:
        with pytest.raises(PromptError, match="nothing predicts"):
            make().generate_until(requests("generate_until", [("", {"until": [], "max_gen_toks": 3})]))

    def test_a_model_with_a_penalty_of_its_own_is_followed_and_not_remembered(self, tmp_path: Path) -> None:
        place = save_model(tmp_path / "model")
        config = json.loads((tmp_path / "model" / "generation_config.json").read_text()) | {"repetition_penalty": 1.8}
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(config))
        asked = requests("generate_until", [(prompt, {"until": [], "max_gen_toks": 12}) for prompt in CORPUS])
        with bp.open(tmp_path / "db") as db:
            lm = BackpromptLM(place, db=db)
            assert lm.generate_until(asked) == hf_model(place).generate_until(asked)
            assert db.catalog is not None
            db.flush()
            assert db.catalog.greedy_paths(row.address for row in db.catalog.rows()) == {}

    def test_samples_are_drawn_each_time(self, make: Make) -> None:
        asked = requests("generate_until", [("Pick", {"until": [], "do_sample": True, "temperature": 1.5})] * 2)
        torch.manual_seed(0)
        first = make(max_gen_toks=12).generate_until(asked)
        assert make(max_gen_toks=12).generate_until(asked) != first

    def test_arguments_that_cannot_be_followed_are_refused(self, make: Make) -> None:
        for told in ({"prompt_lookup_num_tokens": 3}, {"max_length": 20}, {"max_gen_toks": 256}):
            with pytest.raises(PromptError):
                make().generate_until(requests("generate_until", [("Pick", {"until": [], **told})]))


class TestArguments:
    def test_both_names_lead_to_the_model(self) -> None:
        assert get_model("backprompt") is BackpromptLM
        project = tomllib.loads((DATA.parents[2] / "pyproject.toml").read_text())["project"]
        value = project["entry-points"]["lm_eval.models"]["backprompt"]
        assert EntryPoint("backprompt", value, "lm_eval.models").load() is BackpromptLM

    def test_a_string_of_arguments_is_read(self, directory: str, tmp_path: Path) -> None:
        lm = BackpromptLM.create_from_arg_string(
            f"pretrained={directory},db={tmp_path / 'db'},namespace=mine,max_length=100,dtype=auto,revision=main",
            {"batch_size": 1, "max_batch_size": None, "device": None},
        )
        with lm.db:
            assert (lm.max_length, lm.db.namespace, lm.db.directory) == (100, "mine", tmp_path / "db")

    @pytest.mark.parametrize(
        "refused",
        [{"peft": "adapter"}, {"add_bos_token": True}, {"device": "abacus"}, {"backend": "seq2seq"}, {"dbb": "x"}],
    )
    def test_what_it_cannot_follow_is_refused_by_name(self, make: Make, refused: dict[str, Any]) -> None:
        with pytest.raises(PromptError, match=next(iter(refused))) as caught:
            make(**refused)
        assert caught.value.hint

    def test_a_model_and_its_tokenizer_may_be_given(self, tokenizer: Any, db: bp.Database, hf: Any) -> None:
        asked = requests("loglikelihood", PAIRS[:6])
        lm = BackpromptLM(tiny_gpt2(), tokenizer=tokenizer, db=db)
        assert_same(lm.loglikelihood(asked), hf.loglikelihood(asked), PAIRS[:6], hf)

    def test_what_a_language_model_has_computed_is_found(self, make: Make, directory: str) -> None:
        db = make().db
        bp.LanguageModel.from_pretrained(directory, db=db).score("The quick brown fox", [" GET"])
        lm = make()
        (answer,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("The quick brown fox",)]))
        assert answer < 0
        before = lm.counters.num_computed_tokens
        lm.loglikelihood(requests("loglikelihood", [("The quick brown fox", " POST")]))
        assert lm.counters.num_computed_tokens - before <= 5

    def test_facts_about_the_model_are_those_of_the_hf_model(self, make: Make, hf: Any) -> None:
        lm = make()
        for name in ("max_length", "eot_token_id", "prefix_token_id", "tokenizer_name", "max_gen_toks"):
            assert getattr(lm, name) == getattr(hf, name), name


class TestChat:
    TEMPLATE = (
        "{% for m in messages %}{% if m.role == 'system' and no_system %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "GET?"}]  # noqa: RUF012 - of a test

    @pytest.mark.parametrize("no_system", [False, True])
    def test_the_prompt_is_that_of_the_hf_model(self, directory: str, make: Make, *, no_system: bool) -> None:
        lm, theirs = make(chat_template_args={"no_system": no_system}), hf_model(directory)
        theirs.chat_template_args = {"no_system": no_system}
        for model in (lm, theirs):
            model.tokenizer.chat_template = self.TEMPLATE
        assert lm.apply_chat_template(list(self.CHAT)) == theirs.apply_chat_template(list(self.CHAT))
        assert ("Be brief" in lm.apply_chat_template(list(self.CHAT))) != no_system
        unfinished = [*self.CHAT, {"role": "assistant", "content": "The answer is"}]
        assert lm.apply_chat_template(unfinished, add_generation_prompt=False).endswith("The answer is")
        assert lm.chat_template(chat_template=True) == self.TEMPLATE


class TestWholeRun:
    TASKS = ("knowledge", "writing", "stories")

    def run(self, model: str, arguments: str, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.chdir(DATA)
        manager = TaskManager(include_path=".", include_defaults=False)
        return lm_eval.simple_evaluate(
            model, arguments, list(self.TASKS), task_manager=manager, limit=3, bootstrap_iters=0, batch_size=2
        )

    def test_metrics_are_those_of_the_hf_model_and_the_second_run_computes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = save_model(tmp_path / "model", n_positions=512)
        theirs = self.run("hf", f"pretrained={directory},device=cpu", monkeypatch)
        ours = [self.run("backprompt", f"pretrained={directory},db={tmp_path / 'db'}", monkeypatch) for _ in range(2)]
        for task in self.TASKS:
            every = theirs["results"][task].items()
            expected = {name: float(value) for name, value in every if name.partition(",")[0] in METRICS}
            assert expected
            for result in ours:
                assert {name: result["results"][task][name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert ours[0]["config"]["backprompt_db"]["num_computed_tokens"] > 0
        assert ours[1]["config"]["backprompt_db"]["num_computed_tokens"] == 0
        assert ours[1]["config"]["backprompt_db"]["num_model_calls"] == 0

    def test_the_command_line_is_the_harnesss_own(
        self, directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = [
            *("run", "--model", "backprompt", "--model_args", f"pretrained={directory},db={tmp_path / 'db'}"),
            *("--tasks", "stories", "--include_path", ".", "--limit", "1"),
            *("--output_path", str(tmp_path / "out.json")),
        ]
        monkeypatch.chdir(DATA)
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
        own_tasks = functools.partial(TaskManager, include_defaults=False)  # the harness has 14,000 files of others
        monkeypatch.setattr("lm_eval.tasks.TaskManager", own_tasks)
        runpy.run_module("backprompt_db.integrations.lm_eval", run_name="__main__")
        assert "byte_perplexity" in capsys.readouterr().out
        (written,) = tmp_path.glob("out_*.json")
        assert json.loads(written.read_text())["config"]["backprompt_db"]["num_computed_tokens"] > 0
