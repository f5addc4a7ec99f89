"""How many examples does a prompt need? Accuracy with 0 to 12 of them, each time on all questions.

    python examples/few_shot_evaluation.py

A prompt with eight examples begins with the one with four, so each example is computed once, and each question once
after each number of examples. Changing the last example leaves everything before it as it is.
"""

from __future__ import annotations

import numpy as np
from reuse import data, language_model, told

import backprompt_db as bp

NUM_EXAMPLES = (0, 1, 2, 4, 8, 12)
INSTRUCTION = "Sort each message of a customer by its topic: billing, delivery, account or product.\n"


def shown(message: str, topic: str = "") -> str:
    """Return a message as the prompt shows it, with its topic or without.

    The empty line between two of them is cut in the middle: no token reaches across.
    """
    return f"\nMessage: {message}\nTopic:" + (f" {topic}\n" if topic else "")


def accuracy(lm: bp.LanguageModel, context: bp.Text, task: dict) -> float:
    """Return the share of questions whose right topic is the likeliest."""
    prompts = [context + shown(question["message"]) for question in task["questions"]]
    scores = lm.score(prompts, [f" {topic}" for topic in task["topics"]])
    right = [task["topics"].index(question["topic"]) for question in task["questions"]]
    return float(np.mean(scores.argmax(axis=1) == right))


def main() -> None:
    task = data("messages.json")
    with language_model(__doc__) as lm:
        context, num_shown = lm.text(INSTRUCTION), 0
        for num_examples in NUM_EXAMPLES:
            for example in task["examples"][num_shown:num_examples]:
                context += shown(**example)
            num_shown = num_examples
            with told(lm, f"{num_examples:2} examples"):
                share = accuracy(lm, context, task)
            print(f"             {share:.0%} right")

        changed = lm.text(INSTRUCTION)
        for example in task["examples"][: num_shown - 1]:
            changed += shown(**example)
        changed += shown("The glass of the clock has a scratch.", "product")
        with told(lm, "the last example changed"):
            share = accuracy(lm, changed, task)
        print(f"             {share:.0%} right")


if __name__ == "__main__":
    main()
