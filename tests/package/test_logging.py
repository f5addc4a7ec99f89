"""The library prints nothing: each module has one logger of its own name, and whoever uses the library decides."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import backprompt_db as bp
from backprompt_db.prompt.representation import Part
from backprompt_db.store.contract import Key
from tests.support.databases import address, new_part
from tests.support.operations import flip_a_bit

PACKAGE = Path(bp.__file__).parent
ROOT = PACKAGE.parent
SPEAKS = ("cli", "demo", "__main__")
"""What talks to people: its output is what it is for."""

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0].removesuffix(".py") not in (*SPEAKS, "migrations")
}

READ = """
import logging, sys
import backprompt_db as bp
from tests.support.databases import wanted
if sys.argv[2:]:
    logging.getLogger("backprompt_db").addHandler(logging.NullHandler())
with bp.open(sys.argv[1]) as db:
    assert db.fetch(wanted("a")) == {}
    assert db.counters.num_quarantined == 1
"""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_is_printed() -> None:
    speaking = {"print", "pprint", "sys.stdout.write", "sys.stderr.write", "traceback.print_exc", "warnings.warn"}
    streams = {"sys.stdout", "sys.stderr", "sys.__stdout__"}
    for module, tree in MODULES.items():
        assert [name for name, _ in calls(tree) if name in speaking] == [], module
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & streams, module


def test_a_module_has_one_logger_of_its_own_name() -> None:
    for module, tree in MODULES.items():
        made = [ast.unparse(call) for name, call in calls(tree) if name.endswith("getLogger")]
        named = [
            ast.unparse(node)
            for node in tree.body
            if isinstance(node, ast.Assign) and "getLogger" in ast.unparse(node.value)
        ]
        assert made in ([], ["logging.getLogger(__name__)"]), module
        assert named == ["logger = logging.getLogger(__name__)"] * len(made), module
        used = {name for name, _ in calls(tree) if name.startswith("logging.")}
        assert used <= {"logging.getLogger"}, f"{module}: the root logger belongs to whoever uses the library"
        logs = any(name.startswith("logger.") for name, _ in calls(tree))
        assert logs == bool(made), f"{module}: a logger that nothing is logged with, or the other way round"


def test_arguments_are_left_to_the_logger() -> None:
    for module, tree in MODULES.items():
        messages = [call.args[0] for name, call in calls(tree) if name.startswith("logger.") and call.args]
        assert all(isinstance(message, ast.Constant) for message in messages), module


@pytest.fixture
def damaged(open_db: Callable[..., bp.Database]) -> Path:
    db = open_db()
    db.put([new_part("a")])
    db.close()
    assert db.directory is not None
    flip_a_bit(db.directory, Key(address("a"), Part.LOGITS))
    return db.directory


def test_a_program_that_configures_nothing_sees_warnings_once_on_stderr(damaged: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ, str(damaged)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert done.stderr == f"quarantined a damaged logits part of {address('a').hex()}\n"


def test_a_handler_that_does_nothing_silences_the_library(damaged: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ, str(damaged), "silent"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_importing_the_package_touches_no_logging_configuration() -> None:
    script = (
        "import logging, backprompt_db as bp; bp.open, bp.Database\n"
        "assert not logging.getLogger().handlers and not logging.getLogger('backprompt_db').handlers\n"
        "assert logging.getLogger('backprompt_db').level == logging.NOTSET"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
