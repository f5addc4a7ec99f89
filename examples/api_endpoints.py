"""Which API endpoint serves a request? Every endpoint is scored as the completion of every request.

    python examples/api_endpoints.py

The documentation of 28 endpoints is the context of all prompts, so it is computed once. A second run, in another
process, loads no model at all; a new request costs only its own few tokens.
"""

from __future__ import annotations

import numpy as np
from reuse import language_model, told

from backprompt_db.cli.demo.job import load_task

NUM_REQUESTS = 12
NEW_REQUEST = "Request: I forgot my password\nEndpoint:"


def main() -> None:
    task = load_task(NUM_REQUESTS)
    with language_model(__doc__) as lm:
        context = lm.text(task.context)
        with told(lm, f"{NUM_REQUESTS} requests x {len(task.completions)} endpoints"):
            scores = lm.score([context + ending for ending in task.endings], task.completions)
        with told(lm, "one request more"):
            new = lm.score(context + NEW_REQUEST, task.completions)

    # What a model says to requests without content is its taste in endpoints, not an answer: take that away.
    num_empty = len(task.endings) - NUM_REQUESTS
    bias = np.logaddexp.reduce(scores[:num_empty], axis=0)
    best = (scores[num_empty:] - bias).argmax(axis=1)
    for ending, choice, right in zip(task.endings[num_empty:], best, task.gold, strict=True):
        mark = "right" if choice == right else f"wrong,{task.completions[right]}"
        print(f"  {ending.splitlines()[0][9:69]:60} ->{task.completions[choice]} ({mark})")
    print(f"  {NEW_REQUEST.splitlines()[0][9:]:60} ->{task.completions[(new - bias).argmax()]}")


if __name__ == "__main__":
    main()
