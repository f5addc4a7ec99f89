"""`python -m backprompt_db.integrations.lm_eval`: the harness's command line, with `--model backprompt` in it.

The package, which is imported first, has registered the model.
"""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
