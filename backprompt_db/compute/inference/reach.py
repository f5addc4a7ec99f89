"""The code that a model's classes reach: where it is found, and what holds it.

It begins with the methods of every pass. What a function reads by name is looked up in its module and in the modules
that it names there; an attribute may be that of any class that was reached. So a little more is found than is run.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property, lru_cache, partial
from operator import is_
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils.generic import GeneralInterface

_ENTRIES = frozenset({"forward", "__call__", "_wrapped_call_impl", "_call_impl", "__getattr__"})
"""The methods with which every pass begins."""

_LOSS = frozenset({"loss_function", "LOSS_MAPPING"})
"""Names that are read where labels are given only, which passes are not."""

_SETTLED = sys.stdlib_module_names | {"builtins", "numpy", "torch"}
"""Packages whose functions are compared with their files, but not followed; `torch.nn` is."""

_CACHED: Any = type(lru_cache(int))


_CACHES = (DynamicCache, DynamicLayer, DynamicSlidingWindowLayer)
"""What keys and values pass through, whether or not the code of a model names it."""


class Place(NamedTuple):
    """A name in a module, in a class or in a table of functions, and what is found there."""

    namespace: Mapping[str, Any]
    module: str
    owner: str
    """The qualified name of the class; empty in a module or a table."""
    name: str
    value: Any

    @property
    def path(self) -> str:
        """The qualified name in the module."""
        return f"{self.owner}.{self.name}" if self.owner else self.name


class Reach:
    """Everything that some classes of modules reach, as it is when this is made."""

    def __init__(self, kinds: Iterable[type], *, attention: str) -> None:
        self._attention = attention
        self._names = set(_ENTRIES)
        self._places: dict[tuple[int, str], Place] = {}
        self._classes: dict[type, None] = {}
        self._functions: dict[FunctionType, None] = {}
        for kind in (*kinds, torch.Tensor, *_CACHES):
            self._add_class(kind)
        self._walk()
        self._held: list[Any] = [*self._observe()]

    @property
    def places(self) -> list[Place]:
        """The places where code is found, or what it reads."""
        return list(self._places.values())

    @property
    def is_current(self) -> bool:
        """Whether all that was found is still there, unchanged: about 2,000 comparisons of objects."""
        held = self._observe()
        return len(held) == len(self._held) and all(map(is_, held, self._held))

    def _observe(self) -> list[Any]:
        """Return the objects that are found now, and those that the classes and functions hold."""
        held: list[Any] = [namespace.get(name) for namespace, _, _, name, _ in self._places.values()]
        for kind in self._classes:
            held += vars(kind).values()
        for function in self._functions:
            held += (function.__code__, function.__defaults__, function.__closure__)
            held += (*(function.__kwdefaults__ or {}).values(), *function.__dict__.values())
            for cell in function.__closure__ or ():
                held += _contents(cell)
        return held

    def _walk(self) -> None:
        num_found = -1
        while num_found != (num_found := len(self._places) + len(self._names) + len(self._classes)):
            for kind in list(self._classes):
                for name in self._names & vars(kind).keys():
                    self._add(kind, vars(kind), kind.__module__, name, owner=kind.__qualname__)

    def _add(self, holder: object, namespace: Mapping[str, Any], module: str, name: str, *, owner: str = "") -> None:
        if (id(holder), name) not in self._places:
            value = namespace[name]
            self._places[id(holder), name] = Place(namespace, module, owner, name, value)
            self._follow(value)
            if type(value) is dict and not owner:
                self._add_table(value)

    def _add_table(self, table: dict[str, Any]) -> None:
        for name, each in list(table.items()):
            if isinstance(each, FunctionType):
                self._add(table, table, each.__module__, name)

    def _follow(self, value: Any) -> None:
        if isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, GeneralInterface):
            self._add_class(type(value))
            if self._attention in value:
                self._add(value, value, type(value).__module__, self._attention)
        for function in functions_of(value):
            self._add_function(function)

    def _add_class(self, kind: type) -> None:
        for each in kind.__mro__:
            if each is torch.Tensor or _is_followed(each.__module__):
                self._classes.setdefault(each)

    def _add_function(self, function: FunctionType) -> None:
        if function in self._functions:
            return
        self._functions[function] = None
        if _is_followed(str(function.__globals__.get("__name__"))):
            names = names_in(function.__code__) - _LOSS
            self._names |= names
            self._add_globals(function, names)

    def _add_globals(self, function: FunctionType, names: frozenset[str]) -> None:
        for holder, name in reads_of(function, names):
            self._add(holder, holder, str(holder.get("__name__")), name)


def functions_of(value: Any) -> Iterator[FunctionType]:
    """Yield the function that a value is, and those inside it: what it wraps, and what it closes over."""
    queue, seen = [value], set()
    while queue:
        each = queue.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, FunctionType):
            yield each
            queue += cells_of(each).values()
        queue += _wrapped(each)


def cells_of(function: FunctionType) -> dict[str, Any]:
    """Return what a function closes over, by name; without the class that `super()` closes over, and empty cells."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: value for name, cell in cells if name != "__class__" for value in _contents(cell)}


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function and of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_of(constant)


def names_in(code: CodeType) -> frozenset[str]:
    """Return the names of globals and attributes that a function, or one inside it, mentions."""
    return frozenset(name for each in codes_of(code) for name in each.co_names)


def reads_of(function: FunctionType, names: frozenset[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the namespaces of modules, with the names there, that a function that mentions `names` may read."""
    queue = [(function.__globals__, globals_in(function.__code__) & names)]
    seen = {id(function.__globals__)}
    while queue:
        namespace, read = queue.pop()
        for name in sorted(read & namespace.keys()):
            yield namespace, name
            value = namespace[name]
            if isinstance(value, ModuleType) and id(vars(value)) not in seen:
                seen.add(id(vars(value)))
                queue.append((vars(value), names))


@cache
def globals_in(code: CodeType) -> frozenset[str]:
    """Return the names that a function, or one inside it, looks up in its module."""
    steps = (step for each in codes_of(code) for step in dis.get_instructions(each))
    return frozenset(str(step.argval) for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))


def _contents(cell: CellType) -> list[Any]:
    """Return what a cell holds as a list, which is empty for a name that has no value yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _wrapped(value: Any) -> list[Any]:
    if isinstance(value, classmethod | staticmethod | MethodType):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, partial | cached_property):
        return [value.func]
    return [value.__wrapped__] if isinstance(value, FunctionType | _CACHED) and hasattr(value, "__wrapped__") else []


def _is_followed(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] not in _SETTLED or module.startswith("torch.nn.")
