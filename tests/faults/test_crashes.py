"""A process that dies, or meets a full disk or a bug, at each of the points that have names: what others find."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from alembic import command
from alembic.config import Config

import backprompt_db as bp
from backprompt_db.system.failpoints import NAMES
from tests.support.faults import ROOT, assert_survived, garbage, keys_of, new_parts, put_prompts, run_to_its_end

assert sys.platform != "win32"

NUMBERS = range(8)

TRY = """
def attempt(work):
    try:
        work()
    except Exception as error:
        print('failed', flush=True)
        logging.warning('%s', error)
        return False
    return True
"""
WRITE = """
def write(number):
    db.put(new_parts(prompt(number)))
    db.flush()

while not attempt(lambda: globals().update(db=bp.open(place))): pass
for number in range(8):
    if attempt(lambda: write(number)): print(number, flush=True)
db.close()
"""
ONCE_MORE = """
for _ in range(2):
    with bp.open(place) as db:
        if attempt(work): print('done', flush=True)
"""
DELETE = "def work():\n    db.store.delete(keys_of(garbage()))\n    db.catalog.forget(keys_of(garbage()))"
EVICT = (
    "from backprompt_db.catalog.records import Selection\n"
    "def work():\n    db.evictor.evict(to_nbytes=0, selection=Selection(text_prefix='Nobody'))"
)
COMPACT = "def work():\n    db.store.compact()"
REINDEX = "def work():\n    reindex(db)"
MIGRATE = "def work():\n    if db.catalog is None: raise RuntimeError('no catalog')"


def fill(place: Path) -> None:
    with bp.open(place) as db:
        put_prompts(db, NUMBERS)


def fill_with_garbage(place: Path) -> None:
    fill(place)
    with bp.open(place) as db:
        db.put(new_parts(garbage()))


def fill_and_delete(place: Path) -> None:
    fill_with_garbage(place)
    with bp.open(place) as db:
        assert db.store.delete(keys_of(garbage())) == 6


def fill_without_catalog(place: Path) -> None:
    fill(place)
    (place / "catalog.sqlite").unlink()


def fill_with_old_catalog(place: Path) -> None:
    fill(place)
    downgrade(place)


def downgrade(place: Path) -> None:
    config = Config(ROOT / "migrations" / "alembic.ini")
    config.set_main_option("sqlalchemy.url", f"sqlite:///{place / 'catalog.sqlite'}")
    command.downgrade(config, "0001")


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a process does when the point is reached, and at which pass it fails there."""

    script: str
    number: int = 1
    prepare: Callable[[Path], None] = lambda _: None


STEPS = """
from backprompt_db.catalog.records import Selection

def step(work):
    for _ in range(9):
        with bp.open(place) as db:
            if attempt(lambda: work(db)):
                return print('done', flush=True)

def lose_rows(db): db.catalog.forget(keys_of(prompt(0)))
def migrate(db): assert db.catalog is not None
def evict(db): db.evictor.evict(to_nbytes=0, selection=Selection(text_prefix="Nobody"))
def delete(db): db.store.delete(keys_of(garbage()))
def compact(db): db.store.compact()

for work in (migrate, lose_rows, evict, delete, compact, reindex): step(work)
"""

SCENARIOS = {
    "create.store": Scenario(WRITE),
    "create.manifest": Scenario(WRITE),
    "store.put.before": Scenario(WRITE, 3),
    "store.put.inside": Scenario(WRITE, 22),
    "store.put.before-commit": Scenario(WRITE, 3),
    "store.put.after": Scenario(WRITE, 3),
    "catalog.record.inside": Scenario(WRITE, 3),
    "store.delete.inside": Scenario(DELETE + ONCE_MORE, 5, fill_with_garbage),
    "collect.deleted": Scenario(EVICT + ONCE_MORE, 1, fill_with_garbage),
    "catalog.evict.inside": Scenario(EVICT + ONCE_MORE, 1, fill_with_garbage),
    "store.compact.copied": Scenario(COMPACT + ONCE_MORE, 1, fill_and_delete),
    "store.compact.renamed": Scenario(COMPACT + ONCE_MORE, 1, fill_and_delete),
    "migration.first": Scenario(MIGRATE + ONCE_MORE, 1, fill_with_old_catalog),
    "reindex.batch": Scenario(REINDEX + ONCE_MORE, 1, fill_without_catalog),
}


