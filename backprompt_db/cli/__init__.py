"""The command line."""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Run the command line on the process's arguments, and exit."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character shows its escape, instead of failing in the middle of an answer.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        from backprompt_db.cli.app import app

        app(prog_name="backprompt-db")
    except KeyboardInterrupt:  # before the command began
        sys.stderr.write("interrupted\nhint: The same command may be run again.\n")
        sys.exit(130)
