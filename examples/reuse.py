"""What the examples share: a small model on a database that outlives them, and a line that says what was reused."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

import backprompt_db as bp
from backprompt_db.cli.demo.smollm2 import smollm2_directory

DATA = Path(__file__).parent / "data"


def data(name: str) -> Any:
    """Return what is in one of the files in `data`."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))


@contextmanager
def language_model(example: str) -> Iterator[bp.LanguageModel]:
    """Open the model and the database that the command line names; by default SmolLM2, in the user's cache."""
    parser = argparse.ArgumentParser(description=example, formatter_class=argparse.RawDescriptionHelpFormatter)
    place = platformdirs.user_cache_path("backprompt-db-examples", appauthor=False)
    parser.add_argument("--db", type=Path, default=place, help="directory of the database (%(default)s)")
    parser.add_argument("--model", help="name or directory of a causal language model (SmolLM2-135M-Instruct)")
    told = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(f"Database: {told.db}")
    with bp.open(told.db) as db:
        yield bp.LanguageModel.from_pretrained(told.model or str(smollm2_directory()), db=db)


@contextmanager
def told(lm: bp.LanguageModel, what: str) -> Iterator[None]:
    """Print what was computed and what was found while something ran, and how long that took."""
    before, num_found, was_loaded, began = lm.counters, lm.db.counters.num_hits, lm.is_loaded, time.perf_counter()
    yield
    seconds, after = time.perf_counter() - began, lm.counters
    num_tokens = after.num_computed_tokens - before.num_computed_tokens
    num_passes = after.num_model_calls - before.num_model_calls
    loading = ", with loading the model" if lm.is_loaded and not was_loaded else ""
    print(
        f"{what}: {seconds:.2f} s{loading}; {num_tokens:,} tokens computed in {num_passes:,} passes, "
        f"{lm.db.counters.num_hits - num_found:,} pieces found"
    )
