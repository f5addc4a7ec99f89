"""The page of a whole database: what is in it, what is left out, and that it asks nothing of anybody."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import re
import stat
import subprocess
import sys
import webbrowser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backprompt_db as bp
from backprompt_db.database.opening import open_catalog
from backprompt_db.operations import graph_page
from backprompt_db.operations import graph_page as contents_module
from backprompt_db.operations.forest import forest
from backprompt_db.operations.graph_page import TokenScores, affordable_text, page_contents
from backprompt_db.operations.inspection import Inspection
from backprompt_db.prompt.representation import Array, Part
from backprompt_db.store.contract import Key
from backprompt_db.views import page as page_module
from tests.support import browser as browser_parts
from tests.support.cli import run, run_json
from tests.support.operations import remove_blob
from tests.support.pages import DAY, HOSTILE, MARKUP, NOW, SIZES, forest_of, packed_in, write_page

ASSETS = Path(page_module.__file__).parent / "page_assets"


class TestBrowser:
    """The tests that need one."""

    def outcome(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
        monkeypatch.setattr(browser_parts, "CHROMEDRIVER", tmp_path / "chromedriver")
        with pytest.raises(BaseException, match=r"there is no .*chromedriver: apt-get install") as raised:
            browser_parts.require_browser()
        return raised.typename

    def test_without_one_they_are_skipped_but_fail_where_ci_is_set(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(browser_parts, "CHROMIUM", Path(sys.executable))
        monkeypatch.delenv("CI", raising=False)
        assert self.outcome(monkeypatch, tmp_path) == "Skipped"
        monkeypatch.setenv("CI", "true")
        assert self.outcome(monkeypatch, tmp_path) == "Failed"


class Markup(html.parser.HTMLParser):
    """Every element of a page with its attributes, and the content of those that are not markup."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self.feed(page.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in self.raw and data.strip():
            self.raw[self.elements[-1][0]].append(data)

    def policy(self) -> dict[str, str]:
        [content] = [
            values["content"] or ""
            for tag, values in self.elements
            if tag == "meta" and values.get("http-equiv") == "Content-Security-Policy"
        ]
        return {name: rest for name, _, rest in (each.strip().partition(" ") for each in content.split(";"))}


def source_hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


class TestOneFile:
    def test_it_names_nothing_outside_of_itself(self, tmp_path: Path) -> None:
        markup = Markup(write_page(tmp_path, forest_of(tmp_path)))
        links = [values[name] for _, values in markup.elements for name in ("src", "href", "action") if name in values]
        assert links == ["data:,"]
        [style] = markup.raw["style"]
        assert "url(" not in style
        assert "@import" not in style

    def test_its_policy_allows_its_own_script_and_style_and_nothing_else(self, tmp_path: Path) -> None:
        markup = Markup(write_page(tmp_path, forest_of(tmp_path)))
        [_, script], [style] = markup.raw["script"], markup.raw["style"]
        assert markup.policy() == {
            "default-src": "'none'",
            "script-src": source_hash(script),
            "style-src": source_hash(style),
            "img-src": "data:",
            "base-uri": "'none'",
            "form-action": "'none'",
        }

    def test_every_script_is_in_it(self, tmp_path: Path) -> None:
        script = Markup(write_page(tmp_path, forest_of(tmp_path))).raw["script"][-1]
        assert not re.search(r"^(import|export) ", script, re.MULTILINE)
        files = list(ASSETS.glob("*.js"))
        assert len(files) > 10
        for file in files:
            own = re.sub(r"^(import [^;]*;\n|export )", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert own in script, file.name

    def test_no_asset_can_end_the_element_that_it_stands_in(self) -> None:
        for file in (*ASSETS.glob("*.js"), *ASSETS.glob("*.css")):
            assert not re.search(r"</(script|style)|<!--", file.read_text(encoding="utf-8"), re.IGNORECASE), file.name

    def test_no_script_makes_markup_of_strings_or_asks_a_network(self) -> None:
        for file in ASSETS.glob("*.js"):
            source = file.read_text(encoding="utf-8")
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", source), (
                file.name
            )

    @pytest.mark.parametrize("hostile", HOSTILE)
    def test_a_text_is_nowhere_in_its_markup(self, tmp_path: Path, hostile: str) -> None:
        plain = Markup(write_page(tmp_path, forest_of(tmp_path, "harmless"))).elements
        page = write_page(tmp_path, forest_of(tmp_path, hostile), max_text=10_000)
        assert Markup(page).elements == [(tag, dict(values)) for tag, values in plain]
        assert packed_in(page)["nodes"]["texts"] == [hostile]

    def test_a_title_is_text(self, tmp_path: Path) -> None:
        page = write_page(tmp_path, forest_of(tmp_path), title=f"{MARKUP} {{{{ contents }}}}")
        assert Markup(page).raw["title"] == [f"{MARKUP} {{{{ contents }}}}"]
        assert not [tag for tag, _ in Markup(page).elements if tag in {"img", "b"}]


