"""The core loop: fetch what is there, plan what is missing, compute it in packs, persist it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from backprompt_db.catalog import TokenizerRecord
from backprompt_db.compute import plan
from backprompt_db.compute.job import Job, Need, Wanted
from backprompt_db.errors import ModelMismatch
from backprompt_db.keys import Address, TokenizerId, WeightsId, address
from backprompt_db.representation import Arrays, Origin, Part
from backprompt_db.store.contract import Key
from backprompt_db.text import Seam, Segment, ancestry
from backprompt_db.writer import NewPart

if TYPE_CHECKING:
    from backprompt_db.compute.runtime import Runtime
    from backprompt_db.compute.source import ModelSource
    from backprompt_db.database import Database

logger = logging.getLogger(__name__)


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

    def represent(self, wanted: Wanted, *, keep: Wanted) -> tuple[dict[Need, Arrays], set[Segment]]:
        """Return the wanted parts and which segments were computed for them: the core loop.

        `keep` names the parts to store of a computed segment, all three where it says nothing.
        """
        names = _Names(*self._source.ids)
        found = self._fetch(names, [(segment, part) for segment, parts in wanted.items() for part in parts])
        computed: set[Segment] = set()
        lost: set[Need] = set()

        def is_stored(segment: Segment, part: Part) -> bool:
            was_fetched = part in wanted.get(segment, ()) or (segment, part) in lost
            return (segment, part) in found or (not was_fetched and self._db.has(names.key(segment, part)))

        while missing := plan.missing_segments(wanted, is_stored=is_stored):
            job = self._prepare(names, missing, wanted=wanted, keep=keep)
            for pack in self._with_progress(job):
                found.update(self._fetch(names, [need for need in pack.needs if need not in found]))
                unusable = [need for need in pack.needs if not job.can_use(need, found)]
                if unusable:  # evicted or damaged since it was looked up: plan again without it
                    lost.update(unusable)
                    self._discard(names, [need for need in unusable if found.pop(need, None)])
                    break
                parts, seconds = job.compute(pack, found)
                self._persist(names, job, pack, parts, seconds=seconds)
                found.update({need: part for need, part in parts.items() if need not in found and job.is_used(need)})
                job.release(pack, found)
                computed.update(pack.segments)
                self.num_computed_tokens += job.num_tokens(pack)
        self._count(found, wanted, computed)
        return found, computed

    def _fetch(self, names: _Names, needs: Iterable[Need]) -> dict[Need, Arrays]:
        """Return those of the needed parts that the database has."""
        parts: dict[Segment, list[Part]] = {}
        for segment, part in needs:
            parts.setdefault(segment, []).append(part)
        addresses = {segment: names.address(segment) for segment in parts}
        fetched = self._db.fetch({addresses[segment]: wanted for segment, wanted in parts.items()})
        keys = {(segment, part): Key(addresses[segment], part) for segment, wanted in parts.items() for part in wanted}
        return {need: fetched[key] for need, key in keys.items() if key in fetched}

    def _prepare(self, names: _Names, missing: list[Segment], *, wanted: Wanted, keep: Wanted) -> Job:
        """Tokenise what is needed, check that it can be run, and divide it into packs. Loads the model if need be."""
        segments = ancestry(missing)
        input_ids = self._source.tokenizer.encode(segments)
        num_tokens = {segment: len(ids) for segment, ids in input_ids.items()}
        starts = plan.positions(segments, num_tokens)
        runtime = self._proven_runtime(names)
        plan.check_context_length(starts, num_tokens, runtime.max_positions)
        _check_vocabulary(input_ids.values(), runtime.vocab_size)
        self._log_seams(missing)
        max_segments = 1 if self._deterministic or not runtime.takes_packs else None
        packs = plan.packs(missing, num_tokens, max_segments=max_segments)
        runtime.require_runnable(packs, input_ids, starts)
        return Job(runtime, packs, input_ids, starts, wanted, keep)

    def _proven_runtime(self, names: _Names) -> Runtime:
        """Return the loaded model after its self-check. Raises `UnsupportedModel`, or `ModelMismatch` if it changed."""
        runtime = self._source.runtime
        if self._source.ids != (names.weights_id, names.tokenizer_id):
            raise ModelMismatch(
                f"{self._source.name} is not the model that was recorded for its files",
                hint="Make the LanguageModel again; nothing was stored under the wrong name.",
            )
        record = runtime.prove(names.weights_id, self._db.recall(lambda catalog: catalog.model(names.weights_id)))
        if record is not None:
            self._db.note(record)
            tokenizer = self._source.tokenizer
            kind = type(tokenizer.tokenizer).__name__
            self._db.note(TokenizerRecord(tokenizer.id, self._source.name, kind, len(tokenizer.tokenizer)))
        runtime.require_supported()
        return runtime

    def _persist(
        self, names: _Names, job: Job, pack: plan.Pack, parts: Mapping[Need, Arrays], *, seconds: float
    ) -> None:
        """Queue the parts to keep. Their seconds are shares of the pass, by tokens."""
        seconds_per_token = seconds / job.num_tokens(pack)
        new = []
        for segment in pack.segments:
            num_tokens = len(job.input_ids[segment])
            origin = Origin(
                text=segment.string,
                parents=segment.parent_ids,
                start=segment.start,
                weights_id=names.weights_id,
                tokenizer_id=names.tokenizer_id,
                num_tokens=num_tokens,
                compute_seconds=num_tokens * seconds_per_token,
                namespace=segment.namespace,
                versions=job.runtime.versions,
            )
            new += [NewPart(names.key(segment, part), parts[segment, part], origin) for part in job.kept(segment)]
        self._db.put(new)

    def _discard(self, names: _Names, malformed: Iterable[Need]) -> None:
        """Remove stored parts that are not of this model's shape, so that right ones can take their place."""
        for segment, part in malformed:
            self._db.discard(names.key(segment, part))

    def _with_progress(self, job: Job) -> Iterator[plan.Pack]:
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

    def _log_seams(self, missing: list[Segment]) -> None:
        for seam in self._source.tokenizer.seams(missing):
            if seam not in self._logged_seams:
                self._logged_seams.add(seam)
                logger.info(
                    "a seam changes tokens: %r + %r (text.seams() lists them)", seam.left[-20:], seam.right[:20]
                )


@dataclass(frozen=True, slots=True)
class _Names:
    """Addresses under one model and tokenizer, which must stay the same for the whole of a call."""

    weights_id: WeightsId
    tokenizer_id: TokenizerId

    def address(self, segment: Segment) -> Address:
        return address(segment.id, self.weights_id, self.tokenizer_id)

    def key(self, segment: Segment, part: Part) -> Key:
        return Key(self.address(segment), part)


def _check_vocabulary(input_ids: Iterable[Sequence[int]], vocab_size: int) -> None:
    largest = max(max(ids) for ids in input_ids)
    if largest >= vocab_size:
        raise ModelMismatch(
            f"the tokenizer gives token id {largest}, the model reads ids below {vocab_size}",
            hint="Use the tokenizer that belongs to the model.",
        )
