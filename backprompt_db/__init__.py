"""The database for prompt representations: compute a piece of a prompt once, keep it for good.

>>> import backprompt_db as bp
>>> with bp.open(":memory:") as db:
...     db.counters.num_hits
0
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from backprompt_db.database.statistics import register_gatherer
from backprompt_db.prompt.text import Runner, register_pair_runner

if TYPE_CHECKING:
    from pathlib import Path

    from backprompt_db import errors as errors
    from backprompt_db.compute.adopt.adopt import Adopted as Adopted
    from backprompt_db.compute.batch.run_plan import RunPlan as RunPlan
    from backprompt_db.compute.batch.run_plan import Warmed as Warmed
    from backprompt_db.database.counters import Counters as Counters
    from backprompt_db.database.database import Database as Database
    from backprompt_db.database.opening import open_database
    from backprompt_db.database.statistics import Stats as Stats
    from backprompt_db.errors import BackpromptError as BackpromptError
    from backprompt_db.model import LanguageModel as LanguageModel
    from backprompt_db.prompt.best import Best as Best
    from backprompt_db.prompt.explanation import Explanation as Explanation
    from backprompt_db.prompt.explanation import SegmentExplanation as SegmentExplanation
    from backprompt_db.prompt.generated import Generated as Generated
    from backprompt_db.prompt.model_counters import ModelCounters as ModelCounters
    from backprompt_db.prompt.segments import Seam as Seam
    from backprompt_db.prompt.template import Template as Template
    from backprompt_db.prompt.text import ModelRepr as ModelRepr
    from backprompt_db.prompt.text import Text as Text
    from backprompt_db.prompt.text import parallel as parallel

    open = open_database  # noqa: A001 - reads as bp.open

__version__ = version("backprompt-db")

# Public names load when they are first used: the command line and a run of full hits need neither torch nor SQLAlchemy.
_HOMES = {
    "Adopted": "compute.adopt.adopt",
    "BackpromptError": "errors",
    "Best": "prompt.best",
    "Counters": "database.counters",
    "Database": "database.database",
    "Explanation": "prompt.explanation",
    "Generated": "prompt.generated",
    "LanguageModel": "model",
    "ModelCounters": "prompt.model_counters",
    "ModelRepr": "prompt.text",
    "RunPlan": "compute.batch.run_plan",
    "Seam": "prompt.segments",
    "SegmentExplanation": "prompt.explanation",
    "Template": "prompt.template",
    "Stats": "database.statistics",
    "Text": "prompt.text",
    "Warmed": "compute.batch.run_plan",
    "open": "database.opening",
    "parallel": "prompt.text",
}
_NAMES_AT_HOME = {"open": "open_database"}

__all__ = [*_HOMES, "__version__", "errors"]  # noqa: PLE0604 - all are str


def __getattr__(name: str) -> Any:
    if name in ("errors", "demo", *_MOVED):
        return import_module(f"backprompt_db.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'backprompt_db' has no attribute {name!r}")
    value = getattr(import_module(f"backprompt_db.{_HOMES[name]}"), _NAMES_AT_HOME.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _runner_of_pair(model: Any, tokenizer: Any) -> Runner:
    from backprompt_db.model import language_model_of

    return language_model_of(model, tokenizer)


def _gathered(directory: Path, namespace: str | None) -> Stats:
    from backprompt_db.operations.stats import gather

    return gather(directory, namespace=namespace)


register_pair_runner(_runner_of_pair)
register_gatherer(_gathered)


_MOVED = {
    "demo.smollm2": "cli.demo.smollm2",
    "keys": "prompt.ids",
    "opening": "database.opening",
    "representation": "prompt.representation",
}
"""Modules that documentation once named by another path, which goes on to work."""


class _Moved(ModuleType):
    """Stands under the old name of a module, which loads when something of it is asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(f"backprompt_db.{name}")
        self.__spec__ = ModuleSpec(self.__name__, loader=None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        home = import_module(f"backprompt_db.{_MOVED[self.__name__.removeprefix('backprompt_db.')]}")
        return vars(home)[name] if name in vars(home) else __getattr__(name)  # some have moved further


_moved = {name: _Moved(name) for name in _MOVED}
_demo = ModuleType("backprompt_db.demo")
_demo.__spec__ = ModuleSpec("backprompt_db.demo", loader=None, is_package=True)
_demo.__path__ = []  # a package, or nothing in it could be imported
vars(_demo)["smollm2"] = _moved["demo.smollm2"]
sys.modules.update({f"backprompt_db.{name}": module for name, module in _moved.items()} | {"backprompt_db.demo": _demo})
