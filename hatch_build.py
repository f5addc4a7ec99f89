"""What hatchling asks when it builds the package: its description, the README with links that work anywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(?P<mark>!?)(?P<label>\[[^]]*\])\((?!https?:|#)(?P<target>[^)]+)\)")


class AbsoluteReadme(MetadataHookInterface):
    """Gives the package its description. A package index shows it where no file of the repository is beside it."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the README to the metadata."""
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = with_absolute_links(readme, source=metadata["urls"]["Source"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_absolute_links(markdown: str, *, source: str) -> str:
    """Return Markdown whose links lead to files of the repository at `source`, and its pictures to their bytes."""

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link["mark"] else "blob"
        return f"{link['mark']}{link['label']}({source}/{kind}/main/{link['target']})"

    return _LINK.sub(absolute, markdown)
