"""lm-evaluation-harness on a database: `--model backprompt`, the same scores as `--model hf`, computed once.

Importing this package registers the model. `python -m backprompt_db.integrations.lm_eval` is the harness's own command
line with the model in it.
"""

from backprompt_db.integrations.lm_eval.model import BackpromptLM

__all__ = ["BackpromptLM"]
