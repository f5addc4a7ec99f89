"""Chats as texts: exactly what the chat template renders, in pieces that a growing conversation shares."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import backprompt_db as bp
from backprompt_db.cli.demo.smollm2 import smollm2_directory
from backprompt_db.compute.tokens import SegmentTokenizer
from backprompt_db.errors import InvalidText, PromptError
from tests.conftest import tiny_gpt2, train_tokenizer

Chat = list[dict[str, Any]]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start|>' + m.role + '<|end|>\n\n'"
    " + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
STRIPS_THINKING = (
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last"
    " else m.content %}{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_LAST = (
    "{% for m in messages if m.role != 'system' %}{% if loop.last and messages[0].role == 'system' %}"
    "{% set said = messages[0].content + '\n' + m.content %}{% else %}{% set said = m.content %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = (
    "{% if messages[-1].role != 'user' %}{{ raise_exception('The last message must be from the user.') }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}{% endfor %}"
) + CHATML
TEMPLATES = {
    "chatml": CHATML,
    "plain": PLAIN,
    "with bos": WITH_BOS,
    "llama 3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "strips thinking": STRIPS_THINKING,
    "system last": SYSTEM_LAST,
    "strict": STRICT,
}
WITH_START = {"with bos", "llama 3", "gemma", "mistral"}
"""These write the BOS token themselves."""
APPENDING = ["chatml", "plain", "llama 3", "gemma", "with bos"]
"""Under these, what is there of a conversation does not change when it grows."""

CONVERSATION: Chat = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Pick the endpoint."},
    {"role": "assistant", "content": "<think>\nusers\n</think>\n\nGET /users"},
    {"role": "user", "content": "And for orders?"},
    {"role": "assistant", "content": "POST /orders"},
    {"role": "user", "content": "The quick brown fox"},
]

WORDS = st.sampled_from(
    ["the", " quick", " fox", "\n", "  ", " GET", "é", "🙂", ".", "<think>", "</think>", "<|im_end|>"]
)
CONTENTS = st.lists(WORDS, max_size=8).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> Chat:
    """Messages that even the strict template takes: perhaps a system prompt, then user and assistant by turns."""
    first = [{"role": "system", "content": draw(CONTENTS)}] if draw(st.booleans()) else []
    num_turns = 1 + 2 * draw(st.integers(0, 3))
    return first + [{"role": ("user", "assistant")[i % 2], "content": draw(CONTENTS)} for i in range(num_turns)]


@pytest.fixture(scope="module")
def smollm2_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(smollm2_directory())


@pytest.fixture(scope="module")
def marked_tokenizer() -> Any:
    """The small tokenizer, for which ChatML's marks are special tokens."""
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tokenizer: Any, marked_tokenizer: Any, smollm2_tokenizer: Any) -> list[Any]:
    """Without ChatML's marks, with them, and one that merges line breaks: most templates have seams under it."""
    return [tokenizer, marked_tokenizer, smollm2_tokenizer]


@pytest.fixture(scope="module")
def talk() -> Callable[..., bp.Text]:
    """Make a chat with any tokenizer; its model is not run."""
    model = tiny_gpt2()

    def chat(tokenizer: Any, messages: Chat, **arguments: Any) -> bp.Text:
        return bp.LanguageModel(model, tokenizer).chat(messages, **arguments)

    return chat


def strings(text: bp.Text) -> list[str]:
    return [segment.string for segment in text.segments("")]


def tokens(tokenizer: Any, text: bp.Text) -> list[int]:
    return list(itertools.chain.from_iterable(SegmentTokenizer(tokenizer).encode(text.segments("")).values()))


def assert_is_rendering(tokenizer: Any, text: bp.Text, messages: Chat, **arguments: Any) -> None:
    """The text and its tokens are those of transformers."""
    arguments = {"add_generation_prompt": True, **arguments}
    assert "".join(strings(text)) == tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    assert tokens(tokenizer, text) == tokenizer.apply_chat_template(messages, return_dict=False, **arguments)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_what_its_template_renders(name: str, tokenizer: Any, talk: Callable[..., bp.Text]) -> None:
    for add_generation_prompt in (True, False):
        arguments = {"chat_template": TEMPLATES[name], "add_generation_prompt": add_generation_prompt}
        text = talk(tokenizer, CONVERSATION, **arguments)
        assert_is_rendering(tokenizer, text, CONVERSATION, **arguments)


