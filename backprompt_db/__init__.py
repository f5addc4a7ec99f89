"""The database for prompt representations: compute a piece of a prompt once, keep it for good.

>>> import backprompt_db as bp
>>> with bp.open(":memory:") as db:
...     db.counters.num_hits
0
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from backprompt_db.text import Runner, register_pair_runner

if TYPE_CHECKING:
    from backprompt_db import errors as errors
    from backprompt_db.compute.adoption import Adopted as Adopted
    from backprompt_db.counting import Counters as Counters
    from backprompt_db.counting import ModelCounters as ModelCounters
    from backprompt_db.database import Database as Database
    from backprompt_db.errors import BackpromptError as BackpromptError
    from backprompt_db.explanation import Explanation as Explanation
    from backprompt_db.explanation import SegmentExplanation as SegmentExplanation
    from backprompt_db.generated import Generated as Generated
    from backprompt_db.model import LanguageModel as LanguageModel
    from backprompt_db.opening import open_database
    from backprompt_db.representation import ModelRepr as ModelRepr
    from backprompt_db.run_plan import RunPlan as RunPlan
    from backprompt_db.run_plan import Warmed as Warmed
    from backprompt_db.template import Template as Template
    from backprompt_db.text import Seam as Seam
    from backprompt_db.text import Text as Text
    from backprompt_db.text import parallel as parallel

    open = open_database  # noqa: A001 - reads as bp.open

__version__ = version("backprompt-db")

# Public names load when they are first used: the command line and a run of full hits need neither torch nor SQLAlchemy.
_HOMES = {
    "Adopted": "compute.adoption",
    "BackpromptError": "errors",
    "Counters": "counting",
    "Database": "database",
    "Explanation": "explanation",
    "Generated": "generated",
    "LanguageModel": "model",
    "ModelCounters": "counting",
    "ModelRepr": "representation",
    "RunPlan": "run_plan",
    "Seam": "text",
    "SegmentExplanation": "explanation",
    "Template": "template",
    "Text": "text",
    "Warmed": "run_plan",
    "open": "opening",
    "parallel": "text",
}
_NAMES_AT_HOME = {"open": "open_database"}

__all__ = [*_HOMES, "__version__", "errors"]  # noqa: PLE0604 - all are str


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("backprompt_db.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'backprompt_db' has no attribute {name!r}")
    value = getattr(import_module(f"backprompt_db.{_HOMES[name]}"), _NAMES_AT_HOME.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _runner_of_pair(model: Any, tokenizer: Any) -> Runner:
    from backprompt_db.pairs import language_model_of

    return language_model_of(model, tokenizer)


register_pair_runner(_runner_of_pair)
