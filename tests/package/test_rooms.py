"""Imports run down the rooms, in no circle. Importing the package, or answering hits, loads no torch."""

from __future__ import annotations

import ast
import importlib
import inspect
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
FLOORS = [
    {"errors"},
    {"system"},
    {"views"},
    {"prompt"},
    {"catalog"},
    {"store"},
    {"codec"},
    {"database"},
    {"compute", "operations"},
    {"model"},
    {"integrations", "cli"},
    {"__init__", "__main__"},
]
"""From the bottom. Rooms on one floor do not know each other. `docs/design.md` shows the same house."""

FORBIDDEN = {
    "views": {"torch", "prompt", "transformers"},
    "store": {"torch", "sqlalchemy", "sqlite3", "alembic", "catalog"},
    "catalog": {"torch", "lmdb", "store"},
}
MAY_USE_MODELS = ("compute.inference.", "compute.adopt.crosscheck")
MAY_IMPORT_MODELS_LATE = {"compute.tokens", "model"}


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


def room(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def floor(module: str) -> int:
    (found,) = [number for number, rooms in enumerate(FLOORS) if room(module) in rooms]
    return found


def ours_of(module: str) -> set[str]:
    """Our own modules that a module imports, late or for types alone too; the package itself is none of them."""
    return {entry.name for entry in IMPORTS[module] if entry.is_ours} - {"__init__", module}


def test_imports_run_down_the_rooms() -> None:
    up = [
        (module, name)
        for module in PATHS
        for name in ours_of(module)
        if room(name) != room(module) and floor(name) >= floor(module)
    ]
    assert up == []


def test_nothing_imports_in_a_circle() -> None:
    graph = {module: ours_of(module) for module in PATHS if module != "__init__"}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_the_root_holds_two_modules() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {"errors", "model", "__init__", "__main__"}
    assert {room(module) for module in PATHS} == set.union(*FLOORS)


def test_only_the_top_imports_the_package_itself() -> None:
    below = [module for module in PATHS if floor(module) < floor("cli")]
    assert [module for module in below if "__init__" in {entry.name for entry in IMPORTS[module]}] == []


def test_rooms_do_not_know_what_is_not_theirs() -> None:
    known = {
        (module, entry.name)
        for module in PATHS
        for entry in IMPORTS[module]
        if room(entry.name) in FORBIDDEN.get(room(module), set())
    }
    assert known == set()


def test_only_inference_knows_models() -> None:
    def is_allowed(module: str, entry: Import) -> bool:
        may_be_late = module in MAY_IMPORT_MODELS_LATE or floor(module) >= floor("cli")
        return entry.is_for_types or module.startswith(MAY_USE_MODELS) or (entry.is_late and may_be_late)

    known = {
        (module, entry.name)
        for module in PATHS
        for entry in IMPORTS[module]
        if not entry.is_ours and (entry.name.startswith("torch.nn") or room(entry.name) == "transformers")
        if not is_allowed(module, entry)
    }
    assert known == set()


def loaded_after(script: str) -> set[str]:
    script = f"import sys\n{script}\nprint(*(name for name in sys.modules if '.' not in name))"
    command = [sys.executable, "-W", "error", "-c", script]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split())


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


@pytest.mark.parametrize("name", ["demo.smollm2.smollm2_directory", "keys.Address", "opening.open_database"])
def test_each_path_that_documentation_once_named_works_first(name: str) -> None:
    module, _, member = name.rpartition(".")
    assert "backprompt_db" in loaded_after(f"from backprompt_db.{module} import {member}")


@pytest.mark.parametrize(
    "name", ["demo.smollm2.smollm2_directory", "keys.Address", "opening.open_database", "representation.ModelRepr"]
)
def test_each_of_them_is_imported_in_any_way(name: str) -> None:
    module, _, member = name.rpartition(".")
    for statement, used in (
        (f"import backprompt_db.{module}", f"backprompt_db.{name}"),
        (f"import backprompt_db.{module} as old", f"old.{member}"),
        (f"from backprompt_db.{module} import {member}", member),
        ("import importlib.util, backprompt_db", f"importlib.util.find_spec('backprompt_db.{module}').name"),
    ):
        loaded_after(f"{statement}\nassert {used}")
    with pytest.raises(AttributeError, match="nothing"):
        importlib.import_module(f"backprompt_db.{module}").nothing  # noqa: B018


def test_paths_that_documentation_once_named_go_on_to_work() -> None:
    script = (
        "from backprompt_db.keys import Address\nfrom backprompt_db.representation import Part\n"
        "from backprompt_db.opening import open_database\nfrom backprompt_db.demo.smollm2 import smollm2_directory\n"
        "import backprompt_db as bp\nassert bp.open is open_database"
    )
    assert "numpy" in loaded_after(script)


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


def test_every_public_name_says_what_it_is() -> None:
    silent = []
    for module in sorted(set(PATHS) - {"__main__", "integrations.lm_eval.__main__"}):
        loaded = importlib.import_module("backprompt_db" if module == "__init__" else f"backprompt_db.{module}")
        silent += [] if loaded.__doc__ else [module]
        silent += [f"{module}.{name}" for name, value in public_names(loaded) if not inspect.getdoc(value)]
    assert silent == []
