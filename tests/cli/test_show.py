"""`show`: all that is known of a representation, its tokens as strings, without a model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import backprompt_db as bp
from tests.cli.test_commands import ROW_FIELDS
from tests.support.cli import CONTROL, LONG, run, run_json, run_prompts
from tests.support.database_files import copies_after

original, directory = copies_after(run_prompts)


def address_of(directory: Path, text: str) -> str:
    [address] = [row["address"] for row in run_json("ls", "--db", directory) if row["text"] == text]
    return str(address)


def shown(directory: Path, text: str, *options: str) -> Any:
    [found] = run_json("show", address_of(directory, text), "--db", directory, *options)
    return found


class TestOneRepresentation:
    def test_the_json_has_everything(self, directory: Path) -> None:
        [found] = run_json("show", address_of(directory, "Pick the endpoint for the request.\n"), "--db", directory)
        assert list(found) == [
            *ROW_FIELDS,
            "parents",
            "children",
            "prompt",
            "parts",
            "tokens",
            "next_tokens",
            "versions",
        ]
        assert (len(found["parents"]), len(found["children"])) == (0, 3)
        assert [part["part"] for part in found["parts"]] == ["scores", "logits", "kv"]
        assert found["parts"][2]["arrays"][0] == {
            "name": "keys", "dtype": "F32", "shape": [3, 4, found["num_tokens"], 16],
            "nbytes": 3 * 4 * found["num_tokens"] * 16 * 4,
        }  # fmt: skip
        assert len(found["tokens"]) == found["num_tokens"]
        assert found["tokens"][0]["logprob"] is None
        assert found["tokens"][1]["logprob"] < 0

    def test_a_segment_id_will_do(self, directory: Path) -> None:
        row = run_json("ls", "--db", directory)[0]
        assert run_json("show", row["segment_id"][:16], "--db", directory)[0]["address"] == row["address"]

    def test_people_see_the_same(self, directory: Path) -> None:
        [found] = run_json("show", address_of(directory, "Request: show me everyone"), "--db", directory)
        text = run("show", found["address"], "--db", directory).stdout
        for expected in (found["address"], *found["parents"], "kv", "keys F32 [3, 4,", "Request: show me everyone"):
            assert expected in text
        assert f"{found['tokens'][1]['logprob']:.3f}" in text

    def test_a_text_is_shown_in_full_but_not_obeyed(self, directory: Path) -> None:
        assert LONG in run("show", address_of(directory, LONG), "--db", directory, columns=40).stdout
        text = run("show", address_of(directory, CONTROL), "--db", directory).stdout
        assert r"a\x1b[31mred\x07 [bold]b[/bold] :smile: \u202ereversed\ttab" in text
        assert "\x1b" not in text

    def test_a_prefix_of_several_shows_each(self, directory: Path) -> None:
        rows = run_json("ls", "--db", directory)
        ids = [(row["address"], row["segment_id"]) for row in rows]
        for digit in "0123456789abcdef":
            expected = {address for address, segment in ids if address[0] == digit or segment[0] == digit}
            result = run("show", digit, "--json", "--db", directory)
            found = json.loads(result.stdout) if expected else []
            assert {one["address"] for one in found} == expected

    @pytest.mark.parametrize("prefix", ["f" * 64, "xyz", "%", "a" * 65])
    def test_what_is_not_there_is_an_error(self, directory: Path, prefix: str) -> None:
        result = run("show", prefix, "--db", directory)
        assert (result.exit_code, result.stdout) == (2, "")
        assert re.fullmatch(r"error: .*\nhint: .*\n", result.stderr)


class TestTokens:
    def test_they_are_strings_that_join_to_the_text(self, directory: Path) -> None:
        found = shown(directory, "Request: show me everyone")
        assert "".join(token["text"] for token in found["tokens"]) == "Request: show me everyone"
        assert all(token["logprob"] < 0 for token in found["tokens"])

    def test_people_see_them_in_quotes(self, directory: Path) -> None:
        text = run("show", address_of(directory, "Pick the endpoint for the request.\n"), "--db", directory).stdout
        assert re.search(r"'Pick' -\s", text)
        assert re.search(r"' the' -\d+\.\d{3}", text)
        assert re.search(r"'\\n' -\d+\.\d{3}", text)

    def test_without_the_tokenizer_they_are_ids(self, directory: Path) -> None:
        found = shown(directory, LONG)
        assert [(token["id"], token["text"]) for token in found["tokens"]] == [(1, None), (1, None)]
        assert found["next_tokens"] == []
        text = run("show", found["address"], "--db", directory).stdout
        assert "1 -1.500" in text
        assert "likeliest" not in text

    def test_the_likeliest_next_ones_are_those_of_the_result(
        self, lm: bp.LanguageModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        result = lm("Pick the endpoint.")
        lm.db.flush()
        assert lm.db.directory is not None
        found = shown(lm.db.directory, "Pick the endpoint.", "--top", "4")["next_tokens"]
        assert [token["id"] for token in found] == [token for token, _ in result.top_k(4)]
        assert [token["logprob"] for token in found] == pytest.approx([logprob for _, logprob in result.top_k(4)])
        text = run("show", address_of(lm.db.directory, "Pick the endpoint."), "--db", lm.db.directory).stdout
        rows = re.findall(r"^ *\S.*? +(\d+) +-\d+\.\d{3} +\d+\.\d\d%$", text, re.MULTILINE)
        assert [int(row) for row in rows] == [token for token, _ in result.top_k(10)]

    def test_there_are_no_more_than_the_vocabulary_has(self, directory: Path) -> None:
        assert len(shown(directory, CONTROL, "--top", "1000")["next_tokens"]) == 600
        assert run("show", "ab", "--db", directory, "--top", "0").exit_code == 2

    def test_no_model_is_loaded(self, directory: Path) -> None:
        script = (
            "import sys; from backprompt_db.cli.app import app\n"
            f"app(['show', {address_of(directory, CONTROL)!r}, '--db', {str(directory)!r}], standalone_mode=False)\n"
            "print({'torch', 'transformers'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
        assert done.stdout.endswith("set()\n")
        assert "likeliest next tokens" in done.stdout


class TestPrompts:
    def test_the_pieces_come_before_what_follows_them(self, directory: Path) -> None:
        found = shown(directory, "Request: show me everyone")
        first, last = found["prompt"]
        assert (first["text"], first["parents"]) == ("Pick the endpoint for the request.\n", [])
        assert (last["text"], last["parents"]) == ("Request: show me everyone", [first["segment_id"]])
        text = run("show", found["address"], "--db", directory).stdout
        assert re.search(rf"^ +1 +{first['segment_id'][:12]} +Pick the endpoint for the request\.\\n *$", text, re.M)
        assert re.search(rf"^> +2 +{last['segment_id'][:12]} +after 1 +Request: show me everyone *$", text, re.M)

    def test_branches_are_told_from_chains(self, lm: bp.LanguageModel) -> None:
        lm(lm.text("Context. ") + bp.parallel("Left. ", "Right. ") + "Question?")
        lm.db.flush()
        assert lm.db.directory is not None
        found = shown(lm.db.directory, "Question?")
        ids = {piece["text"]: piece["segment_id"] for piece in found["prompt"]}
        assert set(ids) == {"Context. ", "Left. ", "Right. ", "Question?"}
        assert set(found["prompt"][-1]["parents"]) == {ids["Left. "], ids["Right. "]}
        assert "after 2, 3" in run("show", found["address"], "--db", lm.db.directory).stdout

    def test_of_a_long_prompt_people_see_the_end(self, make_lm: Callable[..., bp.LanguageModel]) -> None:
        lm = make_lm()
        text = lm.text("0 ")
        for number in range(1, 30):
            text += f"{number} "
        lm(text)
        lm.db.flush()
        assert lm.db.directory is not None
        found = shown(lm.db.directory, "29 ")
        assert [piece["text"] for piece in found["prompt"]] == [f"{number} " for number in range(30)]
        printed = run("show", found["address"], "--db", lm.db.directory).stdout
        assert "10 more before these" in printed
        assert len(re.findall(r"after \d+", printed)) == 20

    def test_nothing_that_a_terminal_obeys_is_printed(self, directory: Path) -> None:
        text = run("show", address_of(directory, CONTROL), "--db", directory).stdout
        assert all(character.isprintable() for character in text.replace("\n", ""))
