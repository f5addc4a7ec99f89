"""How segments become tokens, and how tokens become strings again to be shown.

Each string is tokenised alone, with the tokenizer's start tokens at the beginning of a prompt.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import weakref
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from backprompt_db.database.vocabulary import open_vocabulary, vocabulary_of
from backprompt_db.errors import CatalogError, InvalidText, ModelMismatch, UnsupportedModel
from backprompt_db.prompt.ids import SegmentId, TokenizerId, tokenizer_id
from backprompt_db.prompt.segments import Seam, Segment

if TYPE_CHECKING:
    from backprompt_db.database.database import Database
    from backprompt_db.views.scene import Vocabulary

logger = logging.getLogger(__name__)

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

_SKETCH = b"backprompt-db/tokenizer sketch/1\0"
"""Another one as soon as `definition` is: then remembered ids are made again."""

_MAX_REMEMBERED_TOKENS = 1 << 22
_MAX_VOCABULARIES = 4

_vocabularies: dict[TokenizerId, Vocabulary] = {}
"""Opening one takes a fifth of a second, and a notebook shows result after result."""


class SegmentTokenizer:
    """A tokenizer as prompts see it. Wraps any Hugging Face tokenizer, and may be used by many threads."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._learned = _Learned(tokenizer, _signature(tokenizer))

    @property
    def own(self) -> Any:
        """The copy of a fast tokenizer that is used here, as nobody else pads or truncates with it; a slow one itself.

        A fast tokenizer keeps the padding and truncation of its last call, and obeys whatever another thread has set.
        """
        return self._learned.tokenizer

    @property
    def start_ids(self) -> list[int]:
        """The ids that the tokenizer puts before a prompt, such as BOS."""
        return self._learned.start_ids

    @property
    def id(self) -> TokenizerId:
        """The tokenizer id of the tokenizer as it is now; serialised again only when it has changed."""
        learned = self._refreshed()
        if learned.id is None:
            learned.id = tokenizer_id(learned.definition())
        return learned.id

    def recognise(self, tokenizer_id: TokenizerId, *, sketch: bytes) -> bool:
        """Take over the id of files that have not changed, if the tokenizer has the sketch of what they were."""
        learned = self._refreshed()
        if self.is_fast and learned.id is None and _sketch(learned.signature) == sketch:
            learned.id = tokenizer_id
        return learned.id == tokenizer_id

    def sketch(self) -> bytes:
        """Return the sketch by which `recognise` knows the tokenizer: its steps and options, and a sample's tokens."""
        return _sketch(self._refreshed().signature)

    def definition(self) -> str:
        """Return everything that changes the tokenizer's tokens, as JSON. The tokenizer is serialised anew."""
        return self._refreshed().definition()

    @property
    def is_fast(self) -> bool:
        """Whether the tokenizer can be made again from its definition alone."""
        return _is_fast(self.tokenizer)

    def _refreshed(self) -> _Learned:
        """Return what is known of the tokenizer, learned again if it was changed in place."""
        signature = _signature(self.tokenizer)
        if signature != self._learned.signature:
            self._learned = _Learned(self.tokenizer, signature)
        return self._learned

    def decode(self, ids: Sequence[int]) -> str:
        """Return the string of tokens, special ones included, with nothing tidied up."""
        string: str = self.own.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return string

    def encode(self, segments: Iterable[Segment]) -> dict[Segment, list[int]]:
        """Return the token ids of each segment; a segment without parents begins with the start tokens.

        A string that begins with the start tokens itself, as many chat templates do, does not get them twice.
        Raises `InvalidText` for a segment that has no tokens.
        """
        learned, segments = self._learned, list(segments)
        encoded = {segment: ids for segment in segments if (ids := learned.remembered.get(segment.id))}
        unknown = [segment for segment in segments if segment not in encoded]
        strings = [segment.string for segment in unknown]
        for segment, ids in zip(unknown, encode_strings(learned.tokenizer, strings), strict=True):
            if not ids:
                raise InvalidText(
                    f"the piece {segment.string!r} has no tokens under this tokenizer",
                    hint="Join it with the piece before or after it.",
                )
            is_whole = segment.parents or _begin(ids, learned.start_ids)
            encoded[segment] = ids if is_whole else [*learned.start_ids, *ids]
            learned.remember(segment, encoded[segment])
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
        encoded = iter(encode_strings(self.own, strings))
        return [
            Seam(left, right, (*self._shown(left), *self._shown(right)), self._shown(left + right))
            for (left, right), left_ids, right_ids, joined_ids in zip(pairs, encoded, encoded, encoded, strict=True)
            if left_ids + right_ids != joined_ids
        ]

    def cuts(self, string: str, num_tokens: int) -> list[int]:
        """Return where to cut `string` into pieces of about `num_tokens` tokens that keep exactly its tokens.

        Cuts are character offsets, at pre-tokeniser boundaries. They depend only on what precedes them and a few
        characters after, so strings with a common beginning share its pieces. Boundaries at which a cut would change
        tokens are skipped.
        """
        if not self.is_fast:
            raise UnsupportedModel(
                f"{type(self.tokenizer).__name__} cannot tell where its tokens lie in a string",
                hint="Use the fast tokenizer, or cut the string yourself.",
            )
        encoding = self._encoding(string)
        ids, offsets, words = encoding["input_ids"], encoding["offset_mapping"], encoding.word_ids()
        cuts, begin = [0], 0
        for index in range(1, len(ids)):
            is_boundary = words[index] != words[index - 1] and offsets[index][0] >= offsets[index - 1][1]
            if is_boundary and index - begin >= num_tokens:
                cut = offsets[index][0]
                if encode_strings(self.own, [string[cuts[-1] : cut]])[0] == ids[begin:index]:
                    cuts.append(cut)
                    begin = index
        return self._exact(string, cuts[1:], ids, {})

    @property
    def separators(self) -> str:
        """Space, newline, both or neither: where one stands between two words, no token crosses.

        What comes before it changes no token after it, nor the other way round. Found out on a sample of many scripts,
        which must have the same tokens when it is cut before any of its words; only for fast tokenizers.
        """
        learned = self._refreshed()
        if learned.separators is None:
            learned.separators = "".join(
                each for each in " \n" if self.is_fast and _parts_words(learned.tokenizer, each)
            )
        return learned.separators

    def words(self, string: str) -> list[int]:
        """Return the offsets in `string` at which the pre-tokeniser begins a word, or white space."""
        if not self.is_fast:
            return []
        encoding = self._encoding(string)
        offsets, words = encoding["offset_mapping"], encoding.word_ids()
        # Some tokenizers leave the space before a word out of its offsets.
        begins = (
            offsets[index - 1][1]
            for index, (begin, _) in enumerate(offsets)
            if index and words[index] != words[index - 1] and not string[offsets[index - 1][1] : begin].strip()
        )
        return sorted({*begins} - {0})

    def encode_strings(self, strings: Sequence[str]) -> dict[str, list[int]]:
        """Return the ids of each string alone, without special tokens."""
        return dict(zip(strings, encode_strings(self._refreshed().tokenizer, strings), strict=True))

    def exact_cuts(
        self, string: str, cuts: Sequence[int], encoded: MutableMapping[str, list[int]] | None = None
    ) -> list[int]:
        """Return the `cuts`, ascending offsets, at which `string` can be cut into pieces with exactly its tokens.

        Cuts that would change tokens are dropped. Whether one stays depends on what precedes it and on the piece after
        it, so strings with a common beginning share its pieces. `encoded` has the ids of strings that were encoded
        already, and gets those of others.
        """
        encoded = {} if encoded is None else encoded
        if string not in encoded:
            encoded.update(self.encode_strings([string]))
        return self._exact(string, cuts, encoded[string], encoded)

    def writes_start(self, string: str) -> bool:
        """Return whether `string` itself begins with the start tokens of a prompt."""
        learned = self._refreshed()
        return _begin(encode_strings(learned.tokenizer, [string])[0], learned.start_ids)

    def _exact(
        self, string: str, cuts: Sequence[int], ids: list[int], encoded: MutableMapping[str, list[int]]
    ) -> list[int]:
        pieces = _Pieces(self.own, string, ids, self.start_ids, encoded)
        pieces.learn([0, *cuts, len(string)])
        for cut in cuts:
            pieces.end_at(cut, num_tries=2)
        pieces.end_at(len(string), num_tries=len(pieces.places))
        return [place.in_string for place in pieces.places[1:] if place.in_string < len(string)]

    def _shown(self, string: str) -> tuple[str, ...]:
        """Return the share of a string that each of its tokens has; of a character, its first token has all."""
        if not self.is_fast:
            ids = encode_strings(self.own, [string])[0]
            return tuple(self.own.convert_ids_to_tokens(ids))
        ends = [end for _, end in self._encoding(string)["offset_mapping"]]
        return tuple(string[begin:end] for begin, end in itertools.pairwise([0, *ends]))

    def _encoding(self, string: str) -> Any:
        """Return the encoding of a string alone by a fast tokenizer, with offsets."""
        return self.own(
            string,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            verbose=False,
        )


