"""The HTML page of a database's prompts, in one file: markup, style, scripts and contents. It needs no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backprompt_db.views import palette

_ASSETS = Path(__file__).parent / "page_assets"
_SCRIPTS = (
    *("words", "elements", "contents", "tree", "view", "boxes", "segments", "colours"),
    *("search", "tokens", "drawing", "mirror", "panel", "page", "events", "main"),
)
"""Each imports only from those before it."""

_IMPORT = re.compile(r"^import [^;]*;\n", re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)
_PLACE = re.compile(r"\{\{ ([a-z ]+) \}\}")


def html_page(contents: Mapping[str, Any], *, title: str) -> str:
    """Return the page; `operations.graph_page.page_contents` makes its `contents`. Markup in texts is shown as text."""
    style, script = palette.page_colours() + _read("page.css"), _script()
    values = {
        "title": html.escape(title),
        "style": style,
        "style hash": _source_hash(style),
        "script": script,
        "script hash": _source_hash(script),
        "contents": _packed(contents),
    }
    # All at once: what is put in must not be searched for places.
    return _PLACE.sub(lambda place: values[place[1]], _read("page.html"))


def _script() -> str:
    """Return all scripts as one: modules that lie in a page cannot import each other."""
    modules = (_EXPORT.sub("", _IMPORT.sub("", _read(f"{name}.js"))) for name in _SCRIPTS)
    return "\n".join(modules)


def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _source_hash(source: str) -> str:
    """Return the hash by which a Content-Security-Policy allows a script or a style in the page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _packed(contents: Mapping[str, Any]) -> str:
    # Deflated, because columns repeat themselves; in base64, in which no text can end the element that holds it.
    unpacked = json.dumps(contents, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(unpacked.encode())).decode()