@pytest.mark.parametrize("name", sorted(WITH_START))
def test_start_tokens_that_the_template_writes_are_not_put_there_twice(
    name: str, tokenizer_with_bos: Any, talk: Callable[..., bp.Text], caplog: pytest.LogCaptureFixture
) -> None:
    text = talk(tokenizer_with_bos, CONVERSATION, chat_template=TEMPLATES[name])
    assert_is_rendering(tokenizer_with_bos, text, CONVERSATION, chat_template=TEMPLATES[name])
    assert tokens(tokenizer_with_bos, text).count(tokenizer_with_bos.bos_token_id) == 1
    assert caplog.records == []


def test_start_tokens_that_the_template_does_not_write_are_put_before_it_with_a_warning(
    gpt2: Any, tokenizer_with_bos: Any, db: bp.Database, caplog: pytest.LogCaptureFixture
) -> None:
    lm = bp.LanguageModel(gpt2, tokenizer_with_bos, db=db)
    with caplog.at_level(logging.WARNING):
        text = [lm.chat(CONVERSATION[:length], chat_template=CHATML) for length in (2, 4)][-1]
    (record,) = caplog.records
    assert "start tokens" in record.message
    rendered = tokenizer_with_bos.apply_chat_template(
        CONVERSATION[:4], chat_template=CHATML, add_generation_prompt=True, return_dict=False
    )
    assert tokens(tokenizer_with_bos, text) == [tokenizer_with_bos.bos_token_id, *rendered]


def test_smollm2s_own_template_makes_its_chats(smollm2_tokenizer: Any, talk: Callable[..., bp.Text]) -> None:
    text = talk(smollm2_tokenizer, CONVERSATION[1:])
    assert_is_rendering(smollm2_tokenizer, text, CONVERSATION[1:])
    assert strings(text)[0].startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert strings(text)[1:5] == [
        "<|im_start|>assistant\n",
        "<think>\nusers\n</think>\n\nGET /users",
        "<|im_end|>\n",
        "<|im_start|>user\nAnd for orders?<|im_end|>\n",
    ]


def test_a_cut_that_would_change_tokens_is_left_out_and_the_others_stay(
    smollm2_tokenizer: Any, talk: Callable[..., bp.Text]
) -> None:
    text = talk(smollm2_tokenizer, CONVERSATION[3:], chat_template=PLAIN)
    # SmolLM2 reads two line breaks as one token, but only where nothing follows.
    assert strings(text) == [
        "user: And for orders?\n\nassistant:",
        " POST /orders",
        "\n\nuser: The quick brown fox\n\nassistant:",
    ]
    assert_is_rendering(smollm2_tokenizer, text, CONVERSATION[3:], chat_template=PLAIN)


def test_what_an_assistant_wrote_is_a_segment_of_its_own(marked_tokenizer: Any, talk: Callable[..., bp.Text]) -> None:
    assert strings(talk(marked_tokenizer, CONVERSATION[3:], chat_template=CHATML)) == [
        "<|im_start|>user\nAnd for orders?<|im_end|>\n",
        "<|im_start|>assistant\n",
        "POST /orders",
        "<|im_end|>\n",
        "<|im_start|>user\nThe quick brown fox<|im_end|>\n",
        "<|im_start|>assistant\n",
    ]


def test_content_that_the_template_strips_or_puts_a_space_before_is_found(
    tokenizer: Any, talk: Callable[..., bp.Text]
) -> None:
    messages = [*CONVERSATION[3:4], {"role": "assistant", "content": "POST /orders\n"}, CONVERSATION[5]]
    assert "POST /orders" in strings(talk(tokenizer, messages, chat_template=GEMMA))
    assert " POST /orders" in strings(talk(tokenizer, messages, chat_template=MISTRAL))


