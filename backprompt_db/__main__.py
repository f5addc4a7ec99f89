"""`python -m backprompt_db` is `backprompt-db`."""

from backprompt_db.cli import main

main()
