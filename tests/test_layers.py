"""Imports point down. Importing the package, or answering hits, loads no torch."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import backprompt_db

ROOT = Path(backprompt_db.__file__).parent
LAYERS = [
    ["errors", "failpoints"],
    [
        *("text", "keys", "representation", "generated", "display", "explanation", "explanation_views", "pictures"),
        *("run_plan", "run_plan_views", "template"),
    ],
    ["store", "catalog", "codec", "config", "fidelity", "filling", "manifest", "replacement", "secret"],
    [
        *("access", "collector", "counting", "creation", "database", "files", "filesystem", "flights", "maintenance"),
        *("notes", "opening", "pending", "sealing", "storage", "tier", "writer"),
    ],
    ["compute"],
    ["model", "pairs"],
    ["cli", "demo", "integrations", "__init__", "__main__"],
]
"""From the bottom. A name stands for a module or for a package with all that is in it."""

FORBIDDEN = {"store": {"torch", "sqlalchemy", "sqlite3", "alembic", "text"}, "catalog": {"torch", "lmdb", "store"}}
MAY_USE_MODELS = {
    f"compute.{name}"
    for name in (
        "crosscheck",
        "decoding",
        "fingerprint",
        "forward",
        "head",
        "kvcache",
        "limits",
        "outline",
        "rows",
        "runtime",
        "selfcheck",
    )
}
MAY_IMPORT_MODELS_LATE = {"compute.source", "compute.pretrained", "compute.tokens", "model"}


class Import(NamedTuple):
    """One name that a module imports: `compute.plan` for our own modules, the full name for others."""

    name: str
    is_ours: bool
    is_late: bool
    """Inside a function."""
    is_for_types: bool
    """Under `if TYPE_CHECKING`."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


PATHS = {module_name(path): path for path in sorted(ROOT.rglob("*.py")) if "migrations" not in path.parts}


def walk(node: ast.AST, *, is_late: bool = False, is_for_types: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield from (entry._replace(is_late=is_late, is_for_types=is_for_types) for entry in names_of(child))
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_check = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from walk(child, is_late=is_late or is_function, is_for_types=is_for_types or is_check)


def names_of(node: ast.Import | ast.ImportFrom) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        full = [alias.name for alias in node.names]
    else:
        assert node.level == 0, "imports are absolute"
        full = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in full:
        package, _, rest = name.partition(".")
        is_ours = package == "backprompt_db"
        yield Import(ours(rest) if is_ours else name, is_ours, is_late=False, is_for_types=False)


def ours(name: str) -> str:
    """The longest beginning of a dotted name that is a module."""
    parts = name.split(".") if name else []
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in PATHS:
            return ".".join(parts[:length])
    return "__init__"


IMPORTS = {name: list(walk(ast.parse(path.read_text()))) for name, path in PATHS.items()}


def layer(module: str) -> int:
    (found,) = [number for number, names in enumerate(LAYERS) if module.split(".", maxsplit=1)[0] in names]
    return found


@pytest.mark.parametrize("module", PATHS)
def test_a_module_is_in_one_layer_and_imports_point_down(module: str) -> None:
    names = [name for names in LAYERS for name in names]
    assert names.count(module.split(".", maxsplit=1)[0]) == 1
    above = [entry.name for entry in IMPORTS[module] if entry.is_ours and layer(entry.name) > layer(module)]
    # The package registers how a pair of model and tokenizer is run, and its version is read from it.
    assert [name for name in above if name != "__init__"] == []


@pytest.mark.parametrize("module", [module for module in PATHS if layer(module) < 6])
def test_only_the_top_imports_the_package_itself(module: str) -> None:
    assert "__init__" not in {entry.name for entry in IMPORTS[module] if entry.is_ours}


@pytest.mark.parametrize("module", [module for module in PATHS if module.split(".")[0] in FORBIDDEN])
def test_the_store_and_the_catalog_know_nothing_of_each_other(module: str) -> None:
    forbidden = FORBIDDEN[module.split(".", maxsplit=1)[0]]
    assert {entry.name.split(".")[0] for entry in IMPORTS[module]} & forbidden == set()


@pytest.mark.parametrize("module", sorted(set(PATHS) - MAY_USE_MODELS))
def test_only_some_modules_know_models(module: str) -> None:
    names = {
        entry
        for entry in IMPORTS[module]
        if not entry.is_ours and (entry.name.startswith("torch.nn") or entry.name.split(".")[0] == "transformers")
    }
    if module in MAY_IMPORT_MODELS_LATE or layer(module) == 6:
        names = {entry for entry in names if not entry.is_late}
    assert {entry.name for entry in names if not entry.is_for_types} == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {entry.name for entry in imports if entry.is_ours and not entry.is_late and not entry.is_for_types}
        for module, imports in IMPORTS.items()
    }
    graph = {module: names - {"__init__", module} for module, names in graph.items() if module != "__init__"}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def loaded_after(script: str) -> set[str]:
    script = f"import sys\n{script}\nprint(*(name for name in sys.modules if '.' not in name))"
    command = [sys.executable, "-W", "error", "-c", script]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "sqlalchemy", "lmdb", "numpy", "huggingface_hub", "rich", "typer"}
    assert loaded_after("import backprompt_db as bp; bp.__version__, bp.Text") & (heavy - {"numpy"}) == set()
    assert loaded_after("import backprompt_db") & heavy == set()


def test_using_a_database_loads_no_torch(tmp_path: Path) -> None:
    script = f"import backprompt_db as bp\nwith bp.open({str(tmp_path / 'db')!r}) as db: db.fetch({{bytes(32): []}})"
    loaded = loaded_after(script)
    assert "lmdb" in loaded
    assert loaded & {"torch", "transformers"} == set()


def test_the_public_names_are_those_that_exist() -> None:
    assert sorted(backprompt_db.__all__) == dir(backprompt_db)
    assert len(set(backprompt_db.__all__)) == len(backprompt_db.__all__)
    for name in backprompt_db.__all__:
        assert getattr(backprompt_db, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        backprompt_db.nothing  # noqa: B018


def public_names(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Functions, classes and their methods that are public and defined in the module."""
    for name, value in vars(module).items():
        is_defined_here = getattr(value, "__module__", None) == module.__name__
        if name.startswith("_") or not is_defined_here or not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        yield name, value
        if inspect.isclass(value):
            members = ((member, each) for member, each in vars(value).items() if not member.startswith("_"))
            documented = (property, staticmethod, classmethod)
            yield from (
                (f"{name}.{member}", each)
                for member, each in members
                if inspect.isfunction(each) or isinstance(each, documented) or hasattr(each, "attrname")
            )


@pytest.mark.parametrize("module", [module for module in PATHS if module not in {"__main__", "demo.__main__"}])
def test_every_public_name_says_what_it_is(module: str) -> None:
    name = "backprompt_db" if module == "__init__" else f"backprompt_db.{module}"
    loaded = importlib.import_module(name)
    assert loaded.__doc__, name
    silent = [each for each, value in public_names(loaded) if not inspect.getdoc(value)]
    assert silent == []


def test_the_table_names_only_what_exists() -> None:
    tops = {module.split(".")[0] for module in PATHS}
    missing = set(itertools.chain(*LAYERS)) - tops
    assert missing <= {"__main__", "flights", "collector"}
