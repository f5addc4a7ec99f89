"""All commands under their names, and how their errors become exit codes."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from backprompt_db.cli.annotate import label, pin
from backprompt_db.cli.bundles import export, import_, merge
from backprompt_db.cli.configure import config, init
from backprompt_db.cli.demo import demo, demo_run
from backprompt_db.cli.doctor import doctor
from backprompt_db.cli.evict import compact, evict, purge
from backprompt_db.cli.explain import PiecesCommand, explain
from backprompt_db.cli.graph import graph
from backprompt_db.cli.help import Command, unwrapped, without_types
from backprompt_db.cli.location import path
from backprompt_db.cli.ls import ls
from backprompt_db.cli.show import show
from backprompt_db.cli.stats import stats
from backprompt_db.cli.tree import tree
from backprompt_db.cli.verify import reindex, verify
from backprompt_db.cli.warm import warm
from backprompt_db.errors import BackpromptError
from backprompt_db.views.formatting import visible

ERROR = 2
"""The exit code of a command that failed; `verify` and `doctor` have others for what they found."""

_INTERRUPTED = 130
_CLOSED_PIPE = 128 + 13
"""What shells say of a program that SIGPIPE has ended, which has this number on all systems that have it."""


class Commands(TyperGroup):
    """The group of all commands. An error is printed as one line and a hint; a closed pipe is no error."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.help = unwrapped(self.help)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options of the group, `--help` included."""
        return without_types(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run the command and turn what the library raises, and an interrupt, into an exit code."""
        try:
            return super().invoke(ctx)
        except BackpromptError as error:
            typer.echo(f"error: {visible(error.message)}\nhint: {visible(error.hint)}", err=True)
            raise typer.Exit(ERROR) from None
        except KeyboardInterrupt:
            typer.echo("interrupted\nhint: The same command may be run again.", err=True)
            raise typer.Exit(_INTERRUPTED) from None
        except BrokenPipeError:
            # What is still buffered would fail once more when the interpreter exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(_CLOSED_PIPE) from None


app = typer.Typer(
    name="backprompt-db",
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

command = partial(app.command, cls=Command)
command("demo")(demo)
command("demo-run", hidden=True)(demo_run)
command("init")(init)
command("config")(config)
command("path")(path)
command("stats")(stats)
command("ls")(ls)
command("show")(show)
command("explain", cls=PiecesCommand)(explain)
command("tree", cls=PiecesCommand)(tree)
command("graph")(graph)
command("warm")(warm)
command("verify")(verify)
command("reindex")(reindex)
command("doctor")(doctor)
command("export")(export)
command("import")(import_)
command("merge")(merge)
command("pin")(pin)
command("label")(label)
command("evict")(evict)
command("compact")(compact)
command("purge")(purge)


def _print_version(is_asked: bool) -> None:  # noqa: FBT001 - typer calls it
    if is_asked:
        from backprompt_db import __version__

        typer.echo(f"backprompt-db {__version__}")
        raise typer.Exit


@app.callback()
def commands(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The database for prompt representations: make it, look into it, limit its size, repair it.

    A representation is what a model computed for one segment of a prompt: scores, logits, keys and values.
    The store holds representations; the catalog lists what the store holds and can always be rebuilt from it.

    Exit codes: 0 done; 2 an error, which is printed to stderr with a hint. 1 doctor found a problem, or
    warm left rows out; what verify found is a sum of 1, 4, 8 and 16, see its help.
    """
