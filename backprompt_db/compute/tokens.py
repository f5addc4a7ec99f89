"""How segments become tokens: each string alone, with the tokenizer's start tokens at the beginning of a prompt."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from backprompt_db.errors import InvalidText, UnsupportedModel
from backprompt_db.keys import SegmentId, TokenizerId
from backprompt_db.text import Seam, Segment

_TOKENIZER = b"backprompt-db/tokenizer/1\0"

_SEAM_CONTEXT_CHARS = 128
"""Seams are compared within this many characters on either side: merges do not reach further."""

_MODEL_OPTIONS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
)

_MAX_REMEMBERED_TOKENS = 1 << 22


class SegmentTokenizer:
    """A tokenizer as prompts see it. Wraps any Hugging Face tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._learn(_signature(tokenizer))

    def _learn(self, signature: object) -> None:
        if getattr(getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None), "dropout", None):
            raise UnsupportedModel("this tokenizer drops merges at random", hint="Set its dropout to None.")
        self._signature = signature
        self.start_ids = start_ids(self.tokenizer)
        self._id: TokenizerId | None = None
        self._remembered: dict[SegmentId, list[int]] = {}
        self._num_remembered_tokens = 0

    @property
    def id(self) -> TokenizerId:
        """The tokenizer id of the tokenizer as it is now; serialised again only when it has changed."""
        signature = _signature(self.tokenizer)
        if signature != self._signature:
            self._learn(signature)
        if self._id is None:
            self._id = tokenizer_id(self.tokenizer, self.start_ids)
        return self._id

    def encode(self, segments: Iterable[Segment]) -> dict[Segment, list[int]]:
        """Return the token ids of each segment; a segment without parents begins with the start tokens.

        Raises `InvalidText` for a segment that has no tokens.
        """
        segments = list(segments)
        encoded = {segment: ids for segment in segments if (ids := self._remembered.get(segment.id))}
        unknown = [segment for segment in segments if segment not in encoded]
        strings = [segment.string for segment in unknown]
        for segment, ids in zip(unknown, encode_strings(self.tokenizer, strings), strict=True):
            if not ids:
                raise InvalidText(
                    f"the piece {segment.string!r} has no tokens under this tokenizer",
                    hint="Join it with the piece before or after it.",
                )
            encoded[segment] = ids if segment.parents else [*self.start_ids, *ids]
            self._remember(segment, encoded[segment])
        return {segment: encoded[segment] for segment in segments}

    def seams(self, segments: Iterable[Segment]) -> list[Seam]:
        """Return the seams between segments and their parents at which joining would change tokens."""
        pairs = [
            (parent.string[-_SEAM_CONTEXT_CHARS:], segment.string[:_SEAM_CONTEXT_CHARS])
            for segment in segments
            for parent in segment.parents
        ]
        pairs = list(dict.fromkeys(pairs))
        strings = [string for left, right in pairs for string in (left, right, left + right)]
        encoded = iter(encode_strings(self.tokenizer, strings))
        return [
            Seam(left, right, self._tokens(left_ids + right_ids), self._tokens(joined_ids))
            for (left, right), left_ids, right_ids, joined_ids in zip(pairs, encoded, encoded, encoded, strict=True)
            if left_ids + right_ids != joined_ids
        ]

    def cuts(self, string: str, num_tokens: int) -> list[int]:
        """Return where to cut `string` into pieces of about `num_tokens` tokens that keep exactly its tokens.

        Cuts are character offsets, at pre-tokeniser boundaries. They depend only on what precedes them and a few
        characters after, so strings with a common beginning share its pieces. A boundary at which a cut would change
        tokens is passed over.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            raise UnsupportedModel(
                f"{type(self.tokenizer).__name__} cannot tell where its tokens lie in a string",
                hint="Use the fast tokenizer, or cut the string yourself.",
            )
        encoding = self.tokenizer(
            string,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids, offsets, words = encoding["input_ids"], encoding["offset_mapping"], encoding.word_ids()
        cuts, begin = [0], 0
        for index in range(1, len(ids)):
            is_boundary = words[index] != words[index - 1] and offsets[index][0] >= offsets[index - 1][1]
            if is_boundary and index - begin >= num_tokens:
                cut = offsets[index][0]
                if encode_strings(self.tokenizer, [string[cuts[-1] : cut]])[0] == ids[begin:index]:
                    cuts.append(cut)
                    begin = index
        return self._checked(string, cuts, ids)

    def _checked(self, string: str, cuts: list[int], ids: list[int]) -> list[int]:
        """Drop cuts from the end until the pieces' tokens are those of the whole string."""
        pieces = [string[first:last] for first, last in itertools.pairwise([*cuts, len(string)])]
        encoded = encode_strings(self.tokenizer, pieces)
        while len(cuts) > 1 and list(itertools.chain.from_iterable(encoded)) != ids:
            cuts.pop()
            encoded[-2:] = encode_strings(self.tokenizer, [string[cuts[-1] :]])
        return cuts[1:]

    def _remember(self, segment: Segment, ids: list[int]) -> None:
        if self._num_remembered_tokens > _MAX_REMEMBERED_TOKENS:
            self._remembered.clear()
            self._num_remembered_tokens = 0
        self._remembered[segment.id] = ids
        self._num_remembered_tokens += len(ids)

    def _tokens(self, ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.tokenizer.convert_ids_to_tokens(list(ids)))


