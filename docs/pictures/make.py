"""Make the pictures of the documentation again: `python docs/pictures/make.py`. It runs SmolLM2-135M-Instruct.

The same library makes the same pictures: times, which differ from run to run, are left out.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import backprompt_db as bp
from backprompt_db.catalog.records import Selection
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from backprompt_db.cli.tree import forest_picture
from backprompt_db.operations.forest import Measure, forest, prune
from backprompt_db.views.picture import Picture

HERE = Path(__file__).parent
CONTEXT = (
    "Answer the question about the shop from its notices. Answer in one short sentence, and only from what they say.\n"
)
NOTICES = (
    "Opening hours: The shop opens at nine in the morning and closes at six. On Sundays it stays closed all day.\n",
    "Returns: Thirty days with the receipt, for whatever you buy except food and books.\n",
    "Parking: Twelve places behind the house are free for two hours.\n",
)
QUESTION = "Question: When does the shop open on a Monday?\nAnswer:"
EDIT = "The third piece said Thirty before. What stands before it is found, it and what follows it are computed again."
ENDPOINTS = "Pick the endpoint for the request.\nGET /users lists users. POST /orders creates an order.\n"
REQUESTS = ("Request: who signed up this week?", "Request: buy two of these", "Request: show me everyone")
LABELS = (" GET /users", " POST /orders")


def main() -> None:
    """Write all of them beside this file."""
    with tempfile.TemporaryDirectory() as directory, bp.open(Path(directory) / "db") as db:
        lm = bp.LanguageModel.from_pretrained(str(smollm2_directory()), db=db)
        save(prompt(lm), "prompt.svg")
        save(tree(lm), "tree.svg")
        (HERE / "surprise.html").write_text(answer(lm)._repr_html_(), encoding="utf-8")


def save(picture: Picture, name: str) -> None:
    """Write a picture without its times."""
    segments = tuple(replace(segment, seconds=None) for segment in picture.segments)
    replace(picture, segments=segments).save(HERE / name)


def prompt(lm: bp.LanguageModel) -> Picture:
    """Return a prompt that was stored before a piece in its middle was edited, and has just been run again."""
    hours, returns, parking = NOTICES
    (lm.text(CONTEXT) + hours + returns + parking + QUESTION)()
    result = (lm.text(CONTEXT) + hours + returns.replace("Thirty", "Sixty") + parking + QUESTION)()
    return replace(result.text.picture(after=result), remarks=(EDIT,))


def tree(lm: bp.LanguageModel) -> Picture:
    """Return the prompt tree of a small classification."""
    prompts = [lm.text(ENDPOINTS) + request + "\nEndpoint:" for request in REQUESTS]
    lm.score(prompts, LABELS)
    lm.db.flush()
    found = forest(lm.db.catalog, selection=Selection(text_prefix=ENDPOINTS))
    return forest_picture(found, prune(found, found.weights(Measure.TOKENS), limit=20, max_depth=None), Measure.TOKENS)


def answer(lm: bp.LanguageModel) -> bp.ModelRepr:
    """Return a result that was partly found and partly computed."""
    (lm.text(CONTEXT) + NOTICES[0])()
    return (lm.text(CONTEXT) + NOTICES[0] + QUESTION)()


if __name__ == "__main__":
    main()
