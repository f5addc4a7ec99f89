"""Fenced blocks of a Markdown page, and running them in order, as a reader would who copies one after the other."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CODE = {"python", "console", "bash", "sh", "shell", "pycon"}
"""Languages of what is run."""

DATA = {"text", "output", "json", "yaml", "ini"}
"""Languages of what is only read. `output` is what the block before prints."""

_FENCE = re.compile(r'^( *)```(\w*)(?: title="([^"\n]+)")?\n(.*?)^\1```$', flags=re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- not run: (\S.*?) -->\s*\Z")
_ROOT = Path(__file__).parents[2]
_TIMEOUT_SECONDS = 300
_CHECKER = doctest.OutputChecker()


class Block(NamedTuple):
    """One fenced block."""

    language: str
    content: str
    line: int
    reason: str | None
    """Why it is not run, where the page says so."""
    title: str | None
    """The file that it is, where the page says so: it is written, not run."""
    output: str | None
    """What the page shows that it prints."""


def blocks(markdown: str) -> list[Block]:
    """Return the blocks of a page, in order; what one prints is not a block but belongs to it."""
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(markdown):
        content = re.sub(rf"^{match[1]}", "", match[4], flags=re.MULTILINE)
        between, end = markdown[end : match.start()], match.end()
        if match[2] == "output" and found and not between.strip():
            found[-1] = found[-1]._replace(output=content)
            continue
        marker = _MARKER.search(between)
        line = markdown.count("\n", 0, match.start()) + 1
        found.append(Block(match[2], content, line, marker and marker[1], match[3], None))
    return found


def is_run(block: Block) -> bool:
    """Whether a block is code, or a file that code reads, and its page does not say that it is not run."""
    return (block.language in CODE or block.title is not None) and block.reason is None


class Reader:
    """Runs blocks in one directory: Python in one namespace, commands in one shell."""

    def __init__(self, directory: Path, *, name: str) -> None:
        self._name, self._directory = name, directory
        self._namespace: dict[str, Any] = {"__name__": name}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        settings = {"HOME": str(directory), "XDG_CACHE_HOME": str(directory / ".cache"), "PYTHONPATH": str(_ROOT)}
        quiet = {"COLUMNS": "110", "TERM": "dumb", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._shell = subprocess.Popen(
            ["bash", "--norc"],  # noqa: S607 - wherever it is
            cwd=directory,
            env=os.environ | settings | quiet | {"PATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, block: Block) -> None:
        """Run a block, or write it where it is a file; it fails where its page shows another output."""
        if block.title is not None:
            (self._directory / block.title).write_text(block.content, encoding="utf-8")
        elif block.language == "python":
            printed = self._python(block)
            self._compare(block.output, printed, block)
        elif block.language == "console":
            for command, expected in commands(block.content):
                self._compare(expected, self._command(command), block)
        else:
            raise AssertionError(f"{self._name}:{block.line}: write python or console, or say why it is not run")

    def close(self) -> None:
        """End the shell, and close what the page has opened."""
        self._shell.communicate("exit\n", timeout=_TIMEOUT_SECONDS)
        for value in self._namespace.values():
            if type(value).__name__ == "Database":
                value.close()

    def _python(self, block: Block) -> str:
        printed = io.StringIO()
        source = "\n" * block.line + block.content  # so that a traceback has the page's lines
        with contextlib.redirect_stdout(printed):
            exec(compile(source, self._name, "exec"), self._namespace)  # noqa: S102 - it is our own page
        return printed.getvalue()

    def _command(self, command: str) -> str:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{command}\nprintf '\\nEND %s\\n' $?\n")
        self._shell.stdin.flush()
        lines: list[str] = []
        for line in self._shell.stdout:
            if line.startswith("END "):
                assert line == "END 0\n", f"{self._name}: {command}\n{''.join(lines)}"
                return "".join(lines).removesuffix("\n")
            lines.append(line)
        raise AssertionError(f"{self._name}: the shell ended at {command}\n{''.join(lines)}")

    def _compare(self, expected: str | None, printed: str, block: Block) -> None:
        """`...` stands for anything, and any white space for any other: tables are as wide as what is in them."""
        if expected is not None:
            is_same = _CHECKER.check_output(expected, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            assert is_same, f"{self._name}:{block.line} prints\n{printed}"


def commands(content: str) -> Iterator[tuple[str, str | None]]:
    """Yield the commands of a console block, each with the output that follows it, if any."""
    for chunk in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
        command, _, output = chunk.partition("\n")
        while command.endswith("\\"):
            line, _, output = output.partition("\n")
            command += f"\n{line.removeprefix('> ')}"
        yield command, output if output.strip() else None
