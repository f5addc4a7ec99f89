"""Healing seams: a text without branches is run in pieces that have together exactly the tokens of its joined string.

Where the pieces as they were written have them, they are run as they are. Where a token crosses a seam, the cut moves
to the left, to the beginning of a word, so that all that goes on from one beginning shares it up to there.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from backprompt_db.catalog.records import CutsRecord, are_cuts
from backprompt_db.errors import PromptError
from backprompt_db.prompt.segments import SeamRule, Segment, ancestry
from backprompt_db.prompt.text import Text

if TYPE_CHECKING:
    from backprompt_db.compute.tokens import SegmentTokenizer
    from backprompt_db.database.catalogs import ModelMetadata
    from backprompt_db.prompt.ids import SegmentId, TokenizerId

logger = logging.getLogger(__name__)

_SEAMS = b"backprompt-db/seams/1\0"

_WINDOW_CHARS = 64
"""At least so much of the string before a seam is tokenised again: a place for another cut is looked for there."""

_LONG_CHARS = 512
"""A longer window begins at a word instead of at a cut."""

_NUM_TRIES = 3
"""At how many words before a seam a cut is tried."""

_MIN_CHARS = 24
"""A shorter beginning is not worth a segment of its own."""

_MAX_ENCODED_CHARS = 1 << 19
"""About so much is encoded at a time."""

_MAX_REMEMBERED = 1 << 18

_warned: weakref.WeakSet[SegmentTokenizer] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Healed:
    """A text, and the segments in which it is run."""

    text: Text
    tips: tuple[Segment, ...]
    donors: Mapping[Segment, Segment] = field(default_factory=dict)
    """For each segment that ends before a seam, the one that ends at it: both begin with the same tokens."""

    @classmethod
    def as_written(cls, text: Text, *, namespace: str) -> Healed:
        """Return a text that is run in the pieces in which it was written."""
        return cls(text, text.tips(namespace))

    @property
    def segments(self) -> list[Segment]:
        """Each segment once, parents before children, in the order written."""
        return ancestry(self.tips)


Heal = Callable[[Text], Healed]
"""Finds the segments in which a text is run."""


class Ending(NamedTuple):
    """A completion after a prompt. Its log-probability is that of `segments`, minus that of `without`."""

    segments: tuple[Segment, ...]
    """What prompt and completion end with together."""
    without: tuple[Segment, ...]
    """What the prompt ends with alone: something only where a token crosses the seam between the two."""
    donors: Mapping[Segment, Segment]


class TokenizerSource(Protocol):
    """A tokenizer, which is loaded only where it is needed, and its id."""

    @property
    def tokenizer_id(self) -> TokenizerId:
        """The id of the tokenizer as it is now."""

    @property
    def tokenizer(self) -> SegmentTokenizer:
        """The tokenizer."""


class Healer:
    """Finds the pieces in which texts are run, and remembers them: a text that was healed once needs no tokenizer."""

    def __init__(self, source: TokenizerSource, model_metadata: ModelMetadata) -> None:
        self._source = source
        self._metadata = model_metadata
        self._remembered: dict[bytes, tuple[int, ...]] = {}
        self.unhealed: set[SegmentId] = set()
        """Segments of texts that keep their pieces because of branches or explicit starts, and not by choice."""

    def heal(self, texts: Iterable[Text], *, namespace: str) -> list[Healed]:
        """Return the segments in which each text is run.

        Loads the tokenizer only for a text that was never healed. Raises `PromptError` for a text with
        `seams="error"` in which a token crosses a seam.
        """
        texts = list(texts)
        chains = [text.chain(namespace) for text in texts]
        chains = [chain if len(chain) > 1 else [] for chain in chains]
        tokenizer_id = self._source.tokenizer_id if any(chains) else b""
        keys = [_key(tokenizer_id, chain[-1]) if chain else b"" for chain in chains]
        known = self._recall({key: chain for key, chain in zip(keys, chains, strict=True) if chain})
        unknown = {key: chain for key, chain in zip(keys, chains, strict=True) if chain and key not in known}
        new = self._cut(unknown, tokenizer_id) if unknown else {}
        known |= new
        if new and self._source.tokenizer_id != tokenizer_id:  # once loaded, it is another one than was recorded
            return self.heal(texts, namespace=namespace)
        self._metadata.save(*(CutsRecord(key, cuts) for key, cuts in new.items()))
        return [
            self._healed(text, chain, known[key]) if chain else self._kept(text, namespace)
            for text, chain, key in zip(texts, chains, keys, strict=True)
        ]

    def endings(self, prompts: Sequence[Text], completions: Sequence[Text], *, namespace: str) -> list[Ending]:
        """Return what each completion is after each prompt, prompt by prompt.

        Raises `PromptError` for an empty completion, and where nothing predicts the first token of a segment.
        """
        alone = [healed for healed in self.heal(prompts, namespace=namespace) for _ in completions]
        both = [prompt.continued(each) for prompt in prompts for each in completions]
        endings = []
        for prompt, joined in zip(alone, self.heal(both, namespace=namespace), strict=True):
            is_chain = bool(joined.text.chain(namespace))
            written = prompt if is_chain else Healed.as_written(prompt.text, namespace=namespace)
            endings.append(_ending(written, joined))
        return endings

    def _recall(self, chains: Mapping[bytes, Sequence[Segment]]) -> dict[bytes, tuple[int, ...]]:
        # Asked once for each: another thread may clear what is remembered at any time.
        known = {key: cuts for key in chains if (cuts := self._remembered.get(key)) is not None}
        found = self._metadata.cuts(chains.keys() - known.keys()) if len(known) < len(chains) else {}
        found = {key: cuts for key, cuts in found.items() if are_cuts(cuts, num_characters=_length(chains[key]))}
        self._remember(found)
        return known | found

    def _remember(self, found: Mapping[bytes, tuple[int, ...]]) -> None:
        if len(self._remembered) > _MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered.update(found)

    def _cut(self, chains: Mapping[bytes, Sequence[Segment]], tokenizer_id: bytes) -> dict[bytes, tuple[int, ...]]:
        """Return where to cut the joined strings of chains."""
        found: dict[bytes, tuple[int, ...]] = {}
        waiting = dict(chains)
        while waiting:
            cutter = _Cutter(self._source.tokenizer)
            some = self._ends(waiting, tokenizer_id, cutter)
            cutter.encode(seam for seam in some.values() if seam is not None)
            found |= {key: self._cuts(waiting.pop(key), tokenizer_id, cutter) for key in some}
        return found

    def _ends(
        self, chains: Mapping[bytes, Sequence[Segment]], tokenizer_id: bytes, cutter: _Cutter
    ) -> dict[bytes, _SeamWindow | None]:
        """Return what is read at the ends of the first chains, as far as their beginnings are known.

        They are many where many completions follow one prompt, and no more than can be held in memory.
        """
        ends: dict[bytes, _SeamWindow | None] = {}
        num_characters = 0
        for key, chain in chains.items():
            ends[key] = None
            cuts = self._remembered.get(_key(tokenizer_id, chain[-2])) if len(chain) > 2 else ()
            if cuts is not None:
                before = "".join(segment.string for segment in chain[:-1])
                ends[key] = seam = cutter.seam(before, cuts, chain[-1].string)
                num_characters += len(seam.string)
            if num_characters > _MAX_ENCODED_CHARS:
                break
        return ends

    def _cuts(self, chain: Sequence[Segment], tokenizer_id: bytes, cutter: _Cutter) -> tuple[int, ...]:
        """Return where to cut the joined string of a chain, piece by piece from the left."""
        keys = [_key(tokenizer_id, segment) for segment in chain]
        known = ((number, self._remembered.get(key)) for number, key in reversed(list(enumerate(keys))))
        num_known, cuts = next(((number, cuts) for number, cuts in known if cuts is not None), (0, ()))
        string = "".join(segment.string for segment in chain[: num_known + 1])
        for key, segment in zip(keys[num_known + 1 :], chain[num_known + 1 :], strict=True):
            cuts = cutter.continued(string, cuts, segment.string)
            string += segment.string
            self._remember({key: cuts})
        return cuts

    def _healed(self, text: Text, chain: Sequence[Segment], cuts: Sequence[int]) -> Healed:
        ends = list(itertools.accumulate(len(segment.string) for segment in chain))
        if list(cuts) == ends[:-1]:
            return Healed(text, (chain[-1],))
        if text.seam_rule is SeamRule.ERROR:
            raise self._refusal(chain)
        string, namespace = "".join(segment.string for segment in chain), chain[0].namespace
        donors: dict[Segment, Segment] = {}
        tip: tuple[Segment, ...] = ()
        for begin, end in itertools.pairwise((0, *cuts, len(string))):
            before, tip = tip, (Segment.after(tip, string[begin:end], start=None, namespace=namespace),)
            if end not in ends:
                seam = next(each for each in ends if each > end)
                donors[tip[0]] = Segment.after(before, string[begin:seam], start=None, namespace=namespace)
        return Healed(text, tip, donors)

    def _kept(self, text: Text, namespace: str) -> Healed:
        healed = Healed.as_written(text, namespace=namespace)
        if text.seam_rule is not SeamRule.KEEP:
            segments = healed.segments
            if text.seam_rule is SeamRule.ERROR and self._source.tokenizer.seams(segments):
                raise self._refusal(segments)
            if len(segments) > 1:
                if len(self.unhealed) > _MAX_REMEMBERED:
                    self.unhealed.clear()
                self.unhealed.update(segment.id for segment in segments)
        return healed

    def _refusal(self, chain: Sequence[Segment]) -> PromptError:
        seams = self._source.tokenizer.seams(chain)
        shown = seams[0] if seams else "its pieces have other tokens than their joined string"
        return PromptError(
            f"a token crosses a seam: {shown}",
            hint='Cut elsewhere, or leave out seams="error": then the joined string is run.',
        )


def merged_donors(each: Iterable[Healed | Ending]) -> dict[Segment, Segment]:
    """Return the donors of several texts."""
    return {segment: donor for some in each for segment, donor in some.donors.items()}


def ending_as_written(prompt: Text, completion: Text, *, namespace: str) -> tuple[Segment, ...]:
    """Return the segments of a completion where both are run in the pieces in which they were written.

    Raises `PromptError` for an empty completion, and where nothing predicts the first token of a segment.
    """
    joined = Healed.as_written(prompt.continued(completion), namespace=namespace)
    return _ending(Healed.as_written(prompt, namespace=namespace), joined).segments


def _ending(prompt: Healed, joined: Healed) -> Ending:
    before, after = prompt.segments, joined.segments
    rest = tuple(ancestry(joined.tips, without=before))
    lost = tuple(ancestry(prompt.tips, without=after))
    if not rest:
        raise PromptError("a completion is empty", hint="Give at least one character.")
    if not lost and any(len(segment.parents) != 1 for segment in rest):
        raise PromptError(
            "a completion directly follows parallel branches, where nothing predicts its first token",
            hint="Put the text that asks for the completion after the branches.",
        )
    donor = joined.donors.get(rest[0])
    if donor is None or lost != (donor,):
        return Ending(rest, lost, joined.donors)
    # A token crosses the seam: up to the cut before it, both texts are the same.
    head = rest[0]
    tail = Segment.after((head,), donor.string[len(head.string) :], start=None, namespace=head.namespace)
    return Ending(rest[1:], (tail,), joined.donors)


def _length(chain: Iterable[Segment]) -> int:
    """Return how many characters the joined string has."""
    return sum(len(segment.string) for segment in chain)


def _key(tokenizer_id: bytes, tip: Segment) -> bytes:
    return hashlib.sha256(_SEAMS + tokenizer_id + tip.id).digest()


class _SeamWindow(NamedTuple):
    """The end of a string that goes on: as much of it as may have other tokens then, with what follows."""

    begin: int
    """Where it begins in the string."""
    string: str
    cuts: list[int]
    """Where the string is cut, in the window."""
    seam: int
    """Where the string ends, in the window."""

    @property
    def pieces(self) -> list[str]:
        """The strings between cuts, if it is cut at the seam too."""
        places = [0, *self.cuts, self.seam, len(self.string)]
        return [self.string[begin:end] for begin, end in itertools.pairwise(places)]


class _Cutter:
    """Finds cuts with a tokenizer as it is now, and remembers the ids of the strings that it has read for that."""

    def __init__(self, tokenizer: SegmentTokenizer) -> None:
        self._tokenizer = tokenizer
        self._separators = tokenizer.separators
        self._encoded: dict[str, list[int]] = {}

    def encode(self, seams: Iterable[_SeamWindow]) -> None:
        """Encode what is read at seams in one call: it is most of what finding cuts takes."""
        strings = dict.fromkeys([string for seam in seams for string in (seam.string, *seam.pieces)])
        self._encoded |= self._tokenizer.encode_strings(list(strings))

    def seam(self, string: str, cuts: Sequence[int], more: str) -> _SeamWindow:
        """Return what is read to find out where to cut `string + more`, given where `string` is cut."""
        begin = _window_begin(string, cuts, self._separators) if self._separators else 0
        inside = [cut - begin for cut in cuts if cut > begin]
        return _SeamWindow(begin, string[begin:] + more, inside, len(string) - begin)

    def continued(self, string: str, cuts: Sequence[int], more: str) -> tuple[int, ...]:
        """Return where to cut `string + more`, given where `string` is cut."""
        begin, window, inside, seam = self.seam(string, cuts, more)
        kept = self._tokenizer.exact_cuts(window, [*inside, seam], self._encoded)
        if seam not in kept:
            last = kept[-1] if kept else 0
            kept = self._cut_before(window, kept, window[last:seam])
        return (*(cut for cut in cuts if cut <= begin), *(cut + begin for cut in kept))

    def _cut_before(self, window: str, kept: list[int], piece: str) -> list[int]:
        """Return the cuts `kept`, and one at a word in the piece after them; it ends at a seam that a token crosses."""
        last = kept[-1] if kept else 0
        for word in self._tokenizer.words(piece)[: -_NUM_TRIES - 1 : -1]:
            if word >= _MIN_CHARS:
                more = self._tokenizer.exact_cuts(window, [*kept, last + word], self._encoded)
                # The piece alone must be one that may be cut there too.
                if last + word in more and self._tokenizer.exact_cuts(piece, [word], self._encoded):
                    return more
        if len(piece) > _WINDOW_CHARS and self._tokenizer not in _warned:
            _warned.add(self._tokenizer)
            logger.warning(
                "this tokenizer gives %r and what follows it other tokens apart than joined, wherever they are cut: "
                'they are run as one piece, and computed anew with each continuation (seams="keep" keeps the pieces)',
                piece[-20:],
            )
        return kept


def _window_begin(string: str, cuts: Sequence[int], separators: str) -> int:
    """Return an offset before which no token changes, whatever follows the string: a cut, or a word.

    What follows a separator between two words does not change the tokens before it, nor do these change those after it.
    """
    end = len(string) - _WINDOW_CHARS
    between_words = re.compile(rf"(?<=\w)[{separators}](?=\w)")
    places = [match.start() for match in between_words.finditer(string, max(0, end - _LONG_CHARS), max(0, end))]
    if not places:
        return 0
    cut = next((cut for cut in reversed(cuts) if cut <= places[-1]), 0)
    return cut if places[-1] - cut < _LONG_CHARS else places[-1]
