"""Patches: what the code of a model finds in this process and the files of its libraries do not put there."""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType
from typing import Any

from backprompt_db.compute.inference.reach import Place, cells_of, functions_of
from backprompt_db.compute.inference.source import PLAIN, Binding, Constant, Import, Source, is_defined, source_of

LIBRARIES = sys.stdlib_module_names | {
    "torch", "transformers", "transformers_modules", "peft", "accelerate", "numpy", "builtins", "packaging",
}  # fmt: skip
"""Packages whose code has versions, or a hash in its name."""


def is_library(module: object) -> bool:
    """Whether a module of this name belongs to a package whose code has versions."""
    return str(module).split(".")[0] in LIBRARIES


def is_patched(place: Place) -> bool:
    """Whether a place holds something else than what the file of its module puts there, as far as the file tells."""
    source = source_of(place.module)
    value = place.value
    if isinstance(value, ModuleType) or place.module.split(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return False
    if source is None:
        return not is_library(place.module) and _is_more_than_code(place)
    if type(value) in PLAIN:
        return _is_another_value(place, source)
    functions = [*functions_of(value)]
    if not all(map(is_original, functions)):
        return True
    if is_library(place.module) and not all(map(_is_of_library, functions)):
        return True
    if not _is_what_is_bound(place, source, functions):
        return True
    return not functions and not isinstance(value, type) and not is_library(type(value).__module__)


def is_original(function: FunctionType) -> bool:
    """Whether a function is as its file defines it, and closes over no values of a user's."""
    if _is_generated(function):
        return True
    return is_defined(function) and (_is_of_library(function) or not _values_in(function))


def _is_of_library(function: FunctionType) -> bool:
    return is_library(function.__globals__.get("__name__"))


def _is_generated(function: FunctionType) -> bool:
    """Whether a library has made the function out of a string, as dataclasses do."""
    return function.__code__.co_filename == "<string>" and _is_of_library(function)


def _values_in(function: FunctionType) -> list[Any]:
    """Return what a function closes over besides functions, classes and modules."""
    kinds = (type, ModuleType)
    return [v for v in cells_of(function).values() if not isinstance(v, kinds) and not [*functions_of(v)]]


def _is_more_than_code(place: Place) -> bool:
    """Whether something in a module without a file is more than the code of a method, which is in the id anyway."""
    functions = [*functions_of(place.value)]
    if place.owner and functions:
        return any(_held_by(function) or _values_in(function) for function in functions)
    return not isinstance(place.value, type) and not place.owner


def _held_by(function: FunctionType) -> list[Any]:
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]
    return [value for value in values if value is not None]


def _is_another_value(place: Place, source: Source) -> bool:
    """Whether a number, a string or None is not what a statement of the file assigns."""
    bindings = source.bindings(place.owner).get(place.name)
    if bindings is None:
        return bool(place.owner) and place.value is not None and not place.name.startswith("__")
    if source.codes(place.path):
        return True
    is_told = all(isinstance(each, Constant) for each in bindings)
    values = [repr(each.value) for each in bindings if isinstance(each, Constant)]
    return is_told and repr(place.value) not in values and not source.is_assigned(place.name)


def _is_what_is_bound(place: Place, source: Source, functions: list[FunctionType]) -> bool:
    """Whether a function, a class or another object is the one that the file defines or imports under the name."""
    value = place.value
    defined = source.codes(place.path)
    if defined and isinstance(value, type):
        return (value.__module__, value.__qualname__) == (place.module, place.path)
    if defined:
        return any(function.__code__ in defined for function in functions)
    bindings: list[Binding] = source.bindings(place.owner).get(place.name, [])
    imports = [each for each in bindings if isinstance(each, Import)]
    return len(imports) != len(bindings) or not imports or any(_is_imported(each, value, functions) for each in imports)


def _is_imported(binding: Import, value: Any, functions: list[FunctionType]) -> bool:
    origin = vars(sys.modules.get(binding.module, object)).get(binding.name, value)
    defined = source.codes(binding.name) if (source := source_of(binding.module)) else []
    return origin is value or any(function.__code__ in defined for function in functions)
