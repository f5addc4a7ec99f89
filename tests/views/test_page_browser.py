"""The page in headless Chromium: it draws what the forest says, and does what somebody asks for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from backprompt_db.operations.forest import Forest, Measure
from backprompt_db.operations.graph_page import TokenScores
from tests.support.browser import Item, PageInBrowser, browser, require_browser
from tests.support.pages import EMOJI, HOSTILE, MARKUP, RIGHT_TO_LEFT, chain_of, fan_of, forest_of, write_page


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """A browser that all tests of this module share."""
    require_browser()
    with browser() as opened:
        yield opened


@pytest.fixture
def found(tmp_path: Path) -> Forest:
    return forest_of(tmp_path)


OpenPage = Callable[..., PageInBrowser]


@pytest.fixture
def open_page(driver: Any, tmp_path: Path) -> Iterator[OpenPage]:
    """Open the page of a forest. After the test: no complaint, nothing refused, no request but for the page itself."""
    opened: list[PageInBrowser] = []

    def open_one(found: Forest, tokens: dict[int, TokenScores] | None = None, **options: Any) -> PageInBrowser:
        opened.append(PageInBrowser(driver, write_page(tmp_path, found, tokens, **options)))
        return opened[-1]

    yield open_one
    for page in opened:
        assert page.complaints() == []
        assert {url for url in page.requests() if url != "data:,"} <= {page.url}


@pytest.fixture
def page(open_page: OpenPage, found: Forest) -> PageInBrowser:
    """The page of the example prompts, with the tokens of the first."""
    pieces = re.findall(r" ?\S+|\s+", CONTEXT)
    logprobs = [None, *(-0.5 * number for number in range(1, len(pieces)))]
    tokens = TokenScores(list(range(100, 100 + len(pieces))), logprobs, pieces)
    return open_page(found, {node_of(found, CONTEXT): tokens})


def node_of(found: Forest, text: str) -> int:
    [index] = [index for index, node in enumerate(found.nodes) if node.text == text]
    return index


CONTEXT = "Pick the endpoint for the request, please.\n"
JOIN = "Which of these answers the question?"


class TestDrawing:
    @pytest.mark.parametrize("measure", Measure)
    def test_widths_are_the_sums_of_the_forest(self, page: PageInBrowser, found: Forest, measure: Measure) -> None:
        page.choose("#measure", measure.value)
        items, width = page.items(), page.element("canvas").size["width"]
        assert page.state()["measure"] == measure.value
        sums = found.sums(found.weights(measure))
        scale = width / sum(sums[root] for root in found.roots)
        wide = {index: each * scale for index, each in enumerate(sums) if each * scale >= 1.5}
        assert len(wide) >= 2
        assert {index: items[index].width for index in wide} == pytest.approx(wide, abs=0.1, rel=1e-3)

    def test_children_lie_below_their_first_parent(self, page: PageInBrowser, found: Forest) -> None:
        items = page.items()
        assert len(items) == len(found.nodes)
        for index, node in enumerate(found.nodes):
            assert items[index].words.startswith(node.text[:20])
            above = items[node.parents[0]] if node.parents else None
            assert items[index].row == (1 if above is None else above.row + 1)
            assert above is None or above.x - 0.1 <= items[index].x <= above.x + above.width - items[index].width + 0.1

    def test_the_heaviest_stands_first(self, page: PageInBrowser, found: Forest) -> None:
        sums = found.sums(found.weights(Measure.TOKENS))
        items = sorted((item for item in page.items().values() if item.row == 1), key=lambda item: item.x)
        assert [sums[item.node] for item in items] == sorted((sums[item.node] for item in items), reverse=True)

    def test_a_measure_by_which_nothing_counts_says_so(self, open_page: OpenPage, tmp_path: Path) -> None:
        page = open_page(forest_of(tmp_path, "never used"))
        page.choose("#measure", "seconds")
        page.settle()
        assert page.element("#nothing").is_displayed()
        page.choose("#measure", "tokens")
        page.settle()
        assert not page.element("#nothing").is_displayed()

    def test_colours_are_explained(self, page: PageInBrowser) -> None:
        for colouring, words in {
            "state": ["keys and values", "logits, no keys and values", "scores only"],
            "age": ["longer ago", "used in the last 30 days", "7 days", "24 hours", "hour"],
            "model": ["gpt2 (77777777)", "? (57575757)"],
            "namespace": ["no namespace", "tenant"],
            "hits": ["no hits", "1", "2 to 9", "10 to 99", "100 or more"],
        }.items():
            page.choose("#colouring", colouring)
            assert [each.text for each in page.driver.find_elements("css selector", "#legend li")] == words

    def test_what_is_stored_decides_the_colour(self, page: PageInBrowser, found: Forest) -> None:
        page.items()
        colours = {node: pixel(page, item) for node, item in page.items().items()}
        assert colours[node_of(found, CONTEXT)] == colours[node_of(found, "Document one of three words")]
        assert len({colours[node_of(found, text)] for text in (CONTEXT, JOIN, " GET /users")}) == 3

    def test_an_empty_database_says_what_to_do(self, open_page: OpenPage, tmp_path: Path) -> None:
        empty = Forest((), 0.0, is_whole=True)
        page = open_page(empty)
        page.wait("!document.querySelector('#totals').textContent.startsWith('Unpacking')")
        assert "Nothing is stored here" in page.element("#totals").text
        assert not page.element("canvas").is_displayed()


def pixel(page: PageInBrowser, item: Item) -> tuple[int, ...]:
    """The colour near the lower right corner of a box, where no text is."""
    x, y = item.x + item.width - 5, item.row * 24 + 19
    return tuple(page.ask(f"[...document.querySelector('canvas').getContext('2d').getImageData({x}, {y}, 1, 1).data]"))


class TestPanel:
    def test_a_click_shows_a_segment(self, page: PageInBrowser, found: Forest) -> None:
        assert not page.element("#panel").is_displayed()
        index = node_of(found, CONTEXT)
        page.click_box(page.items()[index])
        assert page.items()[index].is_selected
        assert page.text("#text") == CONTEXT
        facts = page.facts()
        assert found.nodes[index].address.hex().startswith(facts.pop("address").rstrip("…"))
        assert facts == {
            "model": "gpt2 (77777777)",
            "tokens": "7",
            "characters": "43",
            "keys and values": "29.3 KiB",
            "logits": "2.0 KiB",
            "scores": "143 B",
            "what may follow": "443 B",
            "computed in": "2 s",
            "hits": "5",
            "saved": "10 s",
            "made": "1 min before this page",
            "last used": "1 min before this page",
            "with all below": "7 segments, 32 tokens",
        }

    def test_tokens_are_the_stronger_in_colour_the_less_they_were_expected(
        self, page: PageInBrowser, found: Forest
    ) -> None:
        page.click_box(page.items()[node_of(found, CONTEXT)])
        tokens = page.driver.find_elements("css selector", "#text .token")
        assert "".join(str(token.get_property("textContent")) for token in tokens) == CONTEXT
        assert tokens[0].get_attribute("title") == '"Pick" · token 100 · nothing predicts it'
        assert tokens[1].get_attribute("title") == '" the" · token 101 · log-probability -0.500, 60.7%'
        alphas = page.ask(
            "[...document.querySelectorAll('#text .token')].slice(1)"
            ".map(each => parseFloat(getComputedStyle(each).backgroundColor.match(/[0-9.]+(?=\\))/)[0]))"
        )
        assert alphas == pytest.approx([0.75 * 0.5 * number / 8 for number in range(1, len(tokens))], abs=0.01)
        remark = "The stronger a token's colour, the less it was expected. Mean log-probability -2.00, perplexity 7.39."
        assert remark in page.text("#panel"), "in a dark theme, no token is the darker for it"

    def test_without_log_probabilities_there_is_the_text(self, page: PageInBrowser, found: Forest) -> None:
        page.click_box(page.items()[node_of(found, JOIN)])
        assert page.text("#text") == JOIN
        assert "No log-probabilities" in page.text("#panel")

    def test_several_parents_are_links_and_said(self, page: PageInBrowser, found: Forest) -> None:
        index = node_of(found, JOIN)
        page.click_box(page.items()[index])
        links = page.driver.find_elements("css selector", "#parents button")
        assert [link.text for link in links] == [f"Document {name} of three words" for name in ("one", "two", "three")]
        assert "drawn below the first" in page.text("#panel")
        links[2].click()
        assert page.text("#text") == "Document three of three words"
        children = page.driver.find_elements("css selector", "#children button")
        assert [child.text for child in children] == [JOIN]
        children[0].click()
        assert page.items()[index].is_selected

    def test_absent_parents_are_said(self, page: PageInBrowser, found: Forest) -> None:
        page.click_box(page.items()[node_of(found, "after something that is gone")])
        assert "computed after 1 segment not on this page" in page.text("#panel")

    def test_a_shortened_text_says_so(self, open_page: OpenPage, tmp_path: Path) -> None:
        page = open_page(forest_of(tmp_path, "🦜" * 1_000_000), max_text=70)
        page.click_box(page.items()[0])
        assert page.text("#text") == "🦜" * 70
        assert "The first 70 of 1,000,000 characters." in page.text("#panel")
        assert page.facts()["characters"] == "1,000,000"
        assert "only the first 70 characters" in page.text("#remarks")

    def test_without_the_tokenizer_ids_are_shown(self, open_page: OpenPage, tmp_path: Path) -> None:
        tokens = {0: TokenScores([7, 11], [None, -2.0], None)}
        page = open_page(forest_of(tmp_path, "some text"), tokens)
        page.click_box(page.items()[0])
        assert page.text("#text") == "some text"
        assert [each.text for each in page.driver.find_elements("css selector", "#ids .token")] == ["7", "11"]


class TestZoom:
    def test_a_second_click_zooms_in_and_the_path_leads_out(self, page: PageInBrowser, found: Forest) -> None:
        index = node_of(found, "Document two of three words")
        page.click_box(page.items()[index])
        page.click_box(page.items()[index])
        zoomed, width = page.items(), page.element("canvas").size["width"]
        assert zoomed[index].row == 0
        assert (zoomed[index].x, zoomed[index].width) == pytest.approx((0, width), abs=2)
        steps = page.driver.find_elements("css selector", "#path button")
        assert [step.text for step in steps] == [
            f"All {len(found.nodes)} segments",
            "Pick the endpoint for the request, please.↵",
            "Document two of three words",
        ]
        steps[1].click()
        context = page.items()[node_of(found, CONTEXT)]
        assert [context.row, context.width] == pytest.approx([0, width], abs=2)
        page.element("#path button").click()
        assert page.items()[node_of(found, CONTEXT)].row == 1

    def test_keys_walk_zoom_and_leave(self, page: PageInBrowser, found: Forest) -> None:
        page.items()
        page.press(Keys.ARROW_DOWN)
        assert page.text("#text") == CONTEXT
        page.press(Keys.ARROW_DOWN)
        first = page.text("#text")
        page.press(Keys.ARROW_RIGHT)
        assert page.text("#text").startswith("Document ")
        assert page.text("#text") != first
        page.press(Keys.ARROW_LEFT)
        assert page.text("#text") == first
        page.press(Keys.ENTER)
        assert page.items()[node_of(found, first)].row == 0
        page.press(Keys.ESCAPE)
        assert page.items()[node_of(found, CONTEXT)].row == 0
        page.press(Keys.ARROW_UP)
        assert page.text("#text") == CONTEXT
        page.press(Keys.HOME)
        assert page.state()["top"] == "0"
        page.press(Keys.ESCAPE)
        page.settle()
        assert not page.element("#panel").is_displayed()

    def test_plus_and_minus_and_the_wheel_zoom_where_they_are(self, page: PageInBrowser) -> None:
        whole = span(page)
        page.press("+")
        closer = span(page)
        assert closer == pytest.approx(whole / 1.5)
        page.press("-")
        assert span(page) == pytest.approx(whole)
        wheel(page, -500)
        assert span(page) == pytest.approx(whole / 2.718, rel=0.01)
        wheel(page, 5000)
        assert span(page) == pytest.approx(whole)

    def test_a_click_on_what_is_too_narrow_to_draw_makes_it_wider(self, open_page: OpenPage, tmp_path: Path) -> None:
        texts = ["a long one " * 2_000, *(f"short {number}" for number in range(50))]
        page = open_page(forest_of(tmp_path, *texts))
        before = page.items()
        assert len(before) == 1
        width = page.element("canvas").size["width"]
        edge = before[0].x + before[0].width
        page.click_box(Item(-1, edge, width - edge, 1, "", is_selected=False))
        assert len(page.items()) > 10


def span(page: PageInBrowser) -> float:
    state = page.state()
    return float(state["right"]) - float(state["left"])


def wheel(page: PageInBrowser, pixels: int) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    origin = ScrollOrigin.from_element(page.element("canvas"))
    ActionChains(page.driver).scroll_from_origin(origin, 0, pixels).perform()
    page.settle()


class TestSize:
    def test_what_is_narrower_than_a_pixel_is_one_box(self, open_page: OpenPage, tmp_path: Path) -> None:
        page = open_page(fan_of(tmp_path, 5_000))
        assert page.state()["boxes"] == "3"
        page.press("/", "end 4321", Keys.ENTER)
        width = page.element("canvas").size["width"]
        [selected] = [item for item in page.items().values() if item.is_selected]
        assert selected.words.startswith("end 4321,")
        assert 0 <= selected.x <= width - selected.width
        assert selected.width > 20

    def test_a_chain_of_thousands_is_walked_down(self, open_page: OpenPage, tmp_path: Path) -> None:
        page = open_page(chain_of(tmp_path, 3_000))
        page.press("/", "step 2999", Keys.ENTER)
        [selected] = [item for item in page.items().values() if item.is_selected]
        assert selected.words.startswith("step 2999,")
        assert 0 <= selected.row <= page.element("canvas").size["height"] / 24 - 1
        page.element("canvas").click()
        page.press(Keys.HOME)
        assert page.state()["top"] == "0"


class TestSearch:
    def test_matches_are_counted_and_walked_through(self, page: PageInBrowser) -> None:
        page.items()
        page.press("/", "document ")
        page.wait("document.querySelector('#found').textContent === '3 matches'")
        seen = []
        for step in range(1, 4):
            page.press(Keys.ENTER)
            seen.append(page.text("#text"))
            assert page.text("#found") == f"{step} of 3"
        assert sorted(seen) == [f"Document {name} of three words" for name in ("one", "three", "two")]
        page.press(Keys.ENTER)
        assert page.text("#text") == seen[0]
        page.press_shifted(Keys.ENTER)
        assert page.text("#text") == seen[2]

    def test_it_is_a_text_and_no_pattern_in_any_case(self, open_page: OpenPage, tmp_path: Path) -> None:
        texts = ["1+1=2 (sure)", "11=2 sure", "STRASSE", "[a-z]*", "tab\there"]
        page = open_page(forest_of(tmp_path, *texts))
        page.items()
        for query, words in {
            "1+1=2 (SURE)": "1 match",
            "[a-": "1 match",
            ".": "no match",
            "strasse": "1 match",
        }.items():
            page.press("/", query)
            page.wait(f"document.querySelector('#found').textContent === '{words}'")
            page.press(Keys.ESCAPE)
            page.wait("document.querySelector('#found').textContent === ''")

    def test_matches_are_highlighted_in_the_text_and_in_the_tree(self, page: PageInBrowser, found: Forest) -> None:
        index = node_of(found, CONTEXT)
        before = pixel(page, page.items()[index])
        page.press("/", "Pick the END", Keys.ENTER)
        page.settle()
        marked = page.ask("[...CSS.highlights.get('found')].map(range => range.toString())")
        assert marked == ["Pick the end"]
        assert pixel(page, page.items()[index]) != before
        page.press("/", Keys.ESCAPE)
        page.settle()
        assert pixel(page, page.items()[index]) == before

    def test_a_match_far_down_in_a_text_is_scrolled_to(self, open_page: OpenPage, tmp_path: Path) -> None:
        page = open_page(forest_of(tmp_path, "a line\n" * 200 + "the needle"))
        page.items()
        page.press("/", "needle", Keys.ENTER)
        page.settle()
        [top, bottom, first, last] = page.ask(
            "[document.querySelector('#panel'), [...CSS.highlights.get('found')][0]]"
            ".map(each => each.getBoundingClientRect()).flatMap(({top, bottom}) => [top, bottom])"
        )
        assert top <= first < last <= bottom

    def test_no_match_is_said_and_leads_nowhere(self, page: PageInBrowser) -> None:
        page.items()
        page.press("/", "nowhere at all", Keys.ENTER)
        page.settle()
        assert page.text("#found") == "no match"
        assert page.element("#next").get_property("disabled")
        assert not page.element("#panel").is_displayed()


class TestHostileTexts:
    def test_what_follows_the_tokens_is_shown_whatever_start_tokens_are_called(
        self, open_page: OpenPage, tmp_path: Path
    ) -> None:
        page = open_page(forest_of(tmp_path, "Hello world"), {0: TokenScores([1, 7], [None, -2.0], ["<s>", "Hello"])})
        page.click_box(page.items()[0])
        assert page.text("#text") == "<s>Hello world"

    @pytest.mark.parametrize("hostile", HOSTILE)
    def test_a_text_is_shown_as_it_is(self, open_page: OpenPage, tmp_path: Path, hostile: str) -> None:
        page = open_page(forest_of(tmp_path, hostile), max_text=10_000)
        page.click_box(page.items()[0])
        page.element("canvas").click()
        page.settle()
        # NUL is the one character that HTML has no text for: scripts may still set it.
        assert page.text("#text") == hostile
        assert page.driver.title == "Prompts"
        assert page.ask("document.querySelectorAll('img, b').length") == 0

    def test_a_token_in_a_title_is_text(self, open_page: OpenPage, tmp_path: Path) -> None:
        tokens = {0: TokenScores([1], [-1.0], [MARKUP])}
        page = open_page(forest_of(tmp_path, MARKUP), tokens, title=MARKUP)
        page.click_box(page.items()[0])
        assert page.text("#text") == MARKUP
        assert page.driver.title == MARKUP
        assert page.ask("document.querySelectorAll('img, b').length") == 0

    def test_texts_from_right_to_left_stand_to_the_right(self, open_page: OpenPage, tmp_path: Path) -> None:
        page = open_page(forest_of(tmp_path, RIGHT_TO_LEFT))
        page.click_box(page.items()[0])
        assert page.ask("getComputedStyle(document.querySelector('#text')).direction") == "rtl"

    def test_emoji_are_not_cut_into_halves(self, open_page: OpenPage, tmp_path: Path) -> None:
        texts = [EMOJI * 20, "🦜" * 400]
        page = open_page(forest_of(tmp_path, *texts))
        for item in page.items().values():
            assert "\ufffd" not in item.words.encode("utf-8", "replace").decode()
            assert "?" not in item.words


class TestEverybody:
    def test_the_tree_speaks(self, page: PageInBrowser, found: Forest) -> None:
        page.items()
        page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
        selected = [item for item in page.items().values() if item.is_selected]
        active = page.element("canvas").get_attribute("aria-activedescendant")
        assert [f"node{item.node}" for item in selected] == [active]
        levels = page.ask("[...document.querySelectorAll('[role=treeitem]')].map(each => [each.id, each.ariaLevel])")
        depths = {f"node{index}": depth(found, index) for index in range(len(found.nodes))}
        assert {name: int(level) for name, level in levels} == depths

    def test_everything_that_can_be_used_has_a_name(self, page: PageInBrowser, found: Forest) -> None:
        page.click_box(page.items()[node_of(found, JOIN)])
        nameless = page.ask(
            "[...document.querySelectorAll('button, input, select, canvas, aside, nav')]"
            ".filter(each => !(each.ariaLabel || each.textContent.trim() || each.labels?.length)).map(each => each.id)"
        )
        assert nameless == []

    @pytest.mark.parametrize("width", [320, 390, 760])
    def test_in_a_narrow_window_everything_can_be_reached(self, page: PageInBrowser, found: Forest, width: int) -> None:
        size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": False}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            page.click_box(page.items()[node_of(found, CONTEXT)])
            page.settle()
            assert page.ask("document.documentElement.scrollWidth") == width
            assert page.ask("document.querySelector('#next').getBoundingClientRect().right") <= width
            assert page.ask("document.querySelector('canvas').clientHeight") > 100
        finally:
            page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def test_it_follows_the_colour_scheme(self, page: PageInBrowser, found: Forest) -> None:
        page.items()
        paper = {}
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            page.settle()
            paper[scheme] = pixel(page, Item(-1, 0, 300, 12, "", is_selected=False))
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        assert sum(paper["light"][:3]) > 700
        assert sum(paper["dark"][:3]) < 150


def depth(found: Forest, index: int) -> int:
    parents = found.nodes[index].parents
    return 1 + (depth(found, parents[0]) if parents else 0)
