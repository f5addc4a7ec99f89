"""Reading rows from JSON lines, CSV, TSV and plain lines: each row with its place, or with what is wrong with it."""

from __future__ import annotations

import csv
import enum
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from backprompt_db.errors import PromptError

_STDIN = Path("-")
_BOM = b"\xef\xbb\xbf"
_MAX_FIELD_NBYTES = 1 << 30
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
LINE = "line"
"""The name of the only column of plain lines, and of JSON lines that are strings."""


class Form(enum.StrEnum):
    """What a file is made of."""

    JSONL = "jsonl"
    """An object, or a string, on each line."""
    CSV = "csv"
    """A header with the names of the columns, then rows."""
    TSV = "tsv"
    LINES = "lines"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is."""

    file: str
    line: int
    """The number of the line, from 1; of a row with several lines, the last."""

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


@dataclass(frozen=True, slots=True)
class Row:
    """A row that could be read."""

    place: Place
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that could not be used, and why."""

    place: Place
    problem: str


def rows(paths: Iterable[Path], form: Form | None) -> Iterator[Row | Broken]:
    """Yield the rows of files, one after the other; `-` is stdin. Empty lines are skipped.

    A file's form is that of its name, unless given. Raises `PromptError` for a file that cannot be read.
    """
    for path in paths:
        with _opened(path) as file:
            yield from _READERS[form or form_of(path)](file, str(path))


def form_of(path: Path) -> Form:
    """Return what a file is made of, by its name."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return Form.JSONL
    return Form(suffix[1:]) if suffix in _DELIMITERS else Form.LINES


def num_lines(paths: Iterable[Path]) -> int | None:
    """Return how many lines files have; None for stdin and pipes, which can be read only once."""
    total = 0
    for path in paths:
        if path == _STDIN or not path.is_file():
            return None
        with _opened(path) as file:
            total += sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    return total


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if path == _STDIN:
        yield sys.stdin.buffer
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}", hint="Give another file.") from error
    with file:
        yield file


def _jsonl(file: BinaryIO, name: str) -> Iterator[Row | Broken]:
    return (_row(place, line, _of_json) for place, line in _lines(file, name))


def _plain(file: BinaryIO, name: str) -> Iterator[Row | Broken]:
    return (_row(place, line, lambda line: {LINE: line.decode()}) for place, line in _lines(file, name))


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[Place, bytes]]:
    for number, line in enumerate(file, start=1):
        content = line.removeprefix(_BOM) if number == 1 else line
        if content.strip():
            yield Place(name, number), content.removesuffix(b"\n").removesuffix(b"\r")


def _row(place: Place, line: bytes, read: Callable[[bytes], Mapping[str, str]]) -> Row | Broken:
    try:
        return Row(place, read(line))
    except UnicodeDecodeError:
        return Broken(place, "it is not UTF-8")
    except json.JSONDecodeError as error:
        return Broken(place, f"it is not JSON, from character {error.pos + 1} on")
    except ValueError as error:
        return Broken(place, str(error))
    except RecursionError:
        return Broken(place, "it is nested too deeply")


def _of_json(line: bytes) -> dict[str, str]:
    value = json.loads(line.decode())
    if isinstance(value, str):
        return {LINE: value}
    if not isinstance(value, dict):
        raise ValueError("it is neither an object nor a string")
    return {name: _string(each) for name, each in value.items() if _is_text(each)}


def _is_text(value: object) -> bool:
    """Whether a value can stand in a prompt: a string or a number."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _string(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class _Decoded:
    """Lines as strings. Unlike a generator, it can continue after a line that is not UTF-8."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_lines = 0

    def __iter__(self) -> _Decoded:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.num_lines += 1
        return (line.removeprefix(_BOM) if self.num_lines == 1 else line).decode()


def _csv(file: BinaryIO, name: str, delimiter: str = ",") -> Iterator[Row | Broken]:
    csv.field_size_limit(min(sys.maxsize, _MAX_FIELD_NBYTES))
    lines = _Decoded(file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError:
            yield Broken(Place(name, lines.num_lines), "it is not UTF-8")
        except csv.Error as error:
            yield Broken(Place(name, lines.num_lines), str(error))
        else:
            if cells and header:
                yield _of_cells(Place(name, lines.num_lines), header, cells)
            header = header or cells


def _of_cells(place: Place, header: list[str], cells: list[str]) -> Row | Broken:
    if len(cells) != len(header):
        return Broken(place, f"it has {len(cells)} cells, and the header {len(header)}")
    return Row(place, dict(zip(header, cells, strict=True)))


def _tsv(file: BinaryIO, name: str) -> Iterator[Row | Broken]:
    return _csv(file, name, _DELIMITERS[".tsv"])


_READERS: dict[Form, Callable[[BinaryIO, str], Iterator[Row | Broken]]] = {
    Form.JSONL: _jsonl,
    Form.CSV: _csv,
    Form.TSV: _tsv,
    Form.LINES: _plain,
}
