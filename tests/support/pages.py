"""Pages of small databases, and what is packed into a page."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import StoredPart
from backprompt_db.operations.forest import Forest, forest
from backprompt_db.operations.graph_page import TokenScores, page_contents
from backprompt_db.prompt.representation import Origin, Part
from backprompt_db.views.page import html_page
from tests.support.catalogs import MODEL, OTHER_WEIGHTS, new_catalog, origin_of

NOW = 1_000_000.0
"""When the pages are made."""
DAY = 86400.0
SIZES = {Part.SCORES: 100, Part.LOGITS: 2_000, Part.KV: 30_000, Part.CONTINUATIONS: 400}

MARKUP = "</script><img src=x onerror=\"document.title='broken into'\"><b>bold</b>&amp;"
RIGHT_TO_LEFT = "\u05e9\u05dc\u05d5\u05dd world \u202eoverride\u202c"
EMOJI = "👩‍👩‍👧‍👦 family, a flag 🇳🇴, and e\u0301"
CONTROL = "a\0b\x07\x1b[31m {{ script }}\u2028line"
HOSTILE = [MARKUP, RIGHT_TO_LEFT, EMOJI, CONTROL, "\\u0041 <!-- ${x} `", "x" * 5_000]


def prompts() -> Iterator[tuple[Origin, set[Part], int, float]]:
    """What was computed, what is kept of it, how often it was used, and how many seconds before now the last time."""
    context = origin_of("Pick the endpoint for the request, please.\n", compute_seconds=2.0)
    yield context, set(Part), 5, 60
    branches = [origin_of(f"Document {name} of three words", context) for name in ("one", "two", "three")]
    for number, branch in enumerate(branches):
        yield branch, set(Part), number, DAY * (3 - number)
    yield origin_of("Which of these answers the question?", *branches), {Part.SCORES, Part.LOGITS}, 0, DAY * 9
    for label in ("users", "orders"):
        yield origin_of(f" GET /{label}", branches[1]), {Part.SCORES}, 1, 30
    yield origin_of("Under another model", weights_id=OTHER_WEIGHTS), {Part.SCORES}, 0, DAY * 90
    yield origin_of("In a namespace", namespace="tenant"), {Part.KV}, 100, 10
    yield origin_of("after something that is gone", origin_of("gone")), {Part.SCORES}, 0, DAY


def forest_of(path: Path, *texts: str) -> Forest:
    """The prompts above, or one segment of each text."""
    with new_catalog(path / "catalog.sqlite") as catalog:
        catalog.save(MODEL)
        for text in texts:
            catalog.record([StoredPart(origin_of(text).address, Part.SCORES, 100, origin_of(text))], at=NOW - DAY)
        for origin, parts, num_hits, seconds in () if texts else prompts():
            _record(catalog, origin, parts, num_hits, NOW - seconds)
        return forest(catalog, at=NOW)


def chain_of(path: Path, num_segments: int) -> Forest:
    """Segments of a few words, each after the one before."""
    origins = [origin_of("the beginning")]
    for number in range(1, num_segments):
        origins.append(origin_of(f"step {number}", origins[-1]))
    return _forest_of_scores(path, origins)


def fan_of(path: Path, num_segments: int) -> Forest:
    """Segments of a few words, all but the first after the first."""
    context = origin_of("the beginning")
    return _forest_of_scores(
        path, [context, *(origin_of(f"end {number}", context) for number in range(1, num_segments))]
    )


def _forest_of_scores(path: Path, origins: list[Origin]) -> Forest:
    with new_catalog(path / "catalog.sqlite") as catalog:
        catalog.record([StoredPart(origin.address, Part.SCORES, 100, origin) for origin in origins], at=NOW - DAY)
        return forest(catalog, at=NOW)


def _record(catalog: Catalog, origin: Origin, parts: set[Part], num_hits: int, used_at: float) -> None:
    stored = [StoredPart(origin.address, part, SIZES[part] + len(origin.text), origin) for part in parts]
    catalog.record(stored, at=used_at - 5)
    if num_hits:
        catalog.touch({origin.address: num_hits}, at=used_at)


def write_page(
    path: Path,
    found: Forest,
    tokens: Mapping[int, TokenScores] | None = None,
    *,
    max_text: int = 2_000,
    title: str = "Prompts",
) -> Path:
    """Make a page of a forest, in a directory."""
    page = path / "page.html"
    page.write_text(html_page(page_contents(found, tokens, max_text=max_text), title=title), encoding="utf-8")
    return page


def packed_in(page: Path) -> dict[str, Any]:
    """What a page was made with."""
    [packed] = re.findall(r'<script type="text/plain" id="contents">([^<]*)</script>', page.read_text(encoding="utf-8"))
    contents: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return contents
