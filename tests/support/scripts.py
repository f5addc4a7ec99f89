"""Scripts that print one JSON object, run in this process, where the large libraries are loaded, or in a new one."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from typing import Any

import pytest


def run_here(script: str, *arguments: object) -> Any:
    """Run a script in this process; return what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patcher, contextlib.redirect_stdout(printed):
        patcher.setattr(sys, "argv", ["-c", *map(str, arguments)])
        exec(script, {"__name__": "__main__"})  # noqa: S102 - it is our own
    return json.loads(printed.getvalue())


def run_in_a_process(script: str, *arguments: object) -> Any:
    """Run a script in a new process; return what it prints."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
