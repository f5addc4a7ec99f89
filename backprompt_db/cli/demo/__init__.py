"""`demo`: the whole idea on this machine. One job runs twice on one database, and a sample of it runs without.

The job is API endpoint classification: which of 28 endpoints serves a request? The documentation of all endpoints is
the context of every request, and a model's log-probability of each endpoint after each request is the answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backprompt_db.cli.options import LOADED_MODEL

ModelOption = Annotated[str, typer.Option("--model", metavar="MODEL", help=LOADED_MODEL)]
RequestsOption = Annotated[
    int | None, typer.Option("--requests", metavar="N", min=1, help="How many requests; all without it.")
]


def demo(
    *,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME",
            help="A causal language model's name or path; SmolLM2-135M-Instruct where gpt2 cannot be had.",
        ),
    ] = "gpt2",
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            metavar="DIR",
            readable=False,
            help="A new directory to keep the demo's database in; a temporary one without it.",
        ),
    ] = None,
    requests: RequestsOption = None,
    sample: Annotated[
        int, typer.Option("--sample", metavar="N", min=0, help="How many requests to compare with plain passes.")
    ] = 8,
) -> None:
    """Classify requests with a small model, twice: the second time, every representation is a hit."""
    from backprompt_db.cli.demo.run import run_demo

    raise typer.Exit(run_demo(model=model, directory=directory, num_requests=requests, sample=sample))


def demo_run(
    *,
    model: ModelOption = "gpt2",
    directory: Annotated[Path, typer.Option("--dir", metavar="DIR", readable=False, help="The demo's database.")],
    requests: RequestsOption = None,
    best: Annotated[bool, typer.Option("--best", help="Find the best endpoints only, and do not score all.")] = False,
) -> None:
    """Run the demo's requests once, in this process, and print what it took."""
    from backprompt_db.cli.demo.job import choose_once, run_once

    job = choose_once if best else run_once
    raise typer.Exit(job(model=model, directory=directory, num_requests=requests))
