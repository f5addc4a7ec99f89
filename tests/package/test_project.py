"""What is said of the project in several places is the same everywhere."""

from __future__ import annotations

import tomllib
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

import backprompt_db as bp

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))

FACTS = {"title": "name", "version": "version", "license": "license", "abstract": "description", "keywords": "keywords"}
"""Keys of the citation, and where pyproject says the same."""


def test_the_citation_says_what_pyproject_says() -> None:
    assert {key: CITATION[key] for key in FACTS} == {key: PROJECT[name] for key, name in FACTS.items()}
    assert CITATION["repository-code"] == PROJECT["urls"]["Source"]


def test_the_citation_has_what_its_format_demands() -> None:
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software"
    assert CITATION["message"]
    assert CITATION["authors"] == [{"name": "The backprompt-db authors"}]


def test_the_package_has_the_version_and_the_name_of_pyproject() -> None:
    assert bp.__version__ == PROJECT["version"]
    assert metadata(bp.__name__)["Name"] == PROJECT["name"]


def test_the_licence_is_the_one_that_is_named() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").split()[:4] == ["Apache", "License", "Version", "2.0,"]


def test_all_addresses_are_of_one_repository() -> None:
    assert set(PROJECT["urls"]) == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    assert {url for url in PROJECT["urls"].values() if not url.startswith(PROJECT["urls"]["Source"])} == set()