class _Learned:
    """A tokenizer as it was when its signature was taken, and what was found out about it.

    Threads that use it go on with what they have begun with while another one learns the tokenizer again.
    """

    def __init__(self, tokenizer: Any, signature: object) -> None:
        if getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "dropout", None):
            raise UnsupportedModel("this tokenizer drops merges at random", hint="Set its dropout to None.")
        self.signature = signature
        self.tokenizer = _own_copy(tokenizer, signature) if _is_fast(tokenizer) else tokenizer
        self.start_ids = start_ids(self.tokenizer)
        self.id: TokenizerId | None = None
        self.separators: str | None = None
        self.remembered: dict[SegmentId, list[int]] = {}
        self._num_remembered_tokens = 0

    def definition(self) -> str:
        return definition(self.tokenizer, self.start_ids)

    def remember(self, segment: Segment, ids: list[int]) -> None:
        if self._num_remembered_tokens > _MAX_REMEMBERED_TOKENS:
            self.remembered.clear()
            self._num_remembered_tokens = 0
        self.remembered[segment.id] = ids
        self._num_remembered_tokens += len(ids)


def _is_fast(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "is_fast", False))


_copies: weakref.WeakKeyDictionary[Any, tuple[object, Any]] = weakref.WeakKeyDictionary()
"""The copy of each tokenizer, with its signature: making one takes as long as reading the tokenizer."""


