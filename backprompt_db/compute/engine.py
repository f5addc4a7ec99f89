"""The core loop: fetch what is stored, plan what is missing, compute it in packs, persist it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tqdm import tqdm

from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.compute import plan
from backprompt_db.compute.beginnings import Beginning, first_scores, first_tokens
from backprompt_db.compute.call import Addresses, Call
from backprompt_db.compute.claims import PackClaims
from backprompt_db.compute.pace import Pace
from backprompt_db.compute.plan import Need, Wanted
from backprompt_db.compute.prefill import Prefill
from backprompt_db.compute.proving import Prover
from backprompt_db.database.writer import NewPart
from backprompt_db.prompt.ids import ModelIds, SegmentId, WeightsId
from backprompt_db.prompt.model_counters import ModelCounters
from backprompt_db.prompt.representation import OWN_PARTS, Arrays, Part
from backprompt_db.prompt.segments import Seam, Segment, ancestry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from backprompt_db.compute.inference.forward import PassResult
    from backprompt_db.compute.inference.kv_cache import KVBuffer
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.compute.inference.runner import ModelRunner
    from backprompt_db.database.database import Database

logger = logging.getLogger(__name__)

_KV_AND_SCORES = frozenset({Part.KV, Part.SCORES})

_MAX_LOGGED_SEAMS = 10_000
"""How many seams are logged; they are remembered, so that none is logged twice."""


class Engine:
    """Gets parts of segments under one model: from the database if they are stored, else from the model."""

    def __init__(
        self,
        source: ModelSource,
        db: Database,
        *,
        deterministic: bool,
        progress: bool,
        unhealed: Container[SegmentId] = frozenset(),
    ) -> None:
        self.num_computed_tokens = self.num_cached_tokens = self.num_decoded_tokens = 0
        self.seconds = 0.0
        self._source = source
        self._db = db
        self._deterministic = deterministic
        self._progress = progress
        self._unhealed = unhealed
        self._prover = Prover(source, db.model_metadata, checks_again=deterministic, progress=progress)
        self._pace = Pace()
        self._logged_seams: set[Seam] = set()
        self._has_warned = False

    def addresses(self) -> Addresses:
        """Return what makes addresses under the model and the tokenizer as they are now."""
        is_loaded = self._source.is_loaded
        return Addresses(self._source.ids, is_certain=is_loaded)

    def represent(
        self,
        wanted: Wanted,
        *,
        keep: Wanted,
        welcome: Wanted | None = None,
        addresses: Addresses | None = None,
        donors: Mapping[Segment, Segment] | None = None,
    ) -> Call:
        """Return the call, with the wanted parts and the segments that were computed for them.

        `keep` has the parts to store of each segment that is computed; of one that it does not contain, all of its own.
        `welcome` has parts that are returned too of segments that are computed; nothing is computed for them alone.
        `donors` has, for segments that are the beginning of others, those others: what is stored of them is used.
        """
        began = time.monotonic()
        addresses = addresses or self.addresses()
        call = Call(self._db, self._source, addresses, wanted=wanted, keep=keep, welcome=welcome or {})
        self._answer(call, donors or {})
        call.seconds = time.monotonic() - began
        self._count(call)
        return call

    def _answer(self, call: Call, donors: Mapping[Segment, Segment]) -> None:
        """Compute what a call has not found: the core loop."""
        if donors and (missing := call.missing()):
            self._take_beginnings(call, missing, donors)
        with PackClaims(self._db, call.addresses) as claims:
            while missing := call.missing():
                prefill = self._prepare(call, missing, claims.available(missing))
                for pack in self._with_progress(prefill):
                    if not _claim(claims, call, prefill, pack):  # others compute it, or did: plan again later
                        continue
                    context = self._acquire_prefix(call, prefill, pack)
                    if context is None:  # evicted or damaged since it was looked up: plan again without it
                        break
                    result = prefill.compute(pack, context, call.found)
                    self._release_prefix(call, prefill, pack, context, num_whole=result.num_whole)
                    self._persist(call, prefill, pack, result)
                    claims.hand_over()
                    call.add(pack, result, prefill)
                    self.num_computed_tokens += prefill.num_tokens(pack)
                call.fetch_from_others(claims.deferred)

    def prove(self, addresses: Addresses | None = None) -> ModelRunner:
        """Return the loaded model after its self-check.

        Raises `UnsupportedModel` for one that cannot be cached, and `ModelMismatch` if it is not that of `addresses`.
        """
        return self._prover.runner(addresses or self.addresses())

    def find(self, wanted: Wanted, addresses: Addresses) -> Call:
        """Return the call with those of the wanted parts that are stored; nothing is computed."""
        call = self.look(wanted, addresses)
        self._count(call)
        return call

    def look(self, wanted: Wanted, addresses: Addresses) -> Call:
        """Do as `find`, without counting what was found as tokens that needed no computation."""
        return Call(self._db, self._source, addresses, wanted=wanted, keep={})

    def score_followers(self, call: Call, prefill: Prefill) -> dict[Segment, npt.NDArray[np.float32]] | None:
        """Compute passes of which nothing is stored, and return the log-probabilities of the followers asked for.

        Keys and values stay in `call.found`. None where those of a context are not there any more.
        """
        logprobs: dict[Segment, npt.NDArray[np.float32]] = {}
        for pack in prefill.packs:
            context = self._acquire_prefix(call, prefill, pack)
            if context is None:
                return None
            result = prefill.compute(pack, context, call.found)
            self._release_prefix(call, prefill, pack, context, num_whole=result.num_whole)
            call.add(pack, result, prefill)
            self._pace.add(result.seconds, result.num_tokens)
            self.num_computed_tokens += result.num_tokens
            self.seconds += result.seconds
            logprobs.update(result.followers)
        return logprobs

    def count_found(self, segments: Iterable[Segment], addresses: Addresses) -> None:
        """Count the tokens of segments that were asked about, and needed no computation."""
        self.num_cached_tokens += sum(self._db.num_tokens(addresses.address(each)) or 0 for each in segments)

    def count_decoded(self, num_tokens: int, *, seconds: float) -> None:
        """Count tokens that were generated."""
        self.num_decoded_tokens += num_tokens
        self.seconds += seconds

    @property
    def keeps(self) -> bool:
        """Whether computed parts are stored: a database that is opened read-only drops them."""
        return not self._db.readonly

    @property
    def fidelity(self) -> str:
        """How closely the database keeps keys and values."""
        return self._db.fidelity.value

    @property
    def is_deterministic(self) -> bool:
        """Whether each segment is computed in a pass of its own."""
        return self._deterministic

    @property
    def counters(self) -> ModelCounters:
        """What was done since this was made."""
        return ModelCounters(
            num_model_calls=self._source.runner.num_calls if self._source.is_loaded else 0,
            num_computed_tokens=self.num_computed_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_decoded_tokens=self.num_decoded_tokens,
            seconds=self.seconds,
            saved_seconds=self.seconds_for(self.num_cached_tokens, weights_id=self._source.ids.weights_id),
        )

    def seconds_for(self, num_tokens: int, *, weights_id: WeightsId) -> float | None:
        """Return about how long computing so many tokens takes once the model is warm; None if nothing tells."""
        return self._pace.seconds_for(num_tokens, recorded=self._db.catalogs.timings(weights_id))

    def is_stored(self, segment: Segment, *, ids: ModelIds, parts: Iterable[Part] = OWN_PARTS) -> bool:
        """Whether parts of a segment are stored or queued under the model that has these ids."""
        addresses = Addresses(ids)
        return all(self._db.has(addresses.key(segment, part)) for part in parts)

    def discard(self, needs: Iterable[Need], *, ids: ModelIds) -> None:
        """Remove stored parts that do not have the model's shape."""
        for segment, part in needs:
            self._db.discard(Addresses(ids).key(segment, part))

    def store(
        self,
        segment: Segment,
        parts: Mapping[Part, Arrays],
        *,
        ids: ModelIds,
        num_tokens: int,
        seconds: float,
    ) -> None:
        """Queue parts of a segment that were computed outside a pack, in `seconds`."""
        addresses = Addresses(ids)
        origin = addresses.origin(segment, num_tokens, seconds, versions=self._source.runner.versions)
        self._db.put([NewPart(addresses.key(segment, part), arrays, origin) for part, arrays in parts.items()])

    def store_continuations(self, segment: Segment, arrays: Arrays, *, ids: ModelIds, num_tokens: int) -> None:
        """Queue what is known of the tokens after a segment; it takes the place of what was known before."""
        addresses = Addresses(ids)
        origin = addresses.origin(segment, num_tokens, 0.0, versions=self._source.runner.versions)
        self._db.put_later(NewPart(addresses.key(segment, Part.CONTINUATIONS), arrays, origin))

    def _take_beginnings(self, call: Call, missing: Wanted, donors: Mapping[Segment, Segment]) -> None:
        """Store the missing segments that stored ones begin with: only the logits after them must be computed.

        A segment that this call wants too is computed first, and gives its beginning then.
        """
        if self._deterministic or not self.keeps or self._db.fidelity is not Fidelity.EXACT:
            return
        for segment, donor in [(segment, donors[segment]) for segment in missing if segment in donors]:
            if donor in missing:
                own = Call(self._db, self._source, call.addresses, wanted={donor: frozenset(OWN_PARTS)}, keep={})
                self._answer(own, {})
                call.include(own)
                call.fetch_wanted(donor)
            found = Call(self._db, self._source, call.addresses, wanted={donor: _KV_AND_SCORES}, keep={}).found
            beginning = Beginning.of(segment, self._source.tokenizer) if len(found) == len(_KV_AND_SCORES) else None
            if beginning is not None and beginning.is_that_of(found[donor, Part.SCORES]):
                self._take_beginning(call, beginning, kv=found[donor, Part.KV], scores=found[donor, Part.SCORES])
                call.fetch_wanted(segment)

    def _take_beginning(self, call: Call, beginning: Beginning, *, kv: Arrays, scores: Arrays) -> None:
        """Store a beginning out of the keys and values, and the scores, of a segment that begins with it."""
        began = time.monotonic()
        prefill = beginning.prefill(self._source.tokenizer, self._prover.runner(call.addresses))
        (pack,) = prefill.packs
        # In a call of its own, with which the tokens before the last word go: nobody has asked for them.
        own = Call(self._db, self._source, call.addresses, wanted={}, keep={})
        own.found[beginning.rest, Part.KV] = first_tokens(kv, len(prefill.input_ids[beginning.rest]))
        context = self._acquire_prefix(own, prefill, pack)
        if context is None:
            return
        result = prefill.compute(pack, context, own.found)
        call.num_model_calls += result.num_tokens > 0
        self.num_computed_tokens += prefill.num_tokens(pack)
        parts = {
            Part.KV: first_tokens(kv, beginning.num_tokens),
            Part.SCORES: first_scores(scores, beginning.num_tokens),
            Part.LOGITS: result.parts[beginning.last, Part.LOGITS],
        }
        seconds = time.monotonic() - began
        self.store(beginning.segment, parts, ids=call.addresses.ids, num_tokens=beginning.num_tokens, seconds=seconds)
        before = call.contents(ancestry(beginning.segment.parents), prefill)
        context.contents[:] = [*before, (call.addresses.address(beginning.segment), beginning.num_tokens)]
        prefill.runner.release_prefix(self._db.memory, context)

    def _acquire_prefix(self, call: Call, prefill: Prefill, pack: plan.Pack) -> KVBuffer | None:
        """Return a buffer with the keys and values of a pack's context, and fetch the logits of its predictors.

        None if a part is no longer stored. `_release_prefix` gives the buffer back to the memory cache.
        """
        lost = call.fetch((segment, Part.LOGITS) for segment in pack.predictors)
        contents = call.contents(pack.context, prefill)
        # A segment without a string is a token of a search, of which nothing is ever stored.
        self._db.touch(address for each, (address, _) in zip(pack.context, contents, strict=True) if each.string)
        context = prefill.runner.acquire_prefix(self._db.memory, contents, room=prefill.num_tokens(pack))
        lost += self._load_prefix(call, prefill, pack, context)
        if not lost:
            return context
        prefill.runner.release_prefix(self._db.memory, context)
        call.lose(lost)
        return None

    def _load_prefix(self, call: Call, prefill: Prefill, pack: plan.Pack, context: KVBuffer) -> list[Need]:
        """Fill the buffer with the rest of the context: from earlier passes, or straight out of the store's file."""
        contents = call.contents(pack.context, prefill)
        for segment, content in list(zip(pack.context, contents, strict=True))[len(context.contents) :]:
            if not self._load(call, prefill, segment, context):
                return [(segment, Part.KV)]
            context.contents.append(content)
        return []

    def _load(self, call: Call, prefill: Prefill, segment: Segment, context: KVBuffer) -> bool:
        """Append a segment's keys and values to a context; False if there are none, or none that fit."""
        kv = call.found.get((segment, Part.KV))
        key = call.addresses.key(segment, Part.KV)
        if kv is None:
            span = context.span(len(prefill.input_ids[segment]))
            is_there = self._db.load(key, span, prefill.runner.kv_dtype)
            if is_there:
                context.extend(span)
            return is_there
        if not prefill.fits(segment, kv):
            self._db.discard(key)
            return False
        context.append(kv)
        return True

    def _release_prefix(
        self, call: Call, prefill: Prefill, pack: plan.Pack, context: KVBuffer, *, num_whole: int
    ) -> None:
        """Give a pass's buffer to the memory cache, for later passes; its first `num_whole` segments are complete.

        What is neither stored nor used by another pass is forgotten: it would be computed again, wherever it is.
        """
        chain = pack.segments[: plan.num_chained(pack, num_whole)]
        used = list(itertools.takewhile(lambda segment: Part.KV in prefill.produced(segment), chain))
        parents = {parent for segment in pack.segments for parent in segment.parents}
        context.follow(call.contents(used, prefill), num_followed=sum(segment in parents for segment in used))
        prefill.runner.release_prefix(self._db.memory, context)

    def _prepare(self, call: Call, missing: Wanted, available: Sequence[Segment]) -> Prefill:
        """Tokenise the missing segments, check that they can be run, and divide the available ones into packs.

        Loads the model if it is not loaded.
        """
        segments = ancestry(missing)
        input_ids = self._source.tokenizer.encode(segments)
        num_tokens = call.lengths = {segment: len(ids) for segment, ids in input_ids.items()}
        starts = plan.positions(segments, num_tokens)
        runner = self._prover.runner(call.addresses)
        kept = {segment: frozenset(call.keep.get(segment, OWN_PARTS)) for segment in missing}
        produced = {
            segment: missing[segment] | kept[segment] | call.taken.get(segment, frozenset()) for segment in missing
        }
        num_read = num_tokens if self._deterministic else plan.num_read(num_tokens, produced=produced)
        plan.check_context_length(starts, num_read, runner.max_positions)
        plan.check_vocabulary(input_ids.values(), runner.vocab_size)
        self._log_seams(missing)
        max_segments = 1 if self._deterministic or not runner.takes_packs else None
        packs = plan.packs(
            available, num_tokens, costs=runner.costs, max_segments=max_segments, max_columns=runner.max_columns
        )
        runner.require_runnable(packs, num_read, starts)
        return Prefill(packs, input_ids, starts, call.taken, missing, kept, self._deterministic, runner)

    def _persist(self, call: Call, prefill: Prefill, pack: plan.Pack, result: PassResult) -> None:
        """Queue the parts to keep. The seconds of a pass are divided among its segments by tokens.

        Logits that the caller wants are set aside where they are not kept: they may be asked for yet.
        """
        self._pace.add(result.seconds, result.num_tokens)
        seconds_per_token = result.seconds / prefill.num_tokens(pack)
        addresses, versions = call.addresses, prefill.runner.versions
        new = []
        for segment in pack.segments:
            num_tokens = len(prefill.input_ids[segment])
            origin = addresses.origin(segment, num_tokens, num_tokens * seconds_per_token, versions=versions)
            new += [
                NewPart(addresses.key(segment, part), result.parts[segment, part], origin)
                for part in prefill.keep[segment]
            ]
            if Part.LOGITS in call.taken.get(segment, ()) and Part.LOGITS not in call.keep.get(segment, OWN_PARTS):
                logits = NewPart(addresses.key(segment, Part.LOGITS), result.parts[segment, Part.LOGITS], origin)
                call.spare[segment] = partial(self._db.put_later, logits)
        self._db.put(new)

    def _with_progress(self, prefill: Prefill) -> Iterator[plan.Pack]:
        """Yield the packs and show a progress bar, which appears after a second, in a terminal."""
        hidden = None if self._progress else True
        total = sum(map(prefill.num_tokens, prefill.packs))
        with tqdm(total=total, unit="tok", desc="computing", delay=1, disable=hidden, leave=False) as bar:
            for pack in prefill.packs:
                yield pack
                bar.update(prefill.num_tokens(pack))

    def _count(self, call: Call) -> None:
        self.num_cached_tokens += call.num_cached_tokens
        self.seconds += call.seconds

    def _log_seams(self, missing: Collection[Segment]) -> None:
        """Log each seam at which a text that is run has other tokens than its joined string.

        The first one that nobody has asked for is a warning.
        """
        if not self._has_warned:
            seams = self._source.tokenizer.seams([segment for segment in missing if segment.id in self._unhealed])
            if seams:
                self._has_warned = True
                logger.warning(
                    "beside parallel branches and explicit starts, each piece has the tokens that it has alone: "
                    '%s (seams="keep" says that this is meant; text.seams() lists all)',
                    seams[0],
                )
        for seam in self._source.tokenizer.seams(missing):
            if seam not in self._logged_seams and len(self._logged_seams) < _MAX_LOGGED_SEAMS:
                self._logged_seams.add(seam)
                logger.info("a seam changes tokens: %s (text.seams() lists all)", seam)


def _claim(claims: PackClaims, call: Call, prefill: Prefill, pack: plan.Pack) -> bool:
    """Whether to compute a pack now: no other call computes it, and no part of it was stored since it was planned."""
    if not claims.claim(pack):
        return False
    # Looked up after the claim: another call may have claimed and stored a segment just before.
    are_stored = [call.is_stored_by_now(segment, prefill) for segment in pack.segments]
    if any(are_stored):
        claims.defer(pack)
    return not any(are_stored)
