"""Questions over documents that stand side by side, in any order, and what that costs in quality.

    python examples/documents.py

Each prompt has three documents: the one with the answer, and two others. As a chain, each document sees those before
it, so that each order is computed anew. As parallel branches no document sees another: each is computed once, for all
prompts, in any order. The model was not trained on that, so the same questions are asked both ways and compared: how
often the right one of eight answers is the likeliest, and what its log-probability is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from reuse import data, language_model, told

import backprompt_db as bp

INSTRUCTION = "Answer the questions with what the texts say.\n"
QUESTIONS = {
    "opens": "At what time does {name} open?",
    "founded": "When was the beginning of {name}?",
    "run by": "Who runs {name}?",
    "price": "What does {thing} cost?",
}

Layout = Callable[[list[bp.Text]], bp.Text]
"""How the documents of one prompt are put together."""


def report(lm: bp.LanguageModel, documents: list[dict], name: str, layout: Layout) -> None:
    """Ask all questions over documents laid out in one way, and print how well they were answered."""
    texts = [bp.Text(f"{document['text']}\n") for document in documents]
    contexts = [layout([texts[(number + step) % len(texts)] for step in (0, 1, 4)]) for number in range(len(texts))]
    with told(lm, name):
        by_question = []
        for kind, question in QUESTIONS.items():
            asked = [f"Question: {question.format(**document)}\nAnswer:" for document in documents]
            answers = [f" {document['answers'][kind]}." for document in documents]
            prompts = [context + each for context, each in zip(contexts, asked, strict=True)]
            by_question.append(lm.score(prompts, answers))
    scores = np.array(by_question)  # [questions, documents, answers]; each document's own answer is the right one
    share = float(np.mean(scores.argmax(axis=2) == np.arange(len(documents))))
    right = float(scores.diagonal(axis1=1, axis2=2).mean())
    print(f"{'':28}{share:.0%} right, log-probability of the right answer {right:.2f}")


def main() -> None:
    documents = data("documents.json")
    with language_model(__doc__) as lm:
        start = lm.text(INSTRUCTION)
        report(lm, documents, "no document", lambda _: start)
        report(lm, documents, "the right one alone", lambda texts: start + texts[0])
        report(lm, documents, "chain, the right one first", lambda texts: start + texts[0] + texts[1] + texts[2])
        report(lm, documents, "chain, the right one last", lambda texts: start + texts[1] + texts[2] + texts[0])
        report(lm, documents, "parallel", lambda texts: start + bp.parallel(*texts))
        report(lm, documents, "parallel, another order", lambda texts: start + bp.parallel(*reversed(texts)))


if __name__ == "__main__":
    main()