def test_a_message_without_a_string_as_content_is_no_obstacle(
    marked_tokenizer: Any, talk: Callable[..., bp.Text]
) -> None:
    template = CHATML.replace("m.content", "(m.content or '') | string")
    messages: Chat = [CONVERSATION[1], {"role": "assistant", "content": None}, {"role": "tool", "content": "7"}]
    text = talk(marked_tokenizer, messages, chat_template=template)
    assert_is_rendering(marked_tokenizer, text, messages, chat_template=template)
    assert strings(text)[1:3] == ["<|im_start|>assistant\n", "<|im_end|>\n"]


def test_where_a_later_turn_changes_an_earlier_one_there_is_no_cut(
    marked_tokenizer: Any, talk: Callable[..., bp.Text]
) -> None:
    text = talk(marked_tokenizer, CONVERSATION[1:4], chat_template=STRIPS_THINKING)
    assert strings(text) == [
        "<|im_start|>user\nPick the endpoint.<|im_end|>\n",
        "<|im_start|>assistant\n",
        "\n\nGET /users<|im_end|>\n<|im_start|>user\nAnd for orders?<|im_end|>\n",
        "<|im_start|>assistant\n",
    ]
    moved = talk(marked_tokenizer, CONVERSATION[:4], chat_template=SYSTEM_LAST)
    assert len(strings(moved)) == 2


def test_where_the_template_refuses_a_beginning_there_is_no_cut(
    marked_tokenizer: Any, talk: Callable[..., bp.Text]
) -> None:
    text = talk(marked_tokenizer, CONVERSATION[3:], chat_template=STRICT)
    assert strings(text)[1:4] == [
        "<|im_start|>assistant\n",
        "POST /orders",
        "<|im_end|>\n<|im_start|>user\nThe quick brown fox<|im_end|>\n",
    ]


def test_template_arguments_reach_the_template(marked_tokenizer: Any, talk: Callable[..., bp.Text]) -> None:
    template = "{{ tools | length }} tools, {{ mood }}\n" + CHATML
    arguments = {"chat_template": template, "tools": [{"type": "function"}], "mood": "calm"}
    text = talk(marked_tokenizer, CONVERSATION, **arguments)
    assert strings(text)[0].startswith("1 tools, calm\n")
    assert_is_rendering(marked_tokenizer, text, CONVERSATION, **arguments)


def test_the_last_message_can_be_left_open(marked_tokenizer: Any, talk: Callable[..., bp.Text]) -> None:
    arguments = {"chat_template": CHATML, "add_generation_prompt": False, "continue_final_message": True}
    text = talk(marked_tokenizer, CONVERSATION[:5], **arguments)
    assert strings(text)[-2:] == ["<|im_start|>assistant\n", "POST /orders"]
    assert_is_rendering(marked_tokenizer, text, CONVERSATION[:5], **arguments)


@pytest.mark.parametrize("name", APPENDING)
def test_a_growing_conversation_shares_the_segments_of_its_earlier_turns(
    name: str, tokenizer: Any, talk: Callable[..., bp.Text]
) -> None:
    short, long = (
        talk(tokenizer, CONVERSATION[:length], chat_template=TEMPLATES[name]).segments("") for length in (2, 6)
    )
    assert [segment.id for segment in long[: len(short)]] == [segment.id for segment in short]


@pytest.mark.parametrize(("name", "space"), [("chatml", ""), ("plain", " ")])
def test_a_turn_computes_only_what_follows_the_reply_to_the_one_before(
    name: str, space: str, lm: bp.LanguageModel
) -> None:
    messages = CONVERSATION[3:4]
    for answer in ("POST /orders", "GET /users"):
        reply = (lm.chat(messages, chat_template=TEMPLATES[name]) + (space + answer))()
        messages = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}]
        turn = lm.chat(messages, chat_template=TEMPLATES[name])()
        assert turn.num_cached_tokens == len(reply.input_ids)
        assert turn.input_ids[: len(reply.input_ids)].tolist() == reply.input_ids.tolist()