def _own_copy(tokenizer: Any, signature: object) -> Any:
    """Return a copy of a fast tokenizer that neither pads nor truncates."""
    known = _copies.get(tokenizer)
    if known is not None and known[0] == signature:
        return known[1]
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.no_padding()
    own.backend_tokenizer.no_truncation()
    _copies[tokenizer] = signature, own
    return own


def start_ids(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer puts before a prompt, such as BOS; ids that it puts after one are not used."""
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
    """Return the JSON text that a tokenizer's id is the digest of: tokenizer, special tokens and start tokens."""
    facts: dict[str, Any] = {
        "start_ids": list(start_ids),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
    }
    if _is_fast(tokenizer):
        serialised = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are set by calls; our calls always turn both off.
        facts["tokenizer"] = {**serialised, "padding": None, "truncation": None}
    else:
        facts["tokenizer"] = [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), _probe(tokenizer)]
    if facts["start_ids"]:
        # Before this rule, such a prompt had them twice. Tokenizers without start tokens keep their ids.
        facts["start_ids_are_put"] = "unless the prompt begins with them"
    return json.dumps(facts, sort_keys=True, ensure_ascii=True)


def _signature(tokenizer: Any) -> object:
    """Return a value that differs after a tokenizer was changed in place; merges count if a sample text shows them."""
    parts: list[object] = [len(tokenizer), sorted(map(str, tokenizer.special_tokens_map.items()))]
    if _is_fast(tokenizer):
        backend = tokenizer.backend_tokenizer
        steps = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
        parts += [None if step is None else step.__getstate__() for step in steps]
        parts += [type(backend.model).__name__, *(getattr(backend.model, name, None) for name in _MODEL_OPTIONS)]
        parts.append(_merged(backend))
    return [*parts, bool(getattr(tokenizer, "split_special_tokens", False))]


def _sketch(signature: object) -> bytes:
    return hashlib.sha256(_SKETCH + repr(signature).encode()).digest()


_SAMPLE = "The naïve café's 3.14 %s — tabs\tand\n\n  spaces; 你好 🙂 İstanbul ﬁ" * 2
"""Every kind of character: what a tokenizer does shows there."""

_WORDS = "it has 12 apples d'été und Äpfel मेरे पास हैं у меня есть τα μήλα عندي تفاح 사과 가 있다 ab1 2cd def foo the end"  # noqa: RUF001


def _probe(tokenizer: Any) -> list[int]:
    """Return the tokens of a sample."""
    return list(tokenizer(_SAMPLE, add_special_tokens=False, padding=False, truncation=False)["input_ids"])


def _merged(backend: Any) -> list[int]:
    """Return the tokens that the steps of a fast tokenizer make of a sample.

    A call of the tokenizer itself would end the padding and truncation that another thread has just set.
    """
    text = _SAMPLE if backend.normalizer is None else backend.normalizer.normalize_str(_SAMPLE)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


