"""OpenMetrics text: what a scraper reads of it is what `stats` knows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import backprompt_db as bp
from backprompt_db.database.config import Config, write_config
from backprompt_db.operations.metrics import exposition
from backprompt_db.operations.stats import gather
from backprompt_db.prompt.representation import Part
from tests.support.cli import run
from tests.support.database_files import copies_after
from tests.support.databases import new_part
from tests.support.operations import catalog_of, run_prompts

ROOT = Path(__file__).parents[2]

original, directory = copies_after(run_prompts)


def families(text: str) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(text)}  # type: ignore[no-untyped-call]


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families(text).values()
        for sample in family.samples
    }


def test_the_text_is_parsed_back_to_the_numbers_of_stats(directory: Path) -> None:
    result = run("stats", "--openmetrics", "--db", directory)
    assert result.exit_code == 0
    assert result.stdout.endswith("\n# EOF\n")
    found, stats = samples(result.stdout), gather(directory)

    def value(name: str, **labels: str) -> float:
        return found[f"backprompt_db_{name}", frozenset(labels.items())]

    assert value("representations") == stats.num_representations == 4
    assert value("tokens") == stats.num_tokens
    assert value("uses") == stats.num_hits
    assert value("saved_seconds") == pytest.approx(stats.saved_seconds)
    assert value("live_bytes") == stats.live_nbytes
    assert value("files_bytes") == stats.file_nbytes
    for part in Part:
        assert value("stored_bytes", part=part.name.lower()) == stats.nbytes[part]
    activity = stats.activity
    assert activity is not None
    assert value("part_hits_total", tier="memory") == activity.num_memory_hits
    assert value("part_hits_total", tier="disk") == activity.num_disk_hits
    assert value("part_misses_total") == activity.num_part_misses > 0
    assert value("computed_tokens_total") == activity.num_computed_tokens > 0
    assert value("computed_seconds_total") == pytest.approx(activity.computed_seconds)
    [model] = stats.by_model or []
    assert value("model_bytes", weights_id=model.weights_id.hex(), model=model.name) == sum(model.nbytes.values())


def test_names_have_the_prefix_and_their_unit(directory: Path) -> None:
    for family in families(run("stats", "--openmetrics", "--db", directory).stdout).values():
        assert family.name.startswith("backprompt_db_")
        assert family.documentation.endswith(".")
        assert family.unit == "" or family.name.endswith(f"_{family.unit}")
        assert family.unit == next((unit for unit in ("bytes", "seconds") if family.name.endswith(unit)), "")
        assert family.type in {"gauge", "counter", "info"}


def test_counters_are_what_only_grows(directory: Path) -> None:
    def read() -> dict[str, float]:
        found = families(exposition(gather(directory)))
        return {
            f"{sample.name} {sample.labels}": sample.value
            for family in found.values()
            if family.type == "counter"
            for sample in family.samples
        }

    before = read()
    with bp.open(directory) as db:
        db.store.delete([key for key, _ in db.store.keys()])
        db.put([new_part("a")])
    after = read()
    assert before.keys() == after.keys()
    assert all(after[name] >= before[name] for name in before)


def test_any_namespace_is_a_label(open_db: Callable[..., bp.Database], tmp_path: Path) -> None:
    namespaces = ["", 'a "quoted" one', "back\\slash", "two\nlines", "déjà vu"]
    for namespace in namespaces:
        with open_db(tmp_path / "db", namespace=namespace) as db:
            db.put([new_part("a", namespace=namespace)])
    family = families(exposition(gather(tmp_path / "db")))["backprompt_db_namespace_bytes"]
    assert {sample.labels["namespace"] for sample in family.samples} == set(namespaces)


def test_control_characters_in_labels_are_escaped(open_db: Callable[..., bp.Database], tmp_path: Path) -> None:
    with open_db(tmp_path / "db", namespace="a\x1b[31mred\x07") as db:
        db.put([new_part("a", namespace=db.namespace)])
    for text in (exposition(gather(tmp_path / "db")), exposition(gather(tmp_path / "db", namespace=db.namespace))):
        assert "\x1b" not in text
        assert r"a\\x1b[31mred\\x07" in text


def test_what_is_not_known_is_left_out(directory: Path) -> None:
    catalog_of(directory).unlink()
    write_config(directory, Config(max_nbytes=None))
    found = families(exposition(gather(directory)))
    assert "backprompt_db_representations" in found
    assert not {"backprompt_db_tokens", "backprompt_db_part_hits", "backprompt_db_limit_bytes"} & found.keys()


def test_the_documentation_names_every_metric(directory: Path) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    with bp.open(directory):
        names = {name for name, _ in samples(exposition(gather(directory)))}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_nothing_else_needs_the_library(directory: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "backprompt_db", "stats", "--db", str(directory)]
    plain = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "prometheus_client" not in plain.stderr
    metrics = subprocess.run([*command, "--openmetrics"], capture_output=True, text=True, check=True)
    assert "prometheus_client" in metrics.stderr
    for name in ("torch", "sqlalchemy"):
        assert f" {name}\n" not in plain.stderr + metrics.stderr
