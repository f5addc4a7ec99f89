"""`python -m backprompt_db.integrations.lm_eval`: the harness's command line, with `--model backprompt` in it."""

from lm_eval.__main__ import cli_evaluate

import backprompt_db.integrations.lm_eval

__all__ = ["backprompt_db"]

if __name__ == "__main__":
    cli_evaluate()
