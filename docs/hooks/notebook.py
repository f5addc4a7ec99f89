"""The tutorial's page, made of its notebook: cells and what they showed when it was run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_NOTEBOOK = "tutorial.ipynb"
_PAGE = "tutorial.md"


def on_config(config: Any) -> Any:
    """List the tutorial's page in the navigation, if there is a notebook."""
    if (Path(config["docs_dir"]) / _NOTEBOOK).exists():
        config["nav"].insert(1, {"Tutorial": _PAGE})
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add the tutorial's page, if there is a notebook."""
    notebook = Path(config["docs_dir"]) / _NOTEBOOK
    if notebook.exists():
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        content = "\n\n".join(part for cell in cells for part in _cell(cell))
        files.append(File.generated(config, _PAGE, content=content))
    return files


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
    elif source.strip():
        yield f"```python\n{source}\n```"
        for output in cell["outputs"]:
            yield from _output(output)


def _output(output: dict[str, Any]) -> Iterator[str]:
    data = output.get("data", {})
    if "text/html" in data:
        yield f'<div class="notebook-output">{_line("".join(data["text/html"]))}</div>'
    elif "image/svg+xml" in data:
        yield f'<div class="notebook-output">{_line("".join(data["image/svg+xml"]))}</div>'
    else:
        text = "".join(output.get("text", []) or data.get("text/plain", []))
        if text.strip():
            yield f"```output\n{text.rstrip()}\n```"


def _line(html: str) -> str:
    """Return HTML as one line: Markdown would end it at an empty one."""
    return html.strip().replace("\n", "&#10;" if "<pre" in html else " ")
