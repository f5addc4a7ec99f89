"""What the file of a module defines: the standard by which a patch in this process is recognised."""

from __future__ import annotations

import ast
import dis
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import resolve_name
from types import CodeType, FunctionType
from typing import Any

PLAIN = (type(None), bool, int, float, complex, str, bytes)
"""Types of values whose `repr` is all of them."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A name that is given a plain value."""

    value: Any


@dataclass(frozen=True, slots=True)
class Import:
    """A name that is imported from a module."""

    module: str
    name: str


Binding = Constant | Import | None
"""What a statement gives a name; None for anything else, which only running it could tell."""


class Source:
    """The code in the file of a module, by the qualified names of what it defines."""

    def __init__(self, code: CodeType, package: str) -> None:
        self._package = package
        self._module = code
        self._codes: dict[str, list[CodeType]] = {}
        for each in _nested(code):
            self._codes.setdefault(each.co_qualname, []).append(each)

    def codes(self, qualname: str) -> list[CodeType]:
        """Return the code of functions and class bodies of this qualified name: several where one is conditional."""
        return self._codes.get(qualname, [])

    @cache  # noqa: B019 - a source lives as long as the process
    def bindings(self, owner: str) -> dict[str, list[Binding]]:
        """Return what the statements of the module (an empty `owner`), or of a class, give to each name."""
        found: dict[str, list[Binding]] = {}
        for code in self.codes(owner) if owner else [self._module]:
            for name, binding in _stores(code, self._package):
                found.setdefault(name, []).append(binding)
        return found

    def is_assigned(self, name: str) -> bool:
        """Whether a function of the module assigns the module's name `name`."""
        codes = (code for each in self._codes.values() for code in each if name in code.co_names)
        return any(
            step.opname == "STORE_GLOBAL" and step.argval == name for c in codes for step in dis.get_instructions(c)
        )


@cache
def source_of(module: str) -> Source | None:
    """Return what the file of a module defines; None for a module without a file, such as a notebook."""
    spec: Any = getattr(sys.modules.get(module), "__spec__", None)
    try:
        code = spec.loader.get_code(spec.name)
    except (AttributeError, ImportError, OSError, SyntaxError):
        return None
    return Source(code, spec.parent or "") if isinstance(code, CodeType) else None


def is_defined(function: FunctionType) -> bool:
    """Whether a function is, with its defaults, one that the file of its module defines."""
    source = source_of(str(function.__globals__.get("__name__")))
    code = function.__code__
    return source is not None and code in source.codes(code.co_qualname) and _has_own_defaults(function)


def _nested(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _nested(constant)


def _stores(code: CodeType, package: str) -> Iterator[tuple[str, Binding]]:
    """Yield the names that the statements of a module or of a class store, with what they give them."""
    history: list[dis.Instruction] = []
    imported = ""
    for step in dis.get_instructions(code):
        if step.opname in ("CACHE", "EXTENDED_ARG"):
            continue
        if step.opname == "IMPORT_NAME":
            imported = _imported(str(step.argval), history[-2].argval, package)
        if step.opname in ("STORE_NAME", "STORE_GLOBAL"):
            yield str(step.argval), _binding(history[-1], imported)
        history.append(step)


def _imported(name: str, level: Any, package: str) -> str:
    return resolve_name("." * level + name, package) if isinstance(level, int) and level and package else name


def _binding(before: dis.Instruction, imported: str) -> Binding:
    if before.opname == "IMPORT_FROM":
        return Import(imported, str(before.argval))
    is_constant = before.opname in ("LOAD_CONST", "LOAD_SMALL_INT") and type(before.argval) in PLAIN
    return Constant(before.argval) if is_constant else None


def _has_own_defaults(function: FunctionType) -> bool:
    """Whether all defaults are those in the file, as far as these are literals."""
    if not function.__defaults__ and not function.__kwdefaults__:
        return True
    literals = _literals(function.__code__)
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    held = dict(zip(reversed(arguments), reversed(function.__defaults__ or ()), strict=False))
    held |= function.__kwdefaults__ or {}
    return all(repr(held[name]) == literal for name, literal in literals.items() if name in held)


@cache
def _literals(code: CodeType) -> dict[str, str]:
    """Return the literals among the defaults of a function in its file, by the names of its arguments."""
    last = max((position[1] or 0 for position in code.co_positions()), default=0)
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 : last]
    text = "".join(lines)
    try:
        tree = ast.parse(("if True:\n" if text[:1].isspace() else "") + text)
    except SyntaxError:
        return {}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    defined = next((node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == code.co_name), None)
    return dict(_pairs(defined.args)) if defined else {}


def _pairs(arguments: ast.arguments) -> Iterator[tuple[str, str]]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [*zip(reversed(positional), reversed(arguments.defaults), strict=False)]
    for argument, default in [*defaults, *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]:
        if default is not None:
            try:
                yield argument.arg, repr(ast.literal_eval(default))
            except ValueError:
                continue