def test_a_chat_needs_no_model_in_memory(
    gpt2: Any, tokenizer: Any, open_db: Callable[..., bp.Database], tmp_path: Path
) -> None:
    talking = deepcopy(tokenizer)
    talking.chat_template = CHATML
    for part in (gpt2, talking):
        part.save_pretrained(tmp_path / "model")
    db = open_db()
    first = bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db)
    computed = first.chat(CONVERSATION[3:])()
    again = bp.LanguageModel.from_pretrained(str(tmp_path / "model"), db=db)
    found = again.chat(CONVERSATION[3:])()
    assert not again.is_loaded
    assert found.input_ids.tolist() == computed.input_ids.tolist()


def test_a_chat_is_a_text_like_any_other(lm: bp.LanguageModel) -> None:
    prompt = lm.chat(CONVERSATION[3:4], chat_template=CHATML)
    assert str(prompt + "POST").endswith("assistant\nPOST")
    assert lm.score(prompt, ["POST", "GET"]).shape == (2,)


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations(), prompt=st.booleans())
def test_any_conversation_is_what_its_template_renders(
    name: str, tokenizers: list[Any], talk: Callable[..., bp.Text], messages: Chat, prompt: object
) -> None:
    arguments = {"chat_template": TEMPLATES[name], "add_generation_prompt": prompt}
    for tokenizer in tokenizers:
        assert_is_rendering(tokenizer, talk(tokenizer, messages, **arguments), messages, **arguments)


@pytest.mark.parametrize("name", APPENDING)
@given(messages=conversations())
def test_any_growing_conversation_shares_all_but_the_end_of_its_earlier_turns(
    name: str, tokenizers: list[Any], talk: Callable[..., bp.Text], messages: Chat
) -> None:
    assume(len(messages) > 2)
    for tokenizer in tokenizers:
        short, long = (
            strings(talk(tokenizer, part, chat_template=TEMPLATES[name])) for part in (messages[:-2], messages)
        )
        assert long[: len(short) - 1] == short[:-1]


@pytest.mark.parametrize("messages", [[], "Hello", {"role": "user", "content": "Hi"}, [["Hi"]], [CONVERSATION]])
def test_what_is_no_list_of_messages_is_refused(lm: bp.LanguageModel, messages: Any) -> None:
    with pytest.raises(PromptError, match="messages") as caught:
        lm.chat(messages, chat_template=CHATML)
    assert caught.value.hint.startswith("Give")


def test_what_the_template_says_of_messages_that_it_refuses_is_in_the_error(lm: bp.LanguageModel) -> None:
    for messages in (CONVERSATION[3:5], [CONVERSATION[1], CONVERSATION[1]]):
        with pytest.raises(PromptError, match=r"must be from the user|must alternate") as caught:
            lm.chat(messages, chat_template=STRICT)
        assert caught.value.hint.startswith("Give")


def test_messages_that_lack_what_the_template_needs_are_refused(lm: bp.LanguageModel) -> None:
    with pytest.raises(PromptError, match="content"):
        lm.chat([{"role": "user"}], chat_template=CHATML)
    with pytest.raises(PromptError, match="str"):
        lm.chat([{"role": "user", "content": 7}], chat_template=CHATML)


def test_a_template_with_a_mistake_is_refused(lm: bp.LanguageModel) -> None:
    with pytest.raises(PromptError, match="template"):
        lm.chat(CONVERSATION, chat_template="{% for m in messages %}")


def test_a_tokenizer_without_a_template_says_how_to_give_one(lm: bp.LanguageModel) -> None:
    with pytest.raises(PromptError, match="no chat template") as caught:
        lm.chat(CONVERSATION)
    assert "chat_template=" in caught.value.hint


@pytest.mark.parametrize("name", ["tokenize", "sanitize_control_tokens", "max_length"])
def test_arguments_that_are_not_about_the_text_are_refused(lm: bp.LanguageModel, name: str) -> None:
    with pytest.raises(PromptError, match=f"takes no {name}=") as caught:
        lm.chat(CONVERSATION, chat_template=CHATML, **{name: True})
    assert caught.value.hint.startswith("Leave it out")


def test_a_message_that_is_no_unicode_is_refused(lm: bp.LanguageModel) -> None:
    with pytest.raises(InvalidText, match="surrogate"):
        lm.chat([{"role": "user", "content": "\ud800"}], chat_template=CHATML)
