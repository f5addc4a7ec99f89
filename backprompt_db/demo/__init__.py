"""The demo: one job run twice on one database, and once without it.

The job is API endpoint classification: which of 28 endpoints serves a request? The documentation of all endpoints is
the context of every request, and a model's log-probability of each endpoint after each request is the answer.
"""

from backprompt_db.demo.job import run_once
from backprompt_db.demo.run import run_demo

__all__ = ["run_demo", "run_once"]
