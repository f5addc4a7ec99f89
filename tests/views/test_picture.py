"""Pictures of prompts: every segment in its place and its state, whatever it is made of, and nothing is computed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import backprompt_db as bp
from backprompt_db.errors import PromptError
from backprompt_db.views.picture import Picture
from backprompt_db.views.scene import PicturedSegment, State, Unit
from tests.conftest import tiny_gpt2
from tests.support.explanations import CONTEXT, ENDING, HOSTILE, REQUEST, MakeLM, prompt, run
from tests.support.families import graphs
from tests.support.pictures import Drawn, DrawnRow, read_svg

DOCUMENTS = ("The quick brown fox jumps.\n", "A prompt is built.\n", "Every piece of text has one.\n")


def drawn(text: bp.Text, *, after: bp.ModelRepr | None = None) -> Drawn:
    return read_svg(text.picture(after=after).svg())


def joined(lm: bp.LanguageModel) -> bp.Text:
    return lm.text(CONTEXT) + bp.parallel(*DOCUMENTS) + REQUEST + ENDING


class TestStates:
    def test_what_is_stored_and_what_is_missing_is_what_the_explanation_says(self, lm: bp.LanguageModel) -> None:
        run(lm)
        text = prompt(lm, CONTEXT, "Request: who left?", ENDING)
        shown = drawn(text)
        assert shown.states == ["stored", "missing", "missing"]
        assert [segment.is_found for segment in text.explain().segments] == [True, False, False]
        assert "missing: never seen" in shown.rows[1].tooltip
        assert "missing: seen after other parents" in shown.rows[2].tooltip
        tokens = [segment.num_tokens for segment in text.explain().segments]
        assert [row.facts for row in shown.rows] == [
            f"{tokens[0]} tokens · stored",
            f"{tokens[1]} tokens · missing",
            f"{tokens[2]} tokens · missing",
        ]

    def test_what_the_last_run_computed_is_told_from_what_it_found(self, lm: bp.LanguageModel) -> None:
        run(lm)
        text = prompt(lm, CONTEXT, REQUEST, "\nAnswer:")
        result = text()
        assert drawn(text).states == ["stored", "stored", "computed"]
        assert read_svg(result.picture().svg()).states == ["stored", "stored", "computed"]
        assert drawn(result.text).states == ["stored", "stored", "computed"]
        text()
        assert drawn(text).states == ["stored", "stored", "stored"]

    def test_a_picture_of_a_result_has_its_numbers_and_asks_nobody(self, lm: bp.LanguageModel) -> None:
        run(lm)
        result = prompt(lm, CONTEXT, REQUEST, "\nAnswer:")()
        lm.db.close()
        picture = result.picture()
        counts = dict.fromkeys(State, 0)
        for segment in picture.segments:
            counts[segment.state] += segment.num_tokens or 0
        assert counts[State.STORED] == result.num_cached_tokens > 0
        assert counts[State.COMPUTED] == result.num_computed_tokens > 0

    def test_what_follows_a_run_is_missing_beside_what_the_run_computed(self, lm: bp.LanguageModel) -> None:
        run(lm, CONTEXT)
        result = prompt(lm, CONTEXT, REQUEST)()
        assert drawn(result.text + ENDING).states == ["stored", "stored", "missing"]
        assert drawn(result.text + ENDING, after=result).states == ["stored", "computed", "missing"]

    def test_what_a_model_computed_before_it_changed_is_missing(self, lm: bp.LanguageModel, gpt2: Any) -> None:
        text = prompt(lm)
        text()
        with torch.no_grad():
            gpt2.transformer.h[0].mlp.c_fc.weight.add_(1.0)
        assert drawn(text).states == ["missing", "missing", "missing"]

    def test_without_a_model_states_are_unknown_and_widths_are_characters(self) -> None:
        shown = drawn(bp.Text(CONTEXT) + REQUEST)
        assert shown.states == ["unknown", "unknown"]
        assert [row.facts for row in shown.rows] == [
            f"{len(CONTEXT)} characters · unknown",
            f"{len(REQUEST)} characters · unknown",
        ]
        assert any("this text belongs to no model" in text for text in shown.texts)
        assert shown.rows[0].width / shown.rows[1].width == pytest.approx(len(CONTEXT) / len(REQUEST), rel=1e-3)

    def test_a_database_that_does_not_answer_does_not_keep_a_text_from_being_shown(self, lm: bp.LanguageModel) -> None:
        text = prompt(lm)
        lm.db.close()
        shown = drawn(text)
        assert len(shown.rows) == 3
        assert set(shown.states) <= {"unknown", "missing"}

    def test_an_empty_text_is_an_empty_picture(self, lm: bp.LanguageModel) -> None:
        for text in (bp.Text(""), lm.text("")):
            shown = drawn(text)
            assert (shown.rows, shown.texts) == ([], ["an empty text"])

    def test_nothing_is_loaded_computed_or_counted(self, tmp_path: Path, tokenizer: Any) -> None:
        tiny_gpt2().save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        with bp.open(tmp_path / "db") as db:
            run(bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db), CONTEXT, REQUEST)
        with bp.open(tmp_path / "db") as db:
            lm = bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db)
            text, counters = prompt(lm, CONTEXT, REQUEST, "more"), dataclasses.asdict(db.counters)
            assert read_svg(text._repr_html_()).states == ["stored", "stored", "missing"]
            assert not lm.is_loaded
            assert dataclasses.asdict(db.counters) == counters
            assert text.model_repr is None


class TestPlaces:
    def test_widths_are_proportional_to_tokens_and_segments_begin_where_their_parents_end(
        self, lm: bp.LanguageModel
    ) -> None:
        text = joined(lm)
        shown, explanation = drawn(text), text.explain()
        tokens = [segment.num_tokens or 0 for segment in explanation.segments]
        scale = shown.rows[0].width / tokens[0]
        assert [row.width for row in shown.rows] == pytest.approx([count * scale for count in tokens], abs=0.01)
        for row, segment in zip(shown.rows, explanation.segments, strict=True):
            ends = [shown.rows[parent].x + shown.rows[parent].width for parent in segment.parents]
            assert row.x == pytest.approx(max(ends, default=shown.rows[0].x), abs=0.01)

    def test_branches_and_joins_have_all_their_edges(self, lm: bp.LanguageModel) -> None:
        assert drawn(joined(lm)).edges == [(0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 4), (4, 5)]

    def test_a_segment_of_a_token_beside_thousands_is_still_as_wide_as_it_is(self) -> None:
        shown = drawn(bp.Text("a" * 9_999) + "b")
        assert shown.rows[0].width / shown.rows[1].width == pytest.approx(9_999, rel=0.01)
        assert [row.label[:1] for row in shown.rows] == ["a", "b"]


class TestManySegments:
    def test_rows_are_bounded_and_what_is_folded_is_counted(self) -> None:
        text = sum((bp.Text(f"turn {number}\n") for number in range(500)), start=bp.Text(""))
        shown = read_svg(text.picture().svg(max_rows=20))
        assert len(shown.rows) <= 20
        assert sum(row.num_segments for row in shown.rows) == 500
        (fold,) = (row for row in shown.rows if row.num_segments > 1)
        assert fold.label == f"… {fold.num_segments} segments"
        assert any(text.startswith(f"{fold.num_segments} of 500 segments are folded") for text in shown.texts)
        assert shown.rows[0].label == "turn 0\\n"
        assert shown.rows[-1].label == "turn 499\\n"

    def test_where_one_state_ends_and_another_begins_is_never_folded(self) -> None:
        states = [State.STORED] * 200 + [State.MISSING] * 3 + [State.STORED] * 200
        shown = read_svg(picture_of_states(states).svg(max_rows=12))
        singles = {row.segment: row.state for row in shown.rows if row.num_segments == 1}
        assert singles.items() >= {199: "stored", 200: "missing", 202: "missing", 203: "stored"}.items()
        assert sum(row.num_segments for row in shown.rows) == len(states)

    def test_where_states_alternate_the_fold_says_how_many_are_in_each(self) -> None:
        states = [State.STORED, State.MISSING] * 50
        shown = read_svg(picture_of_states(states).svg(max_rows=10))
        assert len(shown.rows) == 10
        (fold,) = (row for row in shown.rows if row.num_segments > 1)
        assert fold.facts == "91 tokens · 45 stored, 46 missing"

    def test_what_there_is_no_room_for_is_shortened_and_said_when_pointed_at(self) -> None:
        states = [State.STORED, State.MISSING, State.COMPUTED] * 3_000
        picture = dataclasses.replace(picture_of_states(states), remarks=("states are unknown: " + "a word " * 1_000,))
        shown = read_svg(picture.svg(max_rows=10))
        (fold,) = (row for row in shown.rows if row.num_segments > 1)
        assert fold.facts.startswith("8,991 tokens · 2,997 stored, ")
        assert fold.facts.endswith("…")
        assert fold.tooltip.endswith("\n2,997 stored, 2,997 computed now, 2,997 missing")
        assert max(len(text) for text in shown.texts) <= 124
        remark = "".join(text for text in shown.texts if "word" in text)
        assert 400 < len(remark) <= 500
        assert remark.endswith("…")

    def test_edges_to_folded_segments_go_to_the_fold(self) -> None:
        segments = [segment(State.STORED), *(segment(State.STORED, 0) for _ in range(50))]
        segments.append(segment(State.STORED, *range(1, 51)))
        shown = read_svg(Picture(segments=tuple(segments), unit=Unit.TOKENS).svg(max_rows=5))
        assert [row.num_segments for row in shown.rows] == [1, 1, 48, 1, 1]
        assert shown.edges == [(0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 4)]

    def test_fewer_than_three_rows_are_refused(self) -> None:
        with pytest.raises(PromptError, match="2 rows"):
            bp.Text("a").picture().svg(max_rows=2)


def segment(state: State, *parents: int) -> PicturedSegment:
    return PicturedSegment(text="a", parents=parents, state=state, size=1)


def picture_of_states(states: list[State]) -> Picture:
    parents = [() if number == 0 else (number - 1,) for number in range(len(states))]
    segments = (segment(state, *before) for state, before in zip(states, parents, strict=True))
    return Picture(segments=tuple(segments), unit=Unit.TOKENS)


def covered(row: DrawnRow) -> range:
    """The numbers of the segments that a row stands for."""
    return range(row.segment, row.segment + row.num_segments)


class TestTexts:
    def test_whatever_texts_hold_is_shown_and_means_nothing(self) -> None:
        text = bp.Text(HOSTILE + "</svg><script>alert(1)</script>]]>") + "\x00\ufffe\r" + "]]>&lt;"
        shown = drawn(text)
        assert shown.tags == {"svg", "style", "rect", "path", "g", "title", "text"}
        assert shown.rows[0].label.startswith("<script>alert(1)</script>\\x1b[31m[bold]\\")
        assert "\\x1b[31m[bold]\\u202e&amp;</svg><script>alert(1)</script>]]>" in shown.rows[0].tooltip
        assert shown.rows[1].label == "\\x00\\ufffe\\r"
        assert shown.rows[2].label == "]]>&lt;"
        assert "</svg><script>alert(1)</script>" in shown.rows[0].tooltip

    def test_long_texts_are_shortened_and_shown_whole_when_pointed_at(self, lm: bp.LanguageModel) -> None:
        long = " Every word of this is needed." * 8
        row = drawn(lm.text(long) + " short").rows[0]
        assert row.label.endswith("…")
        assert long.startswith(row.label[:-1])
        assert row.tooltip.startswith(f"{long}\n\nsegment 0, at the beginning, {len(long)} characters, ")

    def test_a_text_of_a_megabyte_makes_a_small_picture(self) -> None:
        svg = bp.Text("word " * 200_000).picture().svg()
        assert len(svg) < 20_000
        assert "(998,000 characters more)" in read_svg(svg).rows[0].tooltip

    @given(graphs(alphabet="ab<&\n\x00\u202e\U0001f642م", max_leaves=12), st.integers(min_value=3, max_value=8))
    def test_every_picture_parses_and_has_every_segment_once(self, text: bp.Text, max_rows: int) -> None:
        shown, segments = read_svg(text.picture().svg(max_rows=max_rows)), text.segments()
        numbers = [number for row in shown.rows for number in covered(row)]
        assert numbers == list(range(len(segments)))
        assert len(shown.rows) <= max_rows
        row_of = {number: at for at, row in enumerate(shown.rows) for number in covered(row)}
        at = {segment: row_of[number] for number, segment in enumerate(segments)}
        edges = {(at[parent], at[child]) for child in segments for parent in child.parents}
        assert sorted(shown.edges) == sorted(edge for edge in edges if edge[0] != edge[1])


class TestOutput:
    def test_the_same_prompt_gives_the_same_picture_and_no_ids_that_could_collide(self, lm: bp.LanguageModel) -> None:
        first, again = (joined(lm).picture().svg() for _ in range(2))
        assert first == again
        assert "id" not in read_svg(first).attributes
        assert "url(" not in first

    def test_a_notebook_and_a_file_get_the_same_drawing(self, lm: bp.LanguageModel, tmp_path: Path) -> None:
        text = joined(lm)
        text.picture().save(tmp_path / "prompt.svg")
        saved = (tmp_path / "prompt.svg").read_text(encoding="utf-8")
        assert saved == text._repr_svg_() == text._repr_html_() == text.picture().svg()

    def test_a_notebook_is_given_html_and_svg_of_a_text_and_html_of_a_result(self, lm: bp.LanguageModel) -> None:
        from IPython.core.formatters import DisplayFormatter

        formatter: Any = DisplayFormatter()
        text = joined(lm)
        shown, _ = formatter.format(text)
        assert shown == {"text/plain": repr(text), "text/html": text._repr_html_(), "image/svg+xml": text._repr_svg_()}
        result = text()
        shown, _ = formatter.format(result)
        assert shown["text/html"] == result._repr_html_()

    def test_states_differ_by_more_than_colour(self, lm: bp.LanguageModel) -> None:
        run(lm, CONTEXT)
        result = prompt(lm, CONTEXT, REQUEST)()
        svg = (result.text + ENDING).picture(after=result).svg()
        assert ".missing{stroke-dasharray" in svg
        assert [row.facts.split(" · ")[1] for row in read_svg(svg).rows] == ["stored", "computed now", "missing"]

    def test_print_draws_it_in_characters(self, lm: bp.LanguageModel) -> None:
        run(lm, CONTEXT)
        lines = str(joined(lm).picture()).splitlines()
        assert lines[0].split() == ["segment", "tokens", "state", "after"]
        rows = [line.split() for line in lines[1:7]]
        assert [row[0] for row in rows] == list("012345")
        assert rows[0][-1] == "stored"
        assert rows[4][-4:] == ["missing", "1,", "2,", "3"]
        assert all("█" in line or "▐" in line or "▕" in line for line in lines[1:7])
        assert lines[8].startswith("stored: 1 segment, ")

    def test_a_text_that_obeys_terminals_is_printed_harmlessly(self) -> None:
        string = str(bp.Text("[bold]\x1b[31m\u202e").picture())
        assert "[bold]\\x1b[31m\\u202e" in string
        assert not any(character in string for character in "\x1b\u202e")


@pytest.mark.parametrize(("name", "states"), [("prompt", {"stored", "computed"}), ("tree", {"stored"})])
def test_pictures_of_the_documentation_are_drawn_as_pictures_are_drawn_now(name: str, states: set[str]) -> None:
    path = Path(__file__).parents[2] / "docs" / "pictures" / f"{name}.svg"
    svg = path.read_text(encoding="utf-8")
    assert set(read_svg(svg).states) == states
    head = bp.Text("a").picture().svg().partition("<style>")[2].partition("</style>")[0]
    assert head in svg, "the style has changed: run python docs/pictures/make.py"


def test_several_models_on_one_database_have_pictures_of_their_own(make_lm: MakeLM, lm: bp.LanguageModel) -> None:
    run(lm)
    other = make_lm(tiny_gpt2(seed=1), db=lm.db)
    assert drawn(prompt(other)).states == ["missing"] * 3
    assert drawn(prompt(lm)).states == ["stored"] * 3
