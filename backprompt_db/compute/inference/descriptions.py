"""Descriptions of patches: all that a function or an object is, as plain values that are the same in every process."""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Mapping
from enum import Enum
from functools import cached_property, partial
from logging import Logger
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np
import torch
from torch import nn

from backprompt_db.compute.inference.patches import is_library
from backprompt_db.compute.inference.reach import cells_of, codes_of, names_in, reads_of
from backprompt_db.compute.inference.source import PLAIN, is_defined

_NAMED = (torch.dtype, torch.device, torch.Size, Enum, type(Ellipsis), range, slice)
_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)


class Indescribable(Exception):
    """A value of a kind that has no description; the argument is the name of its type."""


def describe(value: Any) -> object:
    """Return a description that differs wherever a pass could. Raises `Indescribable`, naming the type."""
    return _Description().of(value)


class _Description:
    """One description: what occurs in it again, also inside itself, is named by its number."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, Any]] = {}

    def of(self, value: Any) -> object:
        kind = type(value)
        if kind in PLAIN or isinstance(value, _NAMED):
            return repr(value)
        if id(value) in self._seen:
            return ["again", self._seen[id(value)][0]]
        self._seen[id(value)] = len(self._seen), value
        for kinds, part in _PARTS:
            if isinstance(value, kinds):
                return [_name(kind), part(self, value)]
        return [_name(kind), self._object(value)]

    def _tensor(self, value: torch.Tensor) -> object:
        if type(value) not in _TENSORS or value.is_meta:
            raise Indescribable(type(value).__name__)
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return [str(value.dtype), list(value.shape), hashlib.sha256(flat.numpy().data).hexdigest()]

    def _array(self, value: Any) -> object:
        if value.dtype.hasobject:
            raise Indescribable("array of objects")
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]

    def _sequence(self, value: Any) -> object:
        return [[self.of(each) for each in value], self._state(value)]

    def _set(self, value: Any) -> object:
        if not all(type(each) in PLAIN for each in value):
            raise Indescribable("set of objects")
        return sorted(map(repr, value))

    def _mapping(self, value: Any) -> object:
        return [[[self.of(key), self.of(each)] for key, each in value.items()], self._state(value)]

    def _method(self, value: Any) -> object:
        return [self.of(value.__func__), self.of(getattr(value, "__self__", None))]

    def _property(self, value: Any) -> object:
        return self.of(value.fget)

    def _partial(self, value: Any) -> object:
        return [self.of(value.func), self.of(value.args), self.of(value.keywords)]

    def _cached_property(self, value: Any) -> object:
        return self.of(value.func)

    def _named(self, value: Any) -> object:
        return str(getattr(value, "__name__", None) or value.name)

    def _builtin(self, value: Any) -> object:
        owner = value.__self__
        return [value.__module__, value.__qualname__, _name(owner) if isinstance(owner, type) else _owner(owner)]

    def _descriptor(self, value: Any) -> object:
        return [_name(value.__objclass__), value.__name__]

    def _class(self, value: Any) -> object:
        if is_library(value.__module__):
            return _name(value)
        members = {name: each for name, each in vars(value).items() if name not in _MACHINERY}
        return [_name(value), [self.of(each) for each in value.__bases__], _sorted(members, self)]

    def _function(self, value: FunctionType) -> object:
        held = [value.__defaults__, value.__kwdefaults__, {**vars(value)}, cells_of(value)]
        facts = [_name(value), *(self.of(each) for each in held)]
        if is_library(value.__globals__.get("__name__")) and is_defined(value):
            return facts
        read = [[name, self.of(space[name])] for space, name in reads_of(value, names_in(value.__code__))]
        return [*facts, [_code(each) for each in codes_of(value.__code__)], read]

    def _object(self, value: Any) -> object:
        if (name := _name_of_singleton(value)) is not None:
            return name
        is_opaque = not hasattr(value, "__dict__") and not hasattr(type(value), "__slots__")
        if is_opaque or (is_library(type(value).__module__) and not isinstance(value, nn.Module)):
            raise Indescribable(type(value).__name__)
        return [self.of(type(value)), self._state(value)]

    def _state(self, value: Any) -> object:
        slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
        return _sorted({name: getattr(value, name, None) for name in slots} | getattr(value, "__dict__", {}), self)


_MACHINERY = frozenset({"__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "_abc_impl"})
"""What every class has, whatever it does."""

_PARTS: list[tuple[Any, Any]] = [
    (torch.Tensor, _Description._tensor),
    (np.ndarray | np.generic, _Description._array),
    (list | tuple | deque, _Description._sequence),
    (set | frozenset, _Description._set),
    (Mapping, _Description._mapping),
    (FunctionType, _Description._function),
    (MethodType | classmethod | staticmethod, _Description._method),
    (property, _Description._property),
    (partial, _Description._partial),
    (cached_property, _Description._cached_property),
    (BuiltinFunctionType, _Description._builtin),
    (MethodDescriptorType | WrapperDescriptorType, _Description._descriptor),
    (ModuleType | Logger, _Description._named),
    (type, _Description._class),
]


def _name_of_singleton(value: Any) -> str | None:
    """Return the name that the module of an object's class has for it, such as `dataclasses.MISSING`; None for most."""
    module = type(value).__module__
    names = vars(sys.modules[module]).items() if module in sys.modules else ()
    return next((f"{module}.{name}" for name, each in names if each is value), None)


def _sorted(values: dict[str, Any], description: _Description) -> object:
    return [[name, description.of(each)] for name, each in sorted(values.items())]


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _code(code: CodeType) -> object:
    """Return what a function does, without where it is written."""
    constants = [each for each in code.co_consts if not isinstance(each, CodeType)]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return [code.co_code.hex(), [*map(repr, constants)], names, code.co_exceptiontable.hex(), code.co_flags]


def _owner(value: Any) -> str:
    """Return the name of the module that a built-in function belongs to. Raises `Indescribable` for other objects."""
    if value is not None and not isinstance(value, ModuleType):
        raise Indescribable(f"method of {type(value).__name__}")
    return value.__name__ if value is not None else ""


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
