"""All error messages, read from the code when the site is built."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_PAGE = "troubleshooting.md"
_PLACE = "<!-- messages -->"
_PACKAGE = Path(__file__).parents[2] / "backprompt_db"

GAP = "…"
"""Stands for the words of a message that differ from case to case."""


class Message(NamedTuple):
    """An error that the code raises at one place: its class, its message and its hint."""

    kind: str
    message: str
    hint: str


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the messages in their place on their page."""
    return markdown.replace(_PLACE, "\n".join(_sections())) if page.file.src_uri == _PAGE else markdown


def messages() -> list[Message]:
    """Return all messages of the package, each once, as templates."""
    kinds = {kind.name for kind in _kinds()}
    found = (message for path in sorted(_PACKAGE.rglob("*.py")) for message in _messages(path, kinds))
    return list(dict.fromkeys(found))


def _sections() -> Iterator[str]:
    every = messages()
    for kind in _kinds():
        yield f"### {kind.name}\n\n{' '.join((ast.get_docstring(kind) or '').split())}\n"
        rows = [f"| {_cell(each.message)} | {_cell(each.hint)} |" for each in every if each.kind == kind.name]
        yield "\n".join(["| message | what to do |", "|---|---|", *rows, ""] if rows else [])


def _kinds() -> list[ast.ClassDef]:
    tree = ast.parse((_PACKAGE / "errors.py").read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def _messages(path: Path, kinds: set[str]) -> Iterator[Message]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = _constants(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds and node.args:
            hints = [each.value for each in node.keywords if each.arg == "hint"]
            message = _template(node.args[0], constants)
            if message.strip(f"{GAP} ") and hints:
                yield Message(node.func.id, message, _template(hints[0], constants))


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    """Return the values that a module gives to its names."""
    return {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _template(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_template(each, constants) for each in values)
        case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name) if name in constants:
            return _template(constants[name], constants)
        case ast.BinOp(left=left, right=right, op=ast.Add()):
            return _template(left, constants) + _template(right, constants)
    return GAP


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[").replace("_", "\\_")
