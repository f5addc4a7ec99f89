"""The site builds without a warning and without a network; every block on its pages runs, or says why not."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import markdown  # type: ignore[import-untyped]
import pytest

import backprompt_db as bp
from backprompt_db import errors
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from tests.conftest import cases, tiny_gpt2
from tests.support.documents import CODE, DATA, Reader, blocks, is_run

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ["../README.md", *sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))]
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
REMOTE = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//|<link\b[^>]*\bhref="(?:https?:)?//""")


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A directory with the model that the pages call gpt2."""
    directory = tmp_path_factory.mktemp("models") / "gpt2"
    tiny_gpt2().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def reader(
    request: pytest.FixtureRequest, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Reader]:
    """A reader in an empty directory, but for models under the names that the page uses: all that it knows of them."""
    page = request.node.callspec.params["page"]
    (tmp_path / "gpt2").symlink_to(tiny)
    if SMOLLM2 in text_of(page):
        (tmp_path / SMOLLM2).parent.mkdir()
        (tmp_path / SMOLLM2).symlink_to(smollm2_directory())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("BACKPROMPT_DB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    reader = Reader(tmp_path, name=page)
    yield reader
    reader.close()


RUN = [page for page in PAGES if any(map(is_run, blocks(text_of(page))))]
SLOW = {"index.md", "how-to/databases.md", "how-to/warming.md"}


@pytest.mark.parametrize("page", cases(RUN, by_default=set(RUN) - SLOW))
def test_the_blocks_of_a_page_run_in_order(page: str, reader: Reader) -> None:
    for block in filter(is_run, blocks(text_of(page))):
        reader.run(block)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    assert {block.language for block in blocks(text_of(page))} <= CODE | DATA
    rendered = markdown.markdown(text_of(page), extensions=["pymdownx.superfences", "tables", "admonition"])
    assert "<pre><code>" not in rendered, "an indented block is not looked at: put a fence around it"


@pytest.mark.parametrize("page", PAGES)
def test_what_is_said_not_to_run_has_a_reason(page: str) -> None:
    not_run = [block for block in blocks(text_of(page)) if block.reason is not None]
    assert len(not_run) == text_of(page).count("<!-- not run")
    assert {block.language for block in not_run} <= CODE


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does, without a network where the system allows that."""
    directory = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    alone = ["unshare", "--map-root-user", "--net"]
    can_be_alone = subprocess.run([*alone, "true"], capture_output=True, check=False, timeout=300).returncode == 0
    command = [*alone, *build] if can_be_alone else build
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_no_page_of_the_site_asks_another_server_for_anything(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    remote = {str(page.relative_to(site)): REMOTE.findall(page.read_text(encoding="utf-8")) for page in pages}
    assert {page: found for page, found in remote.items() if found} == {}
    sheets = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\(['\"]?https?:", sheets) == []


def test_the_reference_has_every_public_name(site: Path) -> None:
    page = (site / "reference" / "python.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'id="backprompt_db\.([\w.]+)"', page))
    elsewhere = {"open": "database.opening.open_database", "BackpromptError": "errors.BackpromptError"}
    expected = {elsewhere.get(name, name) for name in bp.__all__ if name != "__version__"}
    assert expected <= anchors
    assert "__version__" in page
    public = {name for name in vars(bp.LanguageModel) if not name.startswith("_")}
    assert {f"LanguageModel.{name}" for name in public} <= anchors


def test_the_reference_has_every_option_of_every_command(site: Path) -> None:
    from typer.main import get_command

    from backprompt_db.cli.app import app

    page = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    sections = dict(re.findall(r'<h2 id="([\w-]+)">.*?</h2>(.*?)(?=<h2|</article>)', page, flags=re.DOTALL))
    commands = getattr(get_command(app), "commands")  # noqa: B009 - click's types do not know groups here
    assert set(sections) == {name for name, command in commands.items() if not command.hidden}
    for name, section in sections.items():
        options = {option for each in commands[name].params for option in each.opts if option.startswith("--")}
        assert {option for option in options if f"<code>{option}" not in section} == set()


@pytest.fixture(scope="session")
def messages() -> Any:
    """The module that reads all error messages from the code."""
    spec = importlib.util.spec_from_file_location("messages", DOCS / "hooks" / "messages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fixed(text: str) -> str:
    """The words of a message that are the same in every case."""
    return re.sub(r"(%\w|\{[^{}]*\}|…|\s)+", "…", text)


def test_troubleshooting_has_every_class_of_errors_and_every_message(site: Path, messages: Any) -> None:
    page = (site / "troubleshooting.html").read_text(encoding="utf-8")
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes <= set(re.findall(r'<h3 id="\w+">(\w+)<', page))
    shown = fixed(html.unescape(re.sub(r"</?\w+[^>]*>", "", page)))
    found = messages.messages()
    assert len(found) > 150
    assert [each for each in found if fixed(each.message.replace("`", "")) not in shown] == []


def test_the_drawing_of_the_house_shows_every_module() -> None:
    package = Path(bp.__file__).parent
    there: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        if path.parent != package and not path.stem.startswith("__"):
            there.setdefault(str(path.parent.relative_to(package)), set()).add(path.stem)
    drawn: dict[str, set[str]] = {}
    for room in ET.parse(DOCS / "pictures" / "house.svg").iterfind(".//*[@data-room]"):  # noqa: S314 - our own
        texts = room.iterfind("{*}text[@class='modules']")
        words = {word for text in texts for word in (text.text or "").split() if not word.endswith("/")}
        drawn |= {room.attrib["data-room"]: words} if words else {}
    assert drawn == there


def test_troubleshooting_quotes_only_messages_that_exist(messages: Any) -> None:
    rows = re.findall(r"^\| (`.*?`|log: `.*?`) \|", text_of("troubleshooting.md"), flags=re.MULTILINE)
    quoted = [message for row in rows for message in re.findall(r"`(.+?)`", row)]
    assert len(quoted) > 50
    package = Path(bp.__file__).parent
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py")))
    known = fixed("\n".join(each.message for each in messages.messages()) + source)
    assert [message for message in quoted if fixed(message).strip("…") not in known] == []
