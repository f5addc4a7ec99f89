"""What a prompt of Python, and a notebook, show of the values that users get."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import backprompt_db as bp
from backprompt_db.errors import CatalogError
from tests.support.cli import run, run_json
from tests.support.faults import ROOT


@pytest.fixture
def values(lm: bp.LanguageModel) -> dict[str, Any]:
    """One of each that users get, of texts that are long enough to be shortened."""
    text = lm.text("Pick the endpoint for the request.\n" * 9) + "Request: show"
    result = text()
    new = text + "Not yet"
    return {
        "text": text,
        "result": result,
        "ids": result.ids,
        "segment": text.segments()[0],
        "picture": text.picture(),
        "explanation": new.explain(),
        "explained": new.explain().segments[-1],
        "plan": lm.plan([new]),
        "warmed": lm.warm([f"{number} " * 600 for number in range(50)]),
        "generated": lm.generate("Request:", max_new_tokens=2),
        "seam": (lm.text("Pick the end", seams="keep") + "point").seams()[0],
        "template": bp.Template("{a} and {{b}}", "{c}"),
        "counters": lm.db.counters,
        "model counters": lm.counters,
        "config": lm.db.evictor.limits.config,
        "model": lm,
        "database": lm.db,
    }


def test_every_value_is_shown_in_a_line_with_short_ids(values: dict[str, Any]) -> None:
    for name, value in values.items():
        shown = repr(value)
        assert len(shown) <= 500, name
        assert "\n" not in shown, name
        assert " object at 0x" not in shown, name
        assert not re.search(r"[0-9a-f]{24}|\\x", shown), (name, shown)


def test_what_is_shown_tells_the_most_important(values: dict[str, Any]) -> None:
    assert re.fullmatch(r"<Segment [0-9a-f]{12} 'Pick the .*…'>", repr(values["segment"]))
    assert re.search(r"<SegmentExplanation [0-9a-f]{8} 'Not yet': \d tokens, to compute: ", repr(values["explained"]))
    assert re.search(r"of 3 segments: \d+ tokens cached, \d to compute, by", repr(values["explanation"]))
    assert re.search(r"<RunPlan of 1 text: \d tokens to compute, \d+ cached, by", repr(values["plan"]))
    assert repr(values["picture"]) == "<Picture of 2 segments in tokens>"
    assert repr(values["template"]) == "Template('{a} and {{b}}', '{c}')"
    assert "num_too_long=50" in repr(values["warmed"])


def test_a_printed_result_can_be_read(lm: bp.LanguageModel) -> None:
    result = (lm.text("Pick the endpoint.\n") + "Request")()
    string, tokens, likely, under = str(result).splitlines()
    assert string == repr("Pick the endpoint.\nRequest")
    num_tokens = len(result.input_ids)
    assert tokens == f"{num_tokens} tokens in 2 segments: 0 cached, {num_tokens} computed"
    total, of = re.fullmatch(r"log-probability (.*), of (\d+) tokens", likely).groups()  # type: ignore[union-attr]
    assert float(total) == pytest.approx(float(result.token_logprobs.nansum()), abs=1e-3)
    assert int(of) == num_tokens - 1
    assert under == f"{result.ids}, exact"


@pytest.mark.parametrize("name", ["generated", "database", "model", "plan", "explanation", "picture", "text", "result"])
def test_a_notebook_has_html_for_it(values: dict[str, Any], name: str) -> None:
    assert values[name]._repr_html_().startswith("<")


def test_html_shows_markup_of_texts_as_text(lm: bp.LanguageModel) -> None:
    shown = lm.generate("<b>Request:</b>", max_new_tokens=2)._repr_html_()
    assert "&lt;b&gt;Request:&lt;/b&gt;" in shown


def test_stats_are_those_of_the_command(open_db: Callable[..., bp.Database], tmp_path: Path, make_lm: Any) -> None:
    with open_db(tmp_path / "db", namespace="mine") as db:
        make_lm(db=db)("Pick the endpoint for the request.\n")
        found = db.stats()
        assert (found.num_representations, found.num_models) == (1, 1)
        assert db.stats(namespace="other").num_representations == 0
        assert found.num_representations == run_json("stats", "--db", tmp_path / "db")["num_representations"]
        assert re.search(r"representations +1\n", str(found))
        assert repr(found).startswith(f"<Stats of {tmp_path / 'db'}: 1 representation, ")
        assert "representations" in found._repr_html_()
    printed = str(found).splitlines()
    for line in run("stats", "--db", tmp_path / "db").stdout.splitlines():
        assert line.split()[0] in {each.split()[0] for each in printed}


def test_a_database_in_memory_has_none() -> None:
    with bp.open(":memory:") as db:
        with pytest.raises(CatalogError, match="in memory"):
            db.stats()
        assert ":memory:" in db._repr_html_()


def test_a_database_offers_what_the_reference_describes() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    [members] = re.findall(r"::: backprompt_db\.Database\n +options:\n +members: \[(.*)\]", page)
    with bp.open(":memory:") as db:
        assert dir(db) == sorted(members.split(", "))
