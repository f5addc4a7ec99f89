"""What an explanation looks like to people and programs, and the seams that it shows."""

from __future__ import annotations

import html
import re
from io import StringIO

import pytest
from rich.console import Console

import backprompt_db as bp
from backprompt_db.cli.output import json_value
from tests.support.explanations import (
    CONTEXT,
    ENDING,
    EXPLANATION_FIELDS,
    HOSTILE,
    MISS_FIELDS,
    SEGMENT_FIELDS,
    prompt,
    run,
)


class TestSeams:
    def test_seams_that_change_tokens_are_among_what_is_explained(self, lm: bp.LanguageModel) -> None:
        text = prompt(lm, "Pick the endp", "oint for the request.")
        found = text.explain()
        assert list(found.seams or ()) == text.seams() != []
        assert re.search(
            r"so the cut is moved: '.*endp' \+ 'oint.*' is .+, joined ' endpoint'",
            _flat(str(found)),
        )
        assert prompt(lm).explain().seams == ()


def _flat(string: str) -> str:
    return " ".join(string.split())


def _text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


class TestViews:
    def test_a_notebook_shows_texts_and_obeys_none(self, lm: bp.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        run(lm, HOSTILE, ENDING)
        explanation = prompt(lm, HOSTILE + "<img src=x>", ENDING).explain()
        markup = explanation._repr_html_()
        text = _text_of(markup)
        assert set(re.findall(r"</?(\w+)", markup)) == {"pre", "span"}
        assert "<script>alert(1)</script>\\x1b[31m[bold]\\u202e&amp;<img" in text
        assert not any(character in markup for character in "\x1b\u202e")
        assert text.split()[:5] == ["segment", "found", "tokens", "bytes", "seconds"]
        monkeypatch.setenv("COLUMNS", "160")
        assert [line.rstrip() for line in text.splitlines()] == str(explanation).splitlines()

    def test_print_shows_a_table_that_no_text_can_disturb(self, lm: bp.LanguageModel) -> None:
        string = str(prompt(lm, HOSTILE, ENDING).explain())
        assert "<script>alert(1)</script>" in string
        assert "[bold]" in _flat(string)
        assert not any(character in string for character in "\x1b\u202e")
        assert string.splitlines()[0].split() == ["segment", "found", "tokens", "bytes", "seconds"]

    def test_a_terminal_shows_it_in_colour(self, lm: bp.LanguageModel) -> None:
        console = Console(file=StringIO(), force_terminal=True, color_system="standard", width=100)
        console.print(prompt(lm).explain())
        assert isinstance(console.file, StringIO)
        assert "\x1b[33m" in console.file.getvalue()

    def test_programs_get_all_of_it(self, lm: bp.LanguageModel) -> None:
        run(lm)
        found = json_value(prompt(lm, CONTEXT, "Request: who left?", ENDING).explain())
        assert list(found) == EXPLANATION_FIELDS
        assert [list(segment) for segment in found["segments"]] == [SEGMENT_FIELDS] * 3
        assert found["segments"][0]["places"] == {"scores": "disk", "logits": "disk", "kv": "memory"}
        assert found["segments"][0]["miss"] is None
        assert list(found["segments"][2]["miss"]) == MISS_FIELDS
        assert found["segments"][2]["miss"]["reason"] == "other-parents"
        assert list(found["segments"][2]["miss"]["difference"]) == ["at", "before", "stored", "given"]