def numbers_of(scenario: Scenario, words: list[str]) -> list[int]:
    """What was acknowledged: before the process began, or by itself."""
    return [int(word) for word in words if word.isdigit()] if scenario.script == WRITE else list(NUMBERS)


def test_every_point_has_a_scenario() -> None:
    assert set(SCENARIOS) == NAMES


@pytest.mark.parametrize("point", SCENARIOS)
def test_a_process_that_is_killed_costs_nothing_that_was_acknowledged(tmp_path: Path, point: str) -> None:
    place, scenario = tmp_path / "db", SCENARIOS[point]
    scenario.prepare(place)
    code, words, log = run_to_its_end(TRY + scenario.script, place, failpoint=f"{point}=kill@{scenario.number}")
    assert code == -signal.SIGKILL, log
    numbers = numbers_of(scenario, words)
    assert len(numbers) >= (2 if scenario.number > 1 else 0)
    assert_survived(place, numbers)


def setting(points: list[str], action: str) -> str:
    return ",".join(f"{point}={action}@{SCENARIOS[point].number}" for point in points)


@pytest.mark.parametrize("action", ["full", "raise"])
def test_a_write_that_fails_anywhere_is_reported_and_the_next_one_succeeds(tmp_path: Path, action: str) -> None:
    points = [point for point, scenario in SCENARIOS.items() if scenario.script == WRITE]
    code, words, log = run_to_its_end(TRY + WRITE, tmp_path / "db", failpoint=setting(points, action))
    assert code == 0, log
    # The catalog's failures are only logged.
    assert words.count("failed") == len(points) - 1
    assert "the catalog missed" in log
    numbers = numbers_of(SCENARIOS["store.put.before"], words)
    assert (numbers[:2], numbers[-1]) == ([0, 1], 7)
    assert_survived(tmp_path / "db", numbers)


@pytest.mark.parametrize("action", ["full", "raise"])
def test_maintenance_that_fails_anywhere_can_be_repeated(tmp_path: Path, action: str) -> None:
    place = tmp_path / "db"
    fill_with_garbage(place)
    downgrade(place)
    points = [point for point, scenario in SCENARIOS.items() if scenario.script != WRITE]
    code, words, log = run_to_its_end(TRY + STEPS, place, failpoint=setting(points, action))
    assert code == 0, log
    assert (words.count("failed"), words.count("done")) == (len(points), 6)
    assert_survived(place, list(NUMBERS))


MODEL = """
from tests.conftest import tiny_gpt2, train_tokenizer
from tests.faults.test_crashes import CONTEXT, REQUESTS
with bp.open(place) as db:
    lm = bp.LanguageModel(tiny_gpt2(), train_tokenizer(), db=db, progress=False)
    for number, request in enumerate(REQUESTS):
        lm(lm.text(CONTEXT) + request)
        db.flush()
        print(number, flush=True)
"""
CONTEXT = "Pick the endpoint for the request.\n"
REQUESTS = [f"Request: show me order {number}" for number in range(6)]


@pytest.mark.exhaustive
def test_a_model_computes_again_what_a_killed_process_did_not_store_and_nothing_else(
    tmp_path: Path, make_lm: Callable[..., bp.LanguageModel]
) -> None:
    code, words, log = run_to_its_end(MODEL, tmp_path / "db", failpoint="store.put.before-commit=kill@4")
    assert code == -signal.SIGKILL, log
    numbers = [int(word) for word in words]
    assert 2 <= len(numbers) < len(REQUESTS)
    with bp.open(tmp_path / "db") as db:
        lm, oracle = make_lm(db=db), make_lm()
        for number, request in enumerate(REQUESTS):
            result, right = (each(each.text(CONTEXT) + request) for each in (lm, oracle))
            assert (result.num_computed_tokens == 0) == (number in numbers)
            torch.testing.assert_close(result.logits, right.logits, atol=1e-4, rtol=0)
            torch.testing.assert_close(result.token_logprobs, right.token_logprobs, atol=1e-4, rtol=0, equal_nan=True)
        assert db.counters.num_disk_hits > 0
        assert db.counters.num_quarantined == db.counters.num_read_failures == 0
