"""Docstring examples run, and the links of the README lead somewhere. Its own examples run in `test_docs.py`."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import markdown  # type: ignore[import-untyped]
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

import backprompt_db

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def links_of(text: str) -> list[str]:
    """All addresses that a Markdown text leads to or shows."""
    page = markdown.markdown(text, extensions=["fenced_code", "tables"])
    return re.findall(r'(?:href|src)="([^"]+)"', page)


def headings_of(text: str) -> set[str]:
    """The anchors of a Markdown text's headings."""
    return set(re.findall(r'<h\d id="([^"]+)"', markdown.markdown(text, extensions=["toc", "fenced_code"])))


def modules() -> list[str]:
    found = pkgutil.walk_packages(backprompt_db.__path__, "backprompt_db.")
    return [
        module.name for module in found if ".migrations" not in module.name and not module.name.endswith("__main__")
    ]


def test_the_examples_of_docstrings_run() -> None:
    for name in ["backprompt_db", *modules()]:
        failures, _ = doctest.testmod(importlib.import_module(name))
        assert failures == 0, name


def test_every_link_of_the_readme_leads_to_a_file_and_to_a_heading_there() -> None:
    links = [link for link in links_of(README) if not link.startswith("https:")]
    assert len(links) > 20
    for link in links:
        name, _, anchor = link.partition("#")
        assert (ROOT / name).exists(), link
        assert not anchor or anchor in headings_of((ROOT / name).read_text(encoding="utf-8")), link


def test_a_package_index_shows_the_readme_with_links_into_the_repository() -> None:
    project = ProjectMetadata(str(ROOT), PluginManager()).core
    source = project.urls["Source"]
    assert all(link.startswith("https:") for link in links_of(project.readme))
    assert project.readme_content_type == "text/markdown"
    assert project.readme.replace(f"{source}/blob/main/", "").replace(f"{source}/raw/main/", "") == README
    pictures = re.findall(r'<img [^>]*src="([^"]+)"', markdown.markdown(project.readme))
    assert pictures
    assert all(picture.startswith(f"{source}/raw/main/") for picture in pictures)