class TestContents:
    def test_columns_say_what_the_forest_does(self, tmp_path: Path) -> None:
        found = forest_of(tmp_path)
        contents = packed_in(write_page(tmp_path, found))
        nodes = contents["nodes"]
        assert nodes["texts"] == [node.text for node in found.nodes]
        for index, node in enumerate(found.nodes):
            others = nodes["other_parents"].get(str(index), [])
            assert [each for each in (nodes["parents"][index], *others) if each >= 0] == list(node.parents)
            assert nodes["absent_parents"].get(str(index), 0) == node.num_absent_parents
            assert contents["namespaces"][nodes["namespaces"][index]] == node.namespace
            assert node.weights_id.hex()[:8] in contents["models"][nodes["models"][index]]
            sizes = {part: nodes[f"{part.name.lower()}_nbytes"][index] for part in Part}
            assert {part: size for part, size in sizes.items() if size >= 0} == node.nbytes
            assert nodes["num_tokens"][index] == node.num_tokens
            assert nodes["num_hits"][index] * nodes["compute_seconds"][index] == pytest.approx(node.saved_seconds)
            assert NOW - nodes["created_seconds"][index] == node.created_at
            assert nodes["used_seconds"][index] == (-1 if node.last_used_at is None else NOW - node.last_used_at)
            assert node.address.hex().startswith(nodes["addresses"][index])

    def test_totals_are_those_of_the_forest(self, tmp_path: Path) -> None:
        found = forest_of(tmp_path)
        num_tokens = sum(node.num_tokens for node in found.nodes)
        totals = page_contents(found, None, max_text=100)["totals"]
        assert totals.startswith(f"{len(found.nodes)} segments · {num_tokens} tokens · ")
        assert " · 1 min 2 s saved · " in totals

    def test_an_empty_forest_says_what_to_do(self, tmp_path: Path) -> None:
        with open_empty(tmp_path) as catalog:
            contents = page_contents(forest(catalog), {}, max_text=100)
        assert contents["nodes"]["texts"] == []
        assert contents["remarks"] == []
        assert "Run a prompt" in contents["totals"]

    def test_long_texts_are_shortened_and_it_says_so(self, tmp_path: Path) -> None:
        contents = page_contents(forest_of(tmp_path, "a" * 50, "b" * 51, "c" * 1_000_000), {}, max_text=50)
        assert contents["nodes"]["texts"] == ["a" * 50, "b" * 50, "c" * 50]
        assert contents["nodes"]["shortened"] == {1: 51, 2: 1_000_000}
        assert contents["remarks"][0].startswith("Of 2 texts only the first 50 characters are shown and searched")

    def test_many_texts_are_shortened_further(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = forest_of(tmp_path, *(f"{number}" * 100 for number in range(8)))
        assert affordable_text(found, 90) == 90
        monkeypatch.setattr(contents_module, "MAX_CHARACTERS", 400)
        assert affordable_text(found, 90) == 45
        assert page_contents(found, {}, max_text=45)["remarks"][0].endswith("of fewer segments there is room for more.")
        assert page_contents(found, {}, max_text=20)["remarks"][0].endswith("--max-text takes more.")

    def test_what_else_is_left_out_is_said(self, tmp_path: Path) -> None:
        found = forest_of(tmp_path)
        some = {0: TokenScores([1], [None], ["Pick"])}
        assert page_contents(found, None, max_text=100)["remarks"] == [
            "Log-probabilities of tokens were left out, by --no-tokens."
        ]
        assert page_contents(found, some, max_text=100)["remarks"] == [
            "Log-probabilities are those of 1 of 9 segments that have any: the most used."
        ]
        limited = type(found)(found.nodes, found.at, is_whole=False)
        assert page_contents(limited, None, max_text=100)["remarks"][0].startswith("Only the newest 10 representations")

    def test_sizes_and_ages_of_the_example_differ(self, tmp_path: Path) -> None:
        found = forest_of(tmp_path)
        assert {part for node in found.nodes for part in node.nbytes} == set(SIZES)
        assert max(NOW - node.used_at for node in found.nodes) > 30 * DAY


class TestTokens:
    TEXTS = ("Pick the endpoint for the request.\n", "Request: näive 🦜 users", " GET /users")

    def read(self, lm: bp.LanguageModel, **options: Any) -> tuple[Any, dict[int, TokenScores]]:
        lm.db.flush()
        assert lm.db.catalog is not None
        found = forest(lm.db.catalog)
        return found, graph_page.read_token_scores(lm.db.store, lm.db.catalog, found, **{"max_text": 1000} | options)

    def test_they_are_those_of_the_result(self, lm: bp.LanguageModel) -> None:
        context, request, label = self.TEXTS
        result = lm(lm.text(context) + request + label)
        found, tokens = self.read(lm)
        assert [node.text for node in found.nodes] == list(self.TEXTS)
        for index, node in enumerate(found.nodes):
            assert "".join(tokens[index].pieces or []) == node.text
        assert [each for index in range(3) for each in tokens[index].ids] == result.input_ids.tolist()
        logprobs = [each for index in range(3) for each in tokens[index].logprobs]
        assert logprobs[0] is None
        assert logprobs[1:] == pytest.approx(result.token_logprobs[1:].tolist(), abs=1e-3)

    def test_what_a_model_says_is_impossible_can_be_shown(
        self, lm: bp.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm(lm.text(self.TEXTS[0]))
        values = np.array([np.nan, -np.inf, np.inf, -1.5], dtype=np.float32)
        arrays = {
            "input_ids": Array.from_numpy(np.arange(4, dtype=np.int32)),
            "token_logprobs": Array.from_numpy(values),
        }
        monkeypatch.setattr(graph_page, "inspect", lambda store, key: Inspection(key, arrays=arrays))
        found, tokens = self.read(lm)
        assert tokens[0].logprobs == [None, -1e6, 0.0, -1.5]
        assert packed_in(write_page(tmp_path, found, tokens))["tokens"]["0"]["logprobs"] == [None, -1e6, 0.0, -1.5]

    def test_of_a_shortened_text_those_that_are_shown(self, lm: bp.LanguageModel) -> None:
        lm(lm.text(self.TEXTS[0]))
        _, tokens = self.read(lm, max_text=10)
        shown = "".join(tokens[0].pieces or [])
        assert self.TEXTS[0].startswith(shown)
        assert 0 < len(shown) <= 10
        assert len(tokens[0].ids) == len(tokens[0].logprobs) == len(tokens[0].pieces or [])

    def test_the_most_used_ones_within_the_bounds(self, lm: bp.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        for request, num_hits in (("rarely", 1), ("often", 3), ("never", 0)):
            for _ in range(1 + num_hits):
                lm(lm.text(request))
        monkeypatch.setattr(graph_page, "MAX_PARTS", 2)
        found, tokens = self.read(lm)
        assert [found.nodes[index].text for index in tokens] == ["often", "rarely"]
        monkeypatch.setattr(graph_page, "MAX_TOKENS", found.nodes[1].num_tokens)
        found, tokens = self.read(lm)
        assert [found.nodes[index].text for index in tokens] == ["often"]

    def test_what_cannot_be_read_is_left_out(self, lm: bp.LanguageModel) -> None:
        lm(lm.text(self.TEXTS[0]) + self.TEXTS[1])
        found, _ = self.read(lm)
        lm.db.store.delete([Key(found.nodes[0].address, Part.SCORES)])
        _, tokens = self.read(lm)
        assert list(tokens) == [1]

    def test_without_the_tokenizer_there_are_ids_and_no_strings(
        self, lm: bp.LanguageModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm(lm.text(self.TEXTS[0]))
        monkeypatch.setattr(graph_page, "open_vocabulary", lambda catalog, tokenizer_id: None)
        found, tokens = self.read(lm)
        assert tokens[0].pieces is None
        assert len(tokens[0].ids) == len(tokens[0].logprobs) == found.nodes[0].num_tokens


def open_empty(path: Path) -> Any:
    with bp.open(path / "db") as db:
        assert db.catalog is not None
    return open_catalog(path / "db")


@pytest.fixture
def directory(lm: bp.LanguageModel) -> Path:
    """A database that two prompts were run on."""
    for request in ("Request: users", "Request: orders"):
        lm(lm.text("Pick the endpoint.\n") + request)
    lm.db.close()
    assert lm.db.directory is not None
    return lm.db.directory


class TestCommand:
    def test_it_writes_a_page_for_its_owner(self, directory: Path, tmp_path: Path) -> None:
        out = tmp_path / "my page.html"
        out.write_text("something else")
        result = run("graph", "--db", directory, "--out", out)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("3 segments, ")
        assert result.stdout.endswith(f"{out.as_uri()}\n")
        assert stat.S_IMODE(out.stat().st_mode) == 0o600
        contents = packed_in(out)
        assert sorted(contents["nodes"]["texts"]) == ["Pick the endpoint.\n", "Request: orders", "Request: users"]
        assert len(contents["tokens"]) == 3
        assert contents["remarks"] == []

    def test_json_says_what_was_written(self, directory: Path, tmp_path: Path) -> None:
        out = tmp_path / "page.html"
        assert run_json("graph", "--db", directory, "--out", out) == {
            "file": str(out),
            "num_segments": 3,
            "nbytes": out.stat().st_size,
        }

    def test_options_restrict_it(self, directory: Path, tmp_path: Path) -> None:
        out = tmp_path / "page.html"
        command = ("graph", "--db", directory, "--out", out)
        assert run(*command, "--text-prefix", "Pick the endpoint.\nRequest: o").exit_code == 0
        assert packed_in(out)["nodes"]["texts"] == ["Request: orders"]
        assert run(*command, "--limit", "2", "--no-tokens", "--max-text", "4").exit_code == 0
        contents = packed_in(out)
        assert contents["tokens"] == {}
        assert set(contents["nodes"]["texts"]) <= {"Pick", "Requ"}
        assert [remark.split()[0] for remark in contents["remarks"]] == ["Only", "Of", "Log-probabilities"]

    def test_an_empty_database_has_a_page_too(self, tmp_path: Path) -> None:
        open_empty(tmp_path).close()
        out = tmp_path / "page.html"
        assert run_json("graph", "--db", tmp_path / "db", "--out", out)["num_segments"] == 0
        assert "Nothing is stored" in packed_in(out)["totals"]

    def test_a_browser_is_opened_only_when_it_is_asked_for(
        self, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened: list[str] = []
        monkeypatch.setattr(webbrowser, "open", opened.append)
        out = tmp_path / "page.html"
        run("graph", "--db", directory, "--out", out)
        assert opened == []
        run("graph", "--db", directory, "--out", out, "--open")
        assert opened == [out.as_uri()]

    def test_a_file_that_cannot_be_written_is_named(self, directory: Path, tmp_path: Path) -> None:
        out = tmp_path / "missing" / "page.html"
        result = run("graph", "--db", directory, "--out", out)
        assert result.exit_code == 2
        assert f"{out} cannot be written: No such file or directory" in result.output.replace("\n", "")

    def test_there_must_be_a_database(self, tmp_path: Path) -> None:
        result = run("graph", "--db", tmp_path / "none", "--out", tmp_path / "page.html")
        assert result.exit_code == 2
        assert not (tmp_path / "page.html").exists()

    def test_a_damaged_part_costs_its_tokens_only(self, directory: Path, tmp_path: Path) -> None:
        with open_catalog(directory) as catalog:
            [node, *_] = forest(catalog).nodes
        remove_blob(directory, Key(node.address, Part.SCORES))
        out = tmp_path / "page.html"
        assert run_json("graph", "--db", directory, "--out", out)["num_segments"] == 3
        assert sorted(packed_in(out)["tokens"]) == ["1", "2"]

    def test_it_loads_no_torch(self, directory: Path, tmp_path: Path) -> None:
        command = ["graph", "--db", str(directory), "--out", str(tmp_path / "page.html")]
        script = f"import sys\nfrom backprompt_db.cli.app import app\ntry: app({command!r})\nexcept SystemExit: pass\n"
        script += "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
        assert ran.stdout.endswith("[]\n")