def _parts_words(tokenizer: Any, separator: str) -> bool:
    """Whether a sample of words can be cut before each separator."""
    backend = tokenizer.backend_tokenizer
    prepends = backend.normalizer is not None and b"Prepend" in backend.normalizer.__getstate__()
    has_phrases = any(separator in token.content.strip() for token in backend.get_added_tokens_decoder().values())
    if backend.pre_tokenizer is None or prepends or has_phrases:
        return False
    sample = _WORDS.replace(" ", separator)
    places = [place for place, character in enumerate(sample) if character == separator]
    pieces = [piece for place in places for piece in (sample[:place], sample[place:])]
    whole, *parts = encode_strings(tokenizer, [sample, *pieces])
    return all(left + right == whole for left, right in zip(parts[::2], parts[1::2], strict=True))


class _Place(NamedTuple):
    """A place between two tokens of a string."""

    in_string: int
    in_ids: int


class _Pieces:
    """The beginning of a string, cut into pieces that have the same tokens alone as within the string."""

    def __init__(
        self,
        tokenizer: Any,
        string: str,
        ids: list[int],
        start_ids: list[int],
        known: MutableMapping[str, list[int]],
    ) -> None:
        self._tokenizer = tokenizer
        self._string = string
        self._ids = ids
        self._start_ids = start_ids
        self._known = known
        """The ids of strings."""
        self.places = [_Place(0, 0)]
        """Where each piece begins, and where the last one ends."""

    def learn(self, offsets: Sequence[int]) -> None:
        """Encode the pieces between `offsets` in one call: most of them will be needed."""
        pieces = [self._string[first:last] for first, last in itertools.pairwise(offsets)]
        pieces = [piece for piece in pieces if piece not in self._known]
        self._known.update(zip(pieces, encode_strings(self._tokenizer, pieces), strict=True))

    def end_at(self, end: int, *, num_tries: int) -> None:
        """End a piece at `end`, unless that would change tokens.

        The cut before may be the one that changes them: then the piece is tried without that cut, and so on.
        """
        for index in reversed(range(len(self.places))[-num_tries:]):
            num_tokens = self._num_tokens(self.places[index], end)
            if num_tokens:
                self.places[index + 1 :] = [_Place(end, self.places[index].in_ids + num_tokens)]
                return

    def _num_tokens(self, begin: _Place, end: int) -> int:
        """Return the number of tokens from `begin` to `end`, or 0 if the piece alone has other tokens."""
        ids = self._encode(self._string[begin.in_string : end])
        end_in_ids = begin.in_ids + len(ids)
        is_same = ids == self._ids[begin.in_ids : end_in_ids]
        is_whole = end < len(self._string) or end_in_ids == len(self._ids)
        # A first piece that ends within the start tokens would get them a second time.
        has_start = begin.in_ids > 0 or _begin(ids, self._start_ids) == _begin(self._ids, self._start_ids)
        return len(ids) if is_same and is_whole and has_start else 0

    def _encode(self, piece: str) -> list[int]:
        if piece not in self._known:
            self._known[piece] = encode_strings(self._tokenizer, [piece])[0]
        return self._known[piece]


def vocabulary(db: Database, tokenizer_id: TokenizerId, *, load: Callable[[], SegmentTokenizer]) -> Vocabulary:
    """Return the tokens of a tokenizer as strings: out of the catalog, else out of the tokenizer that `load` returns.

    Raises `ModelMismatch` where that one has another id.
    """
    if tokenizer_id not in _vocabularies:
        found = _recorded_vocabulary(db, tokenizer_id) or _loaded_vocabulary(load(), tokenizer_id)
        if len(_vocabularies) >= _MAX_VOCABULARIES:
            _vocabularies.clear()
        _vocabularies[tokenizer_id] = found
    return _vocabularies[tokenizer_id]


def _recorded_vocabulary(db: Database, tokenizer_id: TokenizerId) -> Vocabulary | None:
    try:
        return None if db.catalog is None else open_vocabulary(db.catalog, tokenizer_id)
    except CatalogError as error:
        logger.info("the catalog cannot be read: %s", error)
        return None


def _loaded_vocabulary(tokenizer: SegmentTokenizer, tokenizer_id: TokenizerId) -> Vocabulary:
    if tokenizer.id != tokenizer_id:
        raise ModelMismatch("the tokenizer has changed since this was computed", hint="Run the text again.")
    found = vocabulary_of(tokenizer.definition()) if tokenizer.is_fast else None
    return found or _DecodedVocabulary(tokenizer.tokenizer)


class _DecodedVocabulary:
    """The tokens of a tokenizer that cannot tell where they lie in a text: each is decoded alone."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def pieces(self, _: str, ids: Sequence[int]) -> list[str]:
        return [self.token(each) for each in ids]

    def token(self, token_id: int) -> str:
        # Models may predict ids that no token has: their last matrix may have more rows than there are tokens.
        return str(self._tokenizer.decode([token_id])) if token_id < len(self._tokenizer) else ""
