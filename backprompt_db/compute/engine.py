"""The core loop: fetch what is there, plan what is missing, compute it in packs, persist it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from backprompt_db.catalog.records import TokenizerRecord
from backprompt_db.codec.fidelity import Fidelity, restore
from backprompt_db.compute import plan
from backprompt_db.compute.addresses import Addresses
from backprompt_db.compute.claims import PackClaims
from backprompt_db.compute.prefill import Need, Prefill, Wanted
from backprompt_db.database.vocabulary import packed
from backprompt_db.database.writer import NewPart
from backprompt_db.errors import ModelMismatch
from backprompt_db.prompt.ids import TokenizerId, WeightsId
from backprompt_db.prompt.representation import Arrays, Part
from backprompt_db.prompt.segments import Seam, Segment, ancestry
from backprompt_db.store.contract import Key

if TYPE_CHECKING:
    from backprompt_db.compute.inference.forward import Computed
    from backprompt_db.compute.inference.kv_cache import KVBuffer
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.compute.inference.runner import ModelRunner
    from backprompt_db.database.database import Database

logger = logging.getLogger(__name__)

_MAX_LOGGED_SEAMS = 10_000
"""Seams that are logged and, so as not to be logged again, remembered."""


class Engine:
    """Gets parts of segments under one model: from the database where they are, from the model where they are not."""

    def __init__(self, source: ModelSource, db: Database, *, deterministic: bool, progress: bool) -> None:
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self._source = source
        self._db = db
        self._deterministic = deterministic
        self._progress = progress
        self._logged_seams: set[Seam] = set()

    def names(self) -> Addresses:
        """Return what everything is called under the model and the tokenizer as they are now."""
        is_loaded = self._source.is_loaded
        return Addresses(*self._source.ids, is_certain=is_loaded)

    def represent(
        self, wanted: Wanted, *, keep: Wanted, names: Addresses | None = None
    ) -> tuple[dict[Need, Arrays], set[Segment]]:
        """Return the wanted parts and which segments were computed for them: the core loop.

        `keep` names the parts to store of a computed segment, all three where it says nothing.
        """
        names = names or self.names()
        found = self._fetch(names, [(segment, part) for segment, parts in wanted.items() for part in parts])
        computed: set[Segment] = set()
        lost: set[Need] = set()

        def is_stored(segment: Segment, part: Part) -> bool:
            was_fetched = part in wanted.get(segment, ()) or (segment, part) in lost
            return (segment, part) in found or (not was_fetched and self._db.has(names.key(segment, part)))

        with PackClaims(self._db, names) as claims:
            while missing := plan.missing_parts(wanted, is_stored=is_stored):
                job = self._prepare(names, missing, claims.available(missing), wanted=wanted, keep=keep)
                for pack in self._with_progress(job):
                    if not self._take(claims, names, job, pack, lost):  # others compute it, or have: plan again after
                        continue
                    context, unusable = self._bring(names, job, pack, found)
                    if unusable:  # evicted or damaged since it was looked up: plan again without it
                        lost.update(unusable)
                        break
                    result = job.compute(pack, context, found)
                    self._leave(names, job, pack, context, num_whole=result.num_whole)
                    self._persist(names, job, pack, result)
                    claims.hand_over()
                    job.retain(pack, result, found)
                    computed.update(pack.segments)
                    self.num_computed_tokens += job.num_tokens(pack)
                self._catch_up(names, claims.left, wanted, found, lost)
        self._count(found, wanted, computed)
        return found, computed

    def prove(self) -> ModelRunner:
        """Return the loaded model after its self-check. Raises `UnsupportedModel` for one that cannot be cached."""
        return self._proven_runner(self.names())

    @property
    def keeps(self) -> bool:
        """Whether what is computed is stored: a database opened read-only drops it."""
        return not self._db.readonly

    @property
    def fidelity(self) -> str:
        """How closely the database keeps keys and values."""
        return self._db.fidelity.value

    @property
    def is_deterministic(self) -> bool:
        """Whether each segment is computed in a pass of its own."""
        return self._deterministic

    def is_stored(
        self, segment: Segment, *, ids: tuple[WeightsId, TokenizerId], parts: Iterable[Part] = tuple(Part)
    ) -> bool:
        """Whether parts of a segment, all unless said, are stored or queued, under the model that has these ids."""
        names = Addresses(*ids)
        return all(self._db.has(names.key(segment, part)) for part in parts)

    def discard(self, needs: Iterable[Need], *, ids: tuple[WeightsId, TokenizerId]) -> None:
        """Remove stored parts that turned out not to be of this model's shape."""
        for segment, part in needs:
            self._db.discard(Addresses(*ids).key(segment, part))

    def store(
        self,
        segment: Segment,
        parts: Mapping[Part, Arrays],
        *,
        ids: tuple[WeightsId, TokenizerId],
        num_tokens: int,
        seconds: float,
    ) -> None:
        """Queue parts of a segment that something else than a pack computed, in `seconds`."""
        names = Addresses(*ids)
        origin = names.origin(segment, num_tokens, seconds, versions=self._source.runner.versions)
        self._db.put([NewPart(names.key(segment, part), arrays, origin) for part, arrays in parts.items()])

    def _fetch(self, names: Addresses, needs: Iterable[Need]) -> dict[Need, Arrays]:
        """Return those of the needed parts that the database has."""
        parts: dict[Segment, list[Part]] = {}
        for segment, part in needs:
            parts.setdefault(segment, []).append(part)
        addresses = {segment: names.address(segment) for segment in parts}
        fetched = self._db.fetch({addresses[segment]: wanted for segment, wanted in parts.items()})
        keys = {(segment, part): Key(addresses[segment], part) for segment, wanted in parts.items() for part in wanted}
        found = {need: fetched[key] for need, key in keys.items() if key in fetched}
        for need, key in keys.items():
            if key.part is Part.KV and need in found:
                found[need] = self._restored(found[need])
                if self._source.is_loaded and not self._source.runner.fits(found[need]):
                    self._db.discard(key)
                    del found[need]
        return found

    def _catch_up(
        self, names: Addresses, left: Iterable[Segment], wanted: Wanted, found: dict[Need, Arrays], lost: set[Need]
    ) -> None:
        """Fetch what others have stored of the segments that were left to them."""
        needs = [(segment, part) for segment in left for part in wanted.get(segment, ())]
        absent = [need for need in needs if need not in found and need not in lost]
        stored = [need for need in absent if self._db.has(names.key(*need))]
        found.update(self._fetch(names, stored))
        lost.update(need for need in stored if need not in found)

    def _restored(self, kv: Arrays) -> Arrays:
        """Give keys and values of a lossy database the model's dtype."""
        return kv if self._db.fidelity is Fidelity.EXACT else restore(kv, self._source.runner.kv_dtype)

    def _take(self, claims: PackClaims, names: Addresses, job: Prefill, pack: plan.Pack, lost: set[Need]) -> bool:
        """Whether to compute a pack now: no other call is at it, nor has any of it been stored since it was planned."""
        if not claims.take(pack):
            return False
        # Looked up only now: who had claimed a segment before may have stored it meanwhile.
        are_stored = [self._is_stored_by_now(names, job, segment, lost) for segment in pack.segments]
        if any(are_stored):
            claims.leave(pack)
        return not any(are_stored)

    def _is_stored_by_now(self, names: Addresses, job: Prefill, segment: Segment, lost: set[Need]) -> bool:
        """Whether all is stored that was missing of a segment; what is stored will not be kept once more."""
        parts = job.missing[segment] | job.keep[segment]
        stored = frozenset(part for part in parts if self._db.has(names.key(segment, part)))
        job.keep[segment] -= stored
        return job.missing[segment] <= {part for part in stored if (segment, part) not in lost}

    def _bring(
        self, names: Addresses, job: Prefill, pack: plan.Pack, found: dict[Need, Arrays]
    ) -> tuple[KVBuffer, list[Need]]:
        """Bring a pack's context into one buffer, its predictors' logits into `found`; also return what is not there.

        What the buffer does not begin with already is copied once: from an earlier pass, or out of the store's file.
        """
        logits = [(segment, Part.LOGITS) for segment in pack.predictors]
        found.update(self._fetch(names, [need for need in logits if need not in found]))
        contents = [names.content(segment, len(job.input_ids[segment])) for segment in pack.context]
        self._db.touch(address for address, _ in contents)
        context = job.runner.prefix(self._db.memory, contents, room=job.num_tokens(pack))
        for segment, content in list(zip(pack.context, contents, strict=True))[len(context.contents) :]:
            if not self._load(names, job, segment, context, found):
                job.runner.leave(self._db.memory, context)
                return context, [(segment, Part.KV)]
            context.contents.append(content)
        return context, [need for need in logits if need not in found]

    def _load(
        self, names: Addresses, job: Prefill, segment: Segment, context: KVBuffer, found: dict[Need, Arrays]
    ) -> bool:
        """Append a segment's keys and values to a context; False where there are none that fit."""
        kv = found.get((segment, Part.KV))
        key = names.key(segment, Part.KV)
        if kv is None:
            span = context.span(len(job.input_ids[segment]))
            is_there = self._db.load(key, span, job.runner.kv_dtype)
            if is_there:
                context.extend(span)
            return is_there
        if not job.fits(segment, kv):
            del found[segment, Part.KV]
            self._db.discard(key)
            return False
        context.append(kv)
        return True

    def _leave(self, names: Addresses, job: Prefill, pack: plan.Pack, context: KVBuffer, *, num_whole: int) -> None:
        """Leave a pass's buffer in memory, for passes that go on after it; its first segments are whole."""
        chain = pack.segments[: plan.num_chained(pack, num_whole)]
        context.contents += [names.content(segment, len(job.input_ids[segment])) for segment in chain]
        job.runner.leave(self._db.memory, context)

    def _prepare(
        self, names: Addresses, missing: Wanted, available: Sequence[Segment], *, wanted: Wanted, keep: Wanted
    ) -> Prefill:
        """Tokenise what is missing, check that it can be run, and divide what is available of it into packs.

        Loads the model if need be.
        """
        segments = ancestry(missing)
        input_ids = self._source.tokenizer.encode(segments)
        num_tokens = {segment: len(ids) for segment, ids in input_ids.items()}
        starts = plan.positions(segments, num_tokens)
        runner = self._proven_runner(names)
        kept = {segment: frozenset(keep.get(segment, Part)) for segment in missing}
        produced = {segment: missing[segment] | kept[segment] | wanted.get(segment, frozenset()) for segment in missing}
        num_read = num_tokens if self._deterministic else plan.num_read(num_tokens, produced=produced)
        plan.check_context_length(starts, num_read, runner.max_positions)
        plan.check_vocabulary(input_ids.values(), runner.vocab_size)
        self._log_seams(missing)
        max_segments = 1 if self._deterministic or not runner.takes_packs else None
        packs = plan.packs(
            available, num_tokens, costs=runner.costs, max_segments=max_segments, max_columns=runner.max_columns
        )
        runner.require_runnable(packs, num_read, starts)
        return Prefill(packs, input_ids, starts, wanted, missing, kept, self._deterministic, runner)

    def _proven_runner(self, names: Addresses) -> ModelRunner:
        """Return the loaded model after its self-check. Raises `UnsupportedModel`, or `ModelMismatch` if it changed."""
        runner = self._source.runner
        if not names.is_certain and self._source.ids != names.ids:
            raise ModelMismatch(
                f"{self._source.name} is not the model that was recorded for its files",
                hint="Make the LanguageModel again; nothing was stored under the wrong name.",
            )
        if not runner.is_proven(names.weights_id):
            known = self._db.model_metadata.recall(lambda catalog: catalog.model(names.weights_id))
            record = runner.prove(names.weights_id, known)
            if record is not None:
                self._db.model_metadata.save(record)
            self._db.model_metadata.describe(names.tokenizer_id, self._describe_tokenizer)
        runner.require_supported()
        return runner

    def _describe_tokenizer(self) -> TokenizerRecord:
        tokenizer = self._source.tokenizer
        kind = type(tokenizer.tokenizer).__name__
        definition = packed(tokenizer.definition()) if tokenizer.is_fast else b""
        return TokenizerRecord(tokenizer.id, self._source.name, kind, len(tokenizer.tokenizer), definition)

    def _persist(self, names: Addresses, job: Prefill, pack: plan.Pack, result: Computed) -> None:
        """Queue the parts to keep. Their seconds are shares of the pass, by tokens."""
        seconds_per_token = result.seconds / job.num_tokens(pack)
        new = []
        for segment in pack.segments:
            num_tokens = len(job.input_ids[segment])
            origin = names.origin(segment, num_tokens, num_tokens * seconds_per_token, versions=job.runner.versions)
            new += [
                NewPart(names.key(segment, part), result.parts[segment, part], origin) for part in job.keep[segment]
            ]
        self._db.put(new)

    def _with_progress(self, job: Prefill) -> Iterator[plan.Pack]:
        """Yield the packs behind a progress bar, which appears after a second, in a terminal."""
        hidden = None if self._progress else True
        with tqdm(
            total=sum(map(job.num_tokens, job.packs)),
            unit="tok",
            desc="computing",
            delay=1,
            disable=hidden,
            leave=False,
        ) as bar:
            for pack in job.packs:
                yield pack
                bar.update(job.num_tokens(pack))

    def _count(self, found: Mapping[Need, Arrays], wanted: Wanted, computed: set[Segment]) -> None:
        for segment in wanted:
            if (segment, Part.SCORES) in found and segment not in computed:
                self.num_cached_tokens += found[segment, Part.SCORES]["input_ids"].shape[0]

    def _log_seams(self, missing: Collection[Segment]) -> None:
        for seam in self._source.tokenizer.seams(missing):
            if seam not in self._logged_seams and len(self._logged_seams) < _MAX_LOGGED_SEAMS:
                self._logged_seams.add(seam)
                logger.info(
                    "a seam changes tokens: %r + %r (text.seams() lists them)", seam.left[-20:], seam.right[:20]
                )
