"""A chat with a long history: each turn computes only itself, also in a process that begins the day after.

    python examples/chat.py

The conversation so far is read from a file, then three questions are asked. The answers are written to a transcript
beside the database, so that a second run continues after them, and finds every token of the conversation.
"""

from __future__ import annotations

import json
from pathlib import Path

from reuse import data, language_model, told

NUM_NEW_TOKENS = 30


def main() -> None:
    conversation = data("conversation.json")
    messages = [{"role": "system", "content": conversation["system"]}]
    for question, answer in conversation["history"]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    with language_model(__doc__) as lm:
        transcript = Path(f"{lm.db.directory}-chat.json")
        answers = json.loads(transcript.read_text(encoding="utf-8")) if transcript.exists() else {}
        for question in conversation["questions"]:
            messages.append({"role": "user", "content": question})
            prompt = lm.chat(messages)
            print(f"\nUser: {question}")
            with told(lm, "this turn"):
                if question not in answers:
                    answers[question] = lm.generate(prompt, max_new_tokens=NUM_NEW_TOKENS).string
                turn = (prompt + answers[question])()
            print(f"Assistant: {answers[question].strip()}")
            print(f"({len(turn.input_ids):,} tokens of conversation so far)")
            messages.append({"role": "assistant", "content": answers[question]})
        transcript.write_text(json.dumps(answers, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
