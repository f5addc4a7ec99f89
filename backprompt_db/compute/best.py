"""The best completions of prompts, found without computing all tokens of all completions.

What was learned is stored beside each prompt, as the log-probabilities of tokens that may follow it, and as scores of
the completions of which all is known. So the same question is answered again without a model, and another question
about the same prompt computes only what is new.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from backprompt_db.compute import answers, plan
from backprompt_db.compute.choice import Choice
from backprompt_db.compute.healing import Ending, merged_donors
from backprompt_db.compute.plan import MAX_PACK_TOKENS, Wanted
from backprompt_db.compute.prefill import Prefill
from backprompt_db.compute.token_tree import Continuations, TokenTree, Values, root_node
from backprompt_db.errors import PromptError, StoreError
from backprompt_db.prompt.ids import SegmentId
from backprompt_db.prompt.numbers import plain_int
from backprompt_db.prompt.representation import Array, Part
from backprompt_db.prompt.segments import Segment, ancestry

if TYPE_CHECKING:
    from backprompt_db.compute.call import Addresses, Call
    from backprompt_db.compute.encodings import Encodings
    from backprompt_db.compute.engine import Engine
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.compute.keeping import Keep, Keeper

_NODE = b"backprompt-db/continuation/1\0"

_SCORES, _LOGITS, _KV, _CONTINUATIONS = (
    frozenset({part}) for part in (Part.SCORES, Part.LOGITS, Part.KV, Part.CONTINUATIONS)
)

_Completions = tuple[tuple[int, tuple[int, ...]], ...]
"""The number of the root and the token ids of each completion."""


@dataclass(frozen=True, slots=True)
class Found:
    """One of the best completions of a prompt."""

    number: int
    value: float
    logprob: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """What completions are ordered by, and how many of them are wanted."""

    num_wanted: int
    bias: Values
    """[num_prompts, num_completions]"""
    weight: Values | None
    """[num_completions], all above 0; None for one over the number of tokens."""

    @classmethod
    def of(cls, *, k: Any, bias: Any, normalize: Any, num_prompts: int, completions: Sequence[str]) -> Ranking:
        """Return what a caller asks for. Raises `PromptError` for arguments that cannot be used."""
        k = plain_int(k)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise PromptError(f"k={k!r} is not a number of completions", hint="Give an int of 1 or more.")
        weight = _weight(normalize, completions)
        hint = "Give a number for each completion, or a row of such numbers for each prompt."
        shape = num_prompts, len(completions)
        return cls(k, _numbers("bias", 0.0 if bias is None else bias, shape, hint=hint), weight)

    def weights(self, num_tokens: Sequence[int]) -> Values:
        """Return the weight of each completion of a prompt, by how many tokens they add."""
        return 1 / np.maximum(num_tokens, 1) if self.weight is None else self.weight


def _weight(normalize: Any, completions: Sequence[str]) -> Values | None:
    """Return the weight of each completion; None for one over the number of tokens, which follows from the prompt."""
    if normalize is None:
        return np.ones(len(completions))
    if isinstance(normalize, str) and normalize == "tokens":
        return None
    if isinstance(normalize, str) and normalize == "bytes":
        return 1 / np.array([max(1, len(each.encode())) for each in completions])
    hint = "Give None, 'tokens', 'bytes', or a weight above 0 for each completion."
    weight = _numbers("normalize", normalize, (len(completions),), hint=hint)
    if not (weight > 0).all():
        raise PromptError("normalize has weights that are not above 0", hint=hint)
    return weight


def _numbers(name: str, given: Any, shape: tuple[int, ...], *, hint: str) -> Values:
    try:
        numbers = np.broadcast_to(np.asarray(given, dtype=np.float64), shape)
    except (TypeError, ValueError) as error:
        raise PromptError(f"{name} does not fit {shape[-1]} completions", hint=hint) from error
    if not np.isfinite(numbers).all():
        raise PromptError(f"{name} has values that are not finite", hint=hint)
    return numbers


@dataclass(frozen=True, slots=True, eq=False)
class _TokenNode(Segment):
    """One token after a segment or another token: a segment without a string, of which nothing is stored."""

    token: int

    @classmethod
    def follow(cls, parent: Segment, token: int) -> _TokenNode:
        number = hashlib.sha256(_NODE + parent.id + token.to_bytes(8, "little")).digest()
        return cls(SegmentId(number), "", (parent,), None, parent.namespace, token)


@dataclass(eq=False)
class _Search:
    """The search for the best completions of one prompt, with what has been computed for it."""

    endings: Sequence[Ending]
    roots: list[Segment]
    """The segments that completions directly follow: one, but where tokens cross the seam for some of them."""
    lengths: list[list[int]]
    """How many tokens each segment of each completion has."""
    num_tokens: list[int]
    """How many tokens each completion adds to those of the prompt."""
    choice: Choice
    continuations: list[Continuations] = field(default_factory=list)
    """What is stored of the tokens after each root."""
    held: dict[int, Segment] = field(default_factory=dict)
    """The nodes that were computed, or are now, as segments."""
    is_undefined: bool = False
    """Whether the model gave no number for some token: then the search cannot end, and all is scored."""

    @property
    def tree(self) -> TokenTree:
        return self.choice.tree

    def segment(self, number: int) -> Segment:
        """Return a root, or a node as a segment of one token."""
        if number < 0:
            return self.roots[root_node(number)]
        if number not in self.held:
            parent, token = self.tree.nodes[number]
            self.held[number] = _TokenNode.follow(self.segment(parent), token)
        return self.held[number]

    def followers(self, number: int) -> list[int]:
        """Return the tokens that follow a root or a node in any completion."""
        return [self.tree.token(child) for child in self.tree.children(number)]

    def learn(self, number: int, logprobs: Mapping[int, float]) -> None:
        """Take the log-probabilities of tokens after a root or a node, among them those of all its followers."""
        known = {child: logprobs[self.tree.token(child)] for child in self.tree.children(number)}
        self.is_undefined |= any(map(math.isnan, known.values()))
        self.choice.learn(known)

    def unknown_roots(self) -> list[int]:
        """Return the numbers of the roots after which the log-probability of some first token is not known."""
        numbers = [root_node(root) for root in range(len(self.roots))]
        return [each for each in numbers if np.isnan(self.choice.logprobs[self.tree.children(each)]).any()]

    def found(self) -> list[Found]:
        """Return the best completions, once all is known of them."""
        choice = self.choice
        return [Found(each, choice.value(each), choice.logprob(each), self.num_tokens[each]) for each in choice.best]

    def scores(self) -> Iterator[tuple[Segment, npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        """Yield the segments of completions of which all is known, with their tokens and log-probabilities [T].

        Those of one token cost nothing beyond the prompt, beside which they are stored.
        """
        for completion in self.choice.known:
            if self.tree.lengths[completion] == 1:
                continue
            path = self.tree.paths[completion, : self.tree.lengths[completion]]
            ids = np.array([self.tree.token(node) for node in path], dtype=np.int32)
            logprobs = self.choice.logprobs[path].astype(np.float32)
            ends = itertools.accumulate(self.lengths[completion], initial=0)
            for segment, (begin, end) in zip(self.endings[completion].segments, itertools.pairwise(ends), strict=True):
                yield segment, ids[begin:end], logprobs[begin:end]


@dataclass(frozen=True, slots=True)
class Chooser:
    """Finds the best completions of prompts on one model."""

    engine: Engine
    source: ModelSource
    keeper: Keeper
    encodings: Encodings
    keep: Keep

    def choose(self, prompts: Sequence[Sequence[Ending]], ranking: Ranking) -> list[list[Found]]:
        """Return the best completions of each prompt, the best first.

        `prompts` has what each completion is after each prompt. Raises `PromptError` where `score` does.
        """
        addresses = self.engine.addresses()
        searches = self._searches(prompts, ranking, addresses)
        self._recall(list(searches.values()), addresses)
        self._read_scores([search for search in searches.values() if search.choice.open], addresses)
        unanswered = [search for search in searches.values() if search.choice.open]
        answered = [root for search in searches.values() if not search.choice.open for root in search.roots]
        self.engine.count_found(ancestry(answered), addresses)
        if unanswered and self.engine.prove(addresses).takes_packs:
            for group in self._groups(unanswered):
                _Passes.of(self, group, addresses).compute()
        return [
            searches[number].found()
            if number in searches and not searches[number].choice.open
            else self._scored(endings, number, ranking)
            for number, endings in enumerate(prompts)
        ]

    def _searches(
        self, prompts: Sequence[Sequence[Ending]], ranking: Ranking, addresses: Addresses
    ) -> dict[int, _Search]:
        """Return the searches of prompts whose completions each follow one segment; none where each is run alone."""
        if self.engine.is_deterministic:
            return {}
        numbers = [number for number, endings in enumerate(prompts) if all(map(_is_chain, endings))]
        endings = [ending for number in numbers for ending in prompts[number]]
        ids = self.encodings.encode(dict.fromkeys([each for ending in endings for each in ending.segments]))
        without = dict.fromkeys([segment for ending in endings for segment in ending.without], _SCORES)
        found: answers.Parts = {}
        if without:
            keep = self.keeper.of_endings(endings, self.keep, addresses)
            donors = merged_donors(endings)
            found = self.engine.represent(without, keep=keep, addresses=addresses, donors=donors).found
        tree_of = cache(TokenTree)  # prompts whose completions have the same tokens share their tree
        return {
            number: _search(prompts[number], ids, found=found, ranking=ranking, number=number, tree_of=tree_of)
            for number in numbers
        }

    def _recall(self, searches: Sequence[_Search], addresses: Addresses) -> None:
        """Learn what is stored of the tokens that follow prompts."""
        wanted = dict.fromkeys([root for search in searches for root in search.roots], _CONTINUATIONS)
        found = self.engine.look(wanted, addresses).found
        known = {root: Continuations(found.get((root, Part.CONTINUATIONS))) for root in wanted}
        for search in searches:
            for number, root in enumerate(search.roots):
                search.continuations.append(known[root])
                search.choice.learn(known[root].known(search.tree, root=number))

    def _read_scores(self, searches: Sequence[_Search], addresses: Addresses) -> None:
        """Learn from completions that were scored before."""
        stored = {
            segment: _SCORES
            for search in searches
            if any(self._is_scored(root, addresses) for root in search.roots)
            for ending in search.endings
            for segment in ending.segments
            if self._is_scored(segment, addresses)
        }
        found = self.engine.look(stored, addresses).found
        for search in searches:
            for path, ending in zip(search.tree.paths.tolist(), search.endings, strict=True):
                rows = [found.get((segment, Part.SCORES)) for segment in ending.segments]
                logprobs = [each for row in rows if row for each in row["token_logprobs"].numpy().tolist()]
                if None not in rows:
                    search.choice.learn(dict(zip(path, logprobs, strict=False)))

    def _is_scored(self, segment: Segment, addresses: Addresses) -> bool:
        return self.engine.is_stored(segment, ids=addresses.ids, parts=_SCORES)

    def _groups(self, searches: Sequence[_Search]) -> Iterator[list[_Search]]:
        """Divide searches into groups whose prompts together are not too long to be held in memory."""
        group, known, num_added = list[_Search](), set[Segment](), 0
        for search in searches:
            ids = self.source.tokenizer.encode(ancestry(search.roots))
            num_new = sum(len(each) for segment, each in ids.items() if segment not in known)
            if group and num_added + num_new > MAX_PACK_TOKENS:
                yield group
                group, known, num_added = [], set(), 0
            elif group:  # what the first one has is there in any case
                num_added += num_new
            group.append(search)
            known |= ids.keys()
        if group:
            yield group

    def check_lengths(self, searches: Sequence[_Search]) -> None:
        """Raise `ContextLengthExceeded` for a completion that is too long, even if the search would not get there."""
        limit = self.source.runner.max_positions
        for search in searches:
            ids = self.source.tokenizer.encode(ancestry(search.roots))
            num_tokens = {segment: len(each) for segment, each in ids.items()}
            starts = plan.positions(ids, num_tokens)
            for ending, length in zip(search.endings, search.tree.lengths.tolist(), strict=True):
                (root,) = ending.segments[0].parents
                plan.check_context_length({root: starts[root] + num_tokens[root]}, {root: length - 1}, limit)

    def _scored(self, endings: Sequence[Ending], number: int, ranking: Ranking) -> list[Found]:
        """Return the best completions of a prompt after scoring all of them."""
        scored = answers.scored(self.engine, self.keeper, endings, keep=self.keep)
        logprobs = np.array([each.logprob for each in scored])
        values = ranking.bias[number] + ranking.weights([each.num_tokens for each in scored]) * logprobs
        best = np.argsort(-values, kind="stable")[: ranking.num_wanted].tolist()
        return [Found(each, float(values[each]), *scored[each]) for each in best]


@dataclass(frozen=True, slots=True)
class _Passes:
    """The passes over the tokens of some prompts' completions, until the best ones are known."""

    engine: Engine
    source: ModelSource
    searches: Sequence[_Search]
    addresses: Addresses
    keep: Wanted
    """Parts to store of segments of the prompts."""
    call: Call
    """What was found or computed of the prompts, and of the tokens after them."""

    @classmethod
    def of(cls, chooser: Chooser, searches: Sequence[_Search], addresses: Addresses) -> _Passes:
        """Compute what is missing of some prompts."""
        endings = [ending for search in searches for ending in search.endings]
        keep = chooser.keeper.of_endings(endings, chooser.keep, addresses)
        roots = [root for search in searches for root in search.roots]
        lacking = [search.segment(root) for search in searches for root in search.unknown_roots()]
        chooser.check_lengths(searches)
        call = chooser.engine.represent(
            dict.fromkeys(lacking, _LOGITS),
            keep=keep,
            welcome=dict.fromkeys(ancestry(roots), _KV),
            addresses=addresses,
            donors=merged_donors(endings),
        )
        return cls(chooser.engine, chooser.source, searches, addresses, keep, call)

    def compute(self) -> None:
        """Compute tokens until the best completions are known, and store what was learned."""
        self._read_logits()
        began = self.engine.seconds, self.engine.num_computed_tokens
        while searches := [search for search in self.searches if search.choice.open and not search.is_undefined]:
            self._look_further(searches)
        seconds, num_tokens = self.engine.seconds - began[0], self.engine.num_computed_tokens - began[1]
        self._store(seconds_per_token=seconds / max(1, num_tokens))

    def _read_logits(self) -> None:
        """Learn the log-probabilities of first tokens, which are in the logits after the prompts."""
        from backprompt_db.compute.inference.head import first_logprobs

        for search in self.searches:
            for root in search.unknown_roots():
                logits = self.call.found[search.segment(root), Part.LOGITS]["logits"]
                followers = search.followers(root)
                logprobs = first_logprobs(logits.torch(), np.array(followers))
                search.learn(root, dict(zip(followers, logprobs.tolist(), strict=True)))

    def _look_further(self, searches: Sequence[_Search]) -> None:
        """Compute the tokens that say most about searches that have not ended."""
        budget = self.source.runner.costs.tokens_per_pass / len(searches)
        asked = [(search, node) for search in searches for node in search.choice.next_nodes(search.held, budget=budget)]
        followers: dict[Segment, dict[int, None]] = {}
        for search, node in asked:  # where tokens cross the seam, other tokens may follow in another prompt's tree
            followers.setdefault(search.segment(node), {}).update(dict.fromkeys(search.followers(node)))
        tokens = {segment: list(each) for segment, each in followers.items()}
        scored = self._score_followers(tokens)
        logprobs = {segment: dict(zip(each, scored[segment].tolist(), strict=True)) for segment, each in tokens.items()}
        for search, node in asked:
            search.learn(node, logprobs[search.segment(node)])

    def _score_followers(
        self, followers: Mapping[Segment, Sequence[int]], *, are_held: bool = False
    ) -> Mapping[Segment, npt.NDArray[np.float32]]:
        """Return the log-probabilities of the followers of each node; nodes come after those before them."""
        segments = ancestry(followers)
        written = [segment for segment in segments if not isinstance(segment, _TokenNode)]
        input_ids: dict[Segment, Sequence[int]] = dict(self.source.tokenizer.encode(written))
        input_ids |= {segment: [segment.token] for segment in segments if isinstance(segment, _TokenNode)}
        prefill = self._prefill(followers, {segment: input_ids[segment] for segment in segments})
        logprobs = self.engine.score_followers(self.call, prefill)
        if logprobs is None and are_held:
            raise StoreError("keys and values of a prompt are damaged", hint="Find them with `backprompt-db verify`.")
        if logprobs is None:  # evicted meanwhile, or not stored at all: held here from now on
            wanted = dict.fromkeys(written, _KV)
            held = self.engine.represent(wanted, keep=self.keep, addresses=self.addresses)
            self.call.found.update(held.found)
            return self._score_followers(followers, are_held=True)
        return logprobs

    def _prefill(
        self, followers: Mapping[Segment, Sequence[int]], input_ids: Mapping[Segment, Sequence[int]]
    ) -> Prefill:
        runner = self.source.runner
        num_tokens = {segment: len(ids) for segment, ids in input_ids.items()}
        starts = plan.positions(input_ids, num_tokens)
        plan.check_context_length(starts, num_tokens, runner.max_positions)
        plan.check_vocabulary([*input_ids.values(), *followers.values()], runner.vocab_size)
        packs = plan.packs(list(followers), num_tokens, costs=runner.costs, max_columns=runner.max_columns)
        packs = [replace(pack, is_scored=False) for pack in packs]
        runner.require_runnable(packs, num_tokens, starts)
        wanted = {segment: _KV for segment, part in self.call.found if part is Part.KV}
        missing = dict.fromkeys(followers, _KV)
        keep = dict.fromkeys(followers, frozenset[Part]())
        return Prefill(
            packs,
            input_ids,
            starts,
            wanted | missing,
            missing,
            keep,
            is_deterministic=False,
            runner=runner,
            followers=followers,
        )

    def _store(self, *, seconds_per_token: float) -> None:
        ids = self.addresses.ids
        for search in self.searches:
            for number, (root, known) in enumerate(zip(search.roots, search.continuations, strict=True)):
                if known.learn(search.tree, search.choice.logprobs, root=number):
                    self.engine.store_continuations(root, known.arrays(), ids=ids, num_tokens=self._num_tokens(root))
        scores = itertools.chain.from_iterable(search.scores() for search in self.searches)
        for segment, tokens, logprobs in scores:
            if not self.engine.is_stored(segment, ids=ids, parts=_SCORES):
                arrays = {"input_ids": Array.from_numpy(tokens), "token_logprobs": Array.from_numpy(logprobs)}
                seconds = seconds_per_token * len(tokens)
                self.engine.store(segment, {Part.SCORES: arrays}, ids=ids, num_tokens=len(tokens), seconds=seconds)

    def _num_tokens(self, root: Segment) -> int:
        return len(self.source.tokenizer.encode([root])[root])