def start_ids(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer puts before a prompt, such as BOS; what it puts after one is not used."""
    (plain,) = encode_strings(tokenizer, ["a"])
    whole = list(tokenizer("a", add_special_tokens=True, padding=False, truncation=False)["input_ids"])
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return whole[:begin]
    raise UnsupportedModel(
        f"{type(tokenizer).__name__} changes the tokens of a text when it adds special tokens",
        hint="Use a tokenizer whose special tokens surround the text.",
    )


def encode_strings(tokenizer: Any, strings: Sequence[str]) -> list[list[int]]:
    """Return the ids of each string alone, without special tokens."""
    if not strings:
        return []
    encoding = tokenizer(list(strings), add_special_tokens=False, padding=False, truncation=False, verbose=False)
    return [list(ids) for ids in encoding["input_ids"]]


def tokenizer_id(tokenizer: Any, start_ids: Iterable[int]) -> TokenizerId:
    """Return the id of a tokenizer: its serialisation, its special tokens, and what it puts before a prompt."""
    facts: dict[str, Any] = {
        "start_ids": list(start_ids),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
    }
    if getattr(tokenizer, "is_fast", False):
        serialised = json.loads(tokenizer.backend_tokenizer.to_str())
        # Calls set padding and truncation on the tokenizer; ours always turn both off.
        facts["tokenizer"] = {**serialised, "padding": None, "truncation": None}
    else:
        facts["tokenizer"] = [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), _probe(tokenizer)]
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    return TokenizerId(hashlib.sha256(_TOKENIZER + text.encode()).digest())


def _signature(tokenizer: Any) -> object:
    """What changes when a tokenizer is changed in place; of its merges, those that a sample of text shows."""
    parts: list[object] = [len(tokenizer), sorted(map(str, tokenizer.special_tokens_map.items()))]
    if getattr(tokenizer, "is_fast", False):
        backend = tokenizer.backend_tokenizer
        steps = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
        parts += [None if step is None else step.__getstate__() for step in steps]
        parts += [type(backend.model).__name__, *(getattr(backend.model, name, None) for name in _MODEL_OPTIONS)]
        parts.append(_probe(tokenizer))
    return [*parts, bool(getattr(tokenizer, "split_special_tokens", False))]


def _probe(tokenizer: Any) -> list[int]:
    """What a tokenizer does shows on a sample of every kind of character."""
    sample = "The naïve café's 3.14 %s — tabs\tand\n\n  spaces; 你好 🙂 İstanbul ﬁ" * 2
    return list(tokenizer(sample, add_special_tokens=False, padding=False, truncation=False)["input_ids"])
