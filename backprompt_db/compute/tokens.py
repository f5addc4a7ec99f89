"""How segments become tokens: each string alone, with the tokenizer's start tokens at the beginning of a prompt."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from backprompt_db.errors import InvalidText, UnsupportedModel
from backprompt_db.prompt.ids import SegmentId, TokenizerId, tokenizer_id
from backprompt_db.prompt.segments import Seam, Segment

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


class _Place(NamedTuple):
    """A place between two tokens of a string."""

    in_string: int
    in_ids: int


class _Pieces:
    """The beginning of a string, cut into pieces whose tokens are those that the string has there."""

    def __init__(self, tokenizer: Any, string: str, ids: list[int], start_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._string = string
        self._ids = ids
        self._start_ids = start_ids
        self._known: dict[str, list[int]] = {}
        self.places = [_Place(0, 0)]
        """Where the pieces begin, and where the last of them ends."""

    def learn(self, offsets: Sequence[int]) -> None:
        """Encode the pieces between `offsets` in one call: most of them will be asked for."""
        pieces = [self._string[first:last] for first, last in itertools.pairwise(offsets)]
        self._known.update(zip(pieces, encode_strings(self._tokenizer, pieces), strict=True))

    def end_at(self, end: int, *, num_tries: int) -> None:
        """End a piece at `end`, or none if that would change tokens.

        The fault may be that of the cut before, so the piece is also tried without that one, and so on.
        """
        for index in reversed(range(len(self.places))[-num_tries:]):
            num_tokens = self._num_tokens(self.places[index], end)
            if num_tokens:
                self.places[index + 1 :] = [_Place(end, self.places[index].in_ids + num_tokens)]
                return

    def _num_tokens(self, begin: _Place, end: int) -> int:
        """The number of tokens from `begin` to `end`, or 0 if the piece there has others than the string."""
        ids = self._encode(self._string[begin.in_string : end])
        end_in_ids = begin.in_ids + len(ids)
        is_same = ids == self._ids[begin.in_ids : end_in_ids]
        is_whole = end < len(self._string) or end_in_ids == len(self._ids)
        # A first piece that ends within the start tokens would be given them once more.
        has_start = begin.in_ids > 0 or _begin(ids, self._start_ids) == _begin(self._ids, self._start_ids)
        return len(ids) if is_same and is_whole and has_start else 0

    def _encode(self, piece: str) -> list[int]:
        if piece not in self._known:
            self._known[piece] = encode_strings(self._tokenizer, [piece])[0]
        return self._known[piece]


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
        self._refresh()
        if self._id is None:
            self._id = tokenizer_id(self.definition())
        return self._id

    def definition(self) -> str:
        """Return all that changes the tokenizer's tokens, as JSON; it is serialised anew."""
        return definition(self.tokenizer, self.start_ids)

    @property
    def is_fast(self) -> bool:
        """Whether the definition has the whole tokenizer, so that it can be made again from that alone."""
        return bool(getattr(self.tokenizer, "is_fast", False))

    def _refresh(self) -> None:
        """Learn the tokenizer again if it was changed in place."""
        signature = _signature(self.tokenizer)
        if signature != self._signature:
            self._learn(signature)

    def encode(self, segments: Iterable[Segment]) -> dict[Segment, list[int]]:
        """Return the token ids of each segment; a segment without parents begins with the start tokens.

        They are not put there twice: a string that writes them itself, as many chat templates do, is left as it is.
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
            encoded[segment] = ids if segment.parents or _begin(ids, self.start_ids) else [*self.start_ids, *ids]
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
        if not self.is_fast:
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
        return self._exact(string, cuts[1:], ids)

    def exact_cuts(self, string: str, cuts: Sequence[int]) -> list[int]:
        """Return those of the offsets `cuts`, ascending, at which `string` falls into pieces with exactly its tokens.

        Only cuts that change tokens are left out. Whether one stays depends on what precedes it and on the piece after
        it, so strings with a common beginning share its pieces.
        """
        self._refresh()
        return self._exact(string, cuts, encode_strings(self.tokenizer, [string])[0])

    def writes_start(self, string: str) -> bool:
        """Return whether a prompt that begins with `string` has its start tokens without their being put there."""
        self._refresh()
        return _begin(encode_strings(self.tokenizer, [string])[0], self.start_ids)

    def _exact(self, string: str, cuts: Sequence[int], ids: list[int]) -> list[int]:
        pieces = _Pieces(self.tokenizer, string, ids, self.start_ids)
        pieces.learn([0, *cuts, len(string)])
        for cut in cuts:
            pieces.end_at(cut, num_tries=2)
        pieces.end_at(len(string), num_tries=len(pieces.places))
        return [place.in_string for place in pieces.places[1:] if place.in_string < len(string)]

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


def _begin(ids: list[int], start_ids: list[int]) -> bool:
    """Whether `ids` begin with the start tokens."""
    return ids[: len(start_ids)] == start_ids


def encode_strings(tokenizer: Any, strings: Sequence[str]) -> list[list[int]]:
    """Return the ids of each string alone, without special tokens."""
    if not strings:
        return []
    encoding = tokenizer(list(strings), add_special_tokens=False, padding=False, truncation=False, verbose=False)
    return [list(ids) for ids in encoding["input_ids"]]


def definition(tokenizer: Any, start_ids: Iterable[int]) -> str:
    """Return what a tokenizer's id is the digest of: the tokenizer, special tokens, what it puts before a prompt."""
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
    if facts["start_ids"]:
        # Before this rule, such a prompt had them twice. The ids of tokenizers without them stay what they were.
        facts["start_ids_are_put"] = "unless the prompt begins with them"
    return json.dumps(facts, sort_keys=True, ensure_ascii=True)


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