def _search(
    endings: Sequence[Ending],
    ids: Mapping[Segment, Sequence[int]],
    *,
    found: answers.Parts,
    ranking: Ranking,
    number: int,
    tree_of: Callable[[_Completions], TokenTree],
) -> _Search:
    """Return the search of the prompt with this number; `found` has the scores of what its endings are `without`."""
    parents = [ending.segments[0].parents[0] for ending in endings]
    roots = list(dict.fromkeys(parents))
    tokens = [tuple(token for segment in ending.segments for token in ids[segment]) for ending in endings]
    completions = tuple((roots.index(parent), each) for parent, each in zip(parents, tokens, strict=True))
    num_tokens = [
        len(each) - answers.num_tokens(found, ending.without) for each, ending in zip(tokens, endings, strict=True)
    ]
    choice = Choice(
        tree_of(completions),
        ranking.num_wanted,
        bias=ranking.bias[number],
        weight=ranking.weights(num_tokens),
        offset=np.array([-answers.logprob(found, ending.without) for ending in endings]),
    )
    lengths = [[len(ids[segment]) for segment in ending.segments] for ending in endings]
    return _Search(endings, roots, lengths, num_tokens, choice)


def _is_chain(ending: Ending) -> bool:
    """Whether a completion directly follows one segment, and its own segments each other, without gaps."""
    segments = ending.segments
    pairs = itertools.pairwise((*segments[0].parents[:1], *segments))
    return all(after.parents == (before,) for before, after in pairs) and all(
        len(each.parents) == 1 and each.start is None for each in segments
    )
