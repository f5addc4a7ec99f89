"""The one object that a user runs prompts on: plan, fetch, compute, persist."""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from backprompt_db.catalog import ModelRecord, Source, TokenizerRecord
from backprompt_db.compute import plan
from backprompt_db.compute.job import Job, Need, Wanted
from backprompt_db.compute.pretrained import source_key
from backprompt_db.compute.source import GivenModel, ModelSource, PretrainedModel
from backprompt_db.database import Database, open_database
from backprompt_db.errors import CatalogError, ModelMismatch, PromptError
from backprompt_db.keys import Address, TokenizerId, WeightsId, address, utf8
from backprompt_db.representation import Arrays, ModelRepr, Origin, Part
from backprompt_db.store.contract import Key
from backprompt_db.text import Seam, Segment, Text, ancestry, as_text
from backprompt_db.writer import NewPart

if TYPE_CHECKING:
    from backprompt_db.compute.runtime import Runtime

logger = logging.getLogger(__name__)

_CUTS = b"backprompt-db/cuts/1\0"
_SCORES = frozenset({Part.SCORES})


@dataclass(frozen=True, slots=True)
class ModelCounters:
    """What one `LanguageModel` did since it was made."""

    num_model_calls: int
    """Forward passes that computed representations; a self-check is not counted."""
    num_computed_tokens: int
    num_cached_tokens: int
    """Tokens of the segments that were asked for and found."""


class LanguageModel:
    """A causal language model whose representations are kept in a database.

    `model` and `tokenizer` are any decoder-only Hugging Face pair; `db` is a `Database`, the default one if not given.
    `deterministic` computes each segment in a pass of its own, so that a representation that was evicted is recomputed
    bit for bit on the same machine and versions; it is slower for many short segments. `progress` shows a bar for what
    takes longer than a second, in a terminal.

    The model is used in evaluation mode; its training mode is restored after each call.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        db: Database | None = None,
        deterministic: bool = False,
        progress: bool = True,
    ) -> None:
        self._build(GivenModel(model, tokenizer), db, deterministic=deterministic, progress=progress)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        db: Database | None = None,
        deterministic: bool = False,
        progress: bool = True,
        **arguments: Any,
    ) -> LanguageModel:
        """Return the model of that name or directory; `arguments` go to transformers' `from_pretrained`.

        Where the database knows the ids of these very files, nothing is loaded until something must be computed.
        """
        lm = cls.__new__(cls)
        database = db if db is not None else open_database()
        key = source_key(str(name_or_path), arguments)
        known = database.catalog.source(key) if key and database.catalog else None
        source = PretrainedModel(
            str(name_or_path), arguments, known_ids=(known.weights_id, known.tokenizer_id) if known else None
        )
        lm._build(source, database, deterministic=deterministic, progress=progress)
        if key and known is None:
            lm._record(Source(key, source.name, *source.ids))
        return lm

    def _build(self, source: ModelSource, db: Database | None, *, deterministic: bool, progress: bool) -> None:
        self._source = source
        self._given_db = db
        self._deterministic = deterministic
        self._progress = progress
        self._num_computed_tokens = self._num_cached_tokens = 0
        self._logged_seams: set[Seam] = set()

    @cached_property
    def db(self) -> Database:
        """The database; the default one is opened at the first use."""
        return self._given_db if self._given_db is not None else open_database()

    @property
    def namespace(self) -> str:
        """The namespace of the database."""
        return self.db.namespace

    @property
    def model(self) -> Any:
        """The transformers model; loads it if need be."""
        return self._source.runtime.model

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; loads it if need be."""
        return self._source.tokenizer.tokenizer

    @property
    def is_loaded(self) -> bool:
        """Whether the model's weights are in memory. A run of full hits does not load them."""
        return self._source.is_loaded

    @property
    def weights_id(self) -> WeightsId:
        """The weights id of the model as it is now."""
        return self._source.ids[0]

    @property
    def tokenizer_id(self) -> TokenizerId:
        """The id of the tokenizer."""
        return self._source.ids[1]

    @property
    def counters(self) -> ModelCounters:
        """What this object did since it was made."""
        num_calls = self._source.runtime.num_calls if self.is_loaded else 0
        return ModelCounters(num_calls, self._num_computed_tokens, self._num_cached_tokens)

    def text(self, string: str, *, start: int | None = None, eager: bool = False, split: int | None = None) -> Text:
        """Return a text that runs on this model. Building it computes nothing, unless `eager`.

        `start` is an explicit position id for the first token. `split` cuts a long string into segments of about that
        many tokens, with exactly the tokens of the whole string, so that long strings with a common beginning share
        its representation; finding the cuts loads the tokenizer, unless the database remembers them.

        Raises `InvalidText` for anything but a string without lone surrogates.
        """
        if split is None:
            return Text(string, self, start=start, eager=eager)
        if split < 1:
            raise PromptError(f"split={split} is not a number of tokens", hint="Give a split of 1 or more.")
        first, *others = self._pieces(string, split)
        text = Text(first, self, start=start)
        for piece in others:
            text += piece
        return Text("", self, eager=eager) + text

    @overload
    def __call__(self, texts: Text | str) -> ModelRepr: ...  # type: ignore[overload-overlap]  # a str is iterable
    @overload
    def __call__(self, texts: Iterable[Text | str]) -> list[ModelRepr]: ...
    def __call__(self, texts: Text | str | Iterable[Text | str]) -> ModelRepr | list[ModelRepr]:
        """Return the representation of a text, or of each of several, computing only what is not stored.

        Shared prefixes are computed once, and what is missing in several texts is computed together. All three parts of
        what is computed are kept. Raises `PromptError` for an empty text, `ContextLengthExceeded` before anything is
        computed for one that is too long, `UnsupportedModel` for a model that cannot be cached and stay right.
        """
        if isinstance(texts, Text | str):
            return self._run([texts])[0]
        return self._run(list(texts))

    def run(self, text: Text) -> ModelRepr:
        """Return the representation of one text; `text()` calls this."""
        return self._run([text])[0]

    def score(
        self, prompt: Text | str | Sequence[Text | str], completions: Sequence[Text | str]
    ) -> npt.NDArray[np.float64]:
        """Return the log-probability of each completion given the prompt, summed over its tokens: [num_completions].

        For several prompts, the result is [num_prompts, num_completions] and everything missing is computed together.
        Only the scores of completions are kept. Raises `PromptError` for an empty prompt or completion, and where a
        completion directly follows parallel branches: nothing predicts its first token.
        """
        if isinstance(completions, str | Text):
            raise PromptError("completions is one text", hint="Give a list of completions.")
        if isinstance(prompt, str | Text):
            return self._score([prompt], completions).reshape(len(completions))
        return self._score(prompt, completions)

    def seams(self, text: Text) -> list[Seam]:
        """Return the seams of a text that change tokens; see `Text.seams`."""
        return self._source.tokenizer.seams(text.segments(self.namespace))

    def past_key_values(self, text: Text) -> Any:
        """Return a transformers `Cache` of a text's keys and values, on the model's device if it is loaded.

        Segments come in the order written. Keys and values that are not stored are computed and kept.
        """
        from backprompt_db.compute.kvcache import KVShape, assemble

        segments = text.segments(self.namespace)
        found, _ = self._represent(dict.fromkeys(segments, frozenset({Part.KV})), keep={})
        parts = [found[segment, Part.KV] for segment in segments]
        device = self._source.runtime.device if self.is_loaded else None
        num_tokens = sum(arrays["keys"].shape[2] for arrays in parts)
        return assemble(KVShape.of(parts[0]), parts, capacity=num_tokens, device=device).cache()

    def _run(self, texts: Sequence[Text | str]) -> list[ModelRepr]:
        bound = [self._own(text) for text in texts]
        segments = [text.segments(self.namespace) for text in bound]
        tips = [text.tips(self.namespace) for text in bound]
        wanted = dict.fromkeys([segment for each in segments for segment in each], _SCORES)
        wanted.update({tip[0]: frozenset({Part.SCORES, Part.LOGITS}) for tip in tips if len(tip) == 1})
        found, computed = self._represent(wanted, keep={})
        return [
            self._result(text, each, tip, found, computed)
            for text, each, tip in zip(bound, segments, tips, strict=True)
        ]

    def _result(
        self,
        text: Text,
        segments: list[Segment],
        tips: tuple[Segment, ...],
        found: Mapping[Need, Arrays],
        computed: set[Segment],
    ) -> ModelRepr:
        """Collect the parts of one text. A computed segment counts for the first text that has it."""
        scores = tuple(found[segment, Part.SCORES] for segment in segments)
        num_tokens = {segment: part["input_ids"].shape[0] for segment, part in zip(segments, scores, strict=True)}
        num_computed = sum(num_tokens[segment] for segment in segments if segment in computed)
        computed.difference_update(segments)
        return ModelRepr(
            text=text,
            scores=scores,
            last_logits=found[tips[0], Part.LOGITS]["logits"] if len(tips) == 1 else None,
            num_cached_tokens=sum(num_tokens.values()) - num_computed,
            num_computed_tokens=num_computed,
        )

    def _score(self, prompts: Sequence[Text | str], completions: Sequence[Text | str]) -> npt.NDArray[np.float64]:
        pairs: list[list[Segment]] = []
        for prompt in map(self._own, prompts):
            known = prompt.segments(self.namespace)
            endings = [(prompt + completion).tips(self.namespace) for completion in completions]
            pairs += [ancestry(ending, without=known) for ending in endings]
        wanted = dict.fromkeys([segment for pair in pairs for segment in pair], _SCORES)
        found, _ = self._represent(wanted, keep=wanted)
        sums = [
            sum(float(found[segment, Part.SCORES]["token_logprobs"].numpy().sum(dtype=np.float64)) for segment in pair)
            for pair in pairs
        ]
        if not all(pairs) or np.isnan(sums).any():
            raise PromptError(
                "a completion is empty, or directly follows parallel branches, where nothing predicts its first token",
                hint="Put the text that asks for the completion after the branches.",
            )
        return np.array(sums).reshape(len(prompts), len(completions))

    def _represent(self, wanted: Wanted, *, keep: Wanted) -> tuple[dict[Need, Arrays], set[Segment]]:
        """Return the wanted parts and which segments were computed for them: the core loop.

        `keep` names the parts to store of a computed segment, all three where it says nothing.
        """
        names = _Names(*self._source.ids)
        found = self._fetch(names, [(segment, part) for segment, parts in wanted.items() for part in parts])
        computed: set[Segment] = set()
        lost: set[Need] = set()

        def is_stored(segment: Segment, part: Part) -> bool:
            was_fetched = part in wanted.get(segment, ()) or (segment, part) in lost
            return (segment, part) in found or (not was_fetched and self.db.has(names.key(segment, part)))

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
                found.update({need: part for need, part in parts.items() if job.is_used(need)})
                job.release(pack, found)
                computed.update(pack.segments)
                self._num_computed_tokens += job.num_tokens(pack)
        self._count(found, wanted, computed)
        return found, computed

    def _fetch(self, names: _Names, needs: Iterable[Need]) -> dict[Need, Arrays]:
        """Return those of the needed parts that the database has."""
        parts: dict[Segment, list[Part]] = {}
        for segment, part in needs:
            parts.setdefault(segment, []).append(part)
        addresses = {segment: names.address(segment) for segment in parts}
        fetched = self.db.fetch({addresses[segment]: wanted for segment, wanted in parts.items()})
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
        return Job(runtime, packs, input_ids, starts, wanted, keep)

    def _proven_runtime(self, names: _Names) -> Runtime:
        """Return the loaded model after its self-check. Raises `UnsupportedModel`, or `ModelMismatch` if it changed."""
        runtime = self._source.runtime
        if self._source.ids != (names.weights_id, names.tokenizer_id):
            raise ModelMismatch(
                f"{self._source.name} is not the model that was recorded for its files",
                hint="Make the LanguageModel again; nothing was stored under the wrong name.",
            )
        catalog = self.db.catalog
        record = runtime.prove(names.weights_id, catalog.model(names.weights_id) if catalog else None)
        if record is not None:
            self._record(record)
            tokenizer = self._source.tokenizer
            kind = type(tokenizer.tokenizer).__name__
            self._record(TokenizerRecord(tokenizer.id, self._source.name, kind, len(tokenizer.tokenizer)))
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
        self.db.put(new)

    def _discard(self, names: _Names, malformed: Iterable[Need]) -> None:
        """Remove stored parts that are not of this model's shape, so that right ones can take their place."""
        for segment, part in malformed:
            self.db.discard(names.key(segment, part))

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
                self._num_cached_tokens += found[segment, Part.SCORES]["input_ids"].shape[0]

    def _log_seams(self, missing: list[Segment]) -> None:
        for seam in self._source.tokenizer.seams(missing):
            if seam not in self._logged_seams:
                self._logged_seams.add(seam)
                logger.info(
                    "a seam changes tokens: %r + %r (text.seams() lists them)", seam.left[-20:], seam.right[:20]
                )

    def _own(self, text: Text | str) -> Text:
        """Return a text that belongs to this model. Raises `PromptError` for an empty one, or another model's."""
        own = as_text(text)
        if not own:
            raise PromptError("the prompt is empty", hint="Give at least one character.")
        return own.on(self)

    def _pieces(self, string: str, split: int) -> list[str]:
        """Cut a long string, where the database remembers, else where the tokenizer says."""
        if not isinstance(string, str) or not string:
            Text(string)  # says what is wrong
            return [string]
        catalog = self.db.catalog
        key = hashlib.sha256(_CUTS + self.tokenizer_id + split.to_bytes(8, "big") + utf8(string)).digest()
        cuts = catalog.cuts(key) if catalog else None
        if cuts is None:
            cuts = tuple(self._source.tokenizer.cuts(string, split))
            if catalog and not self.db.readonly:
                catalog.save_cuts(key, cuts)
        return [string[first:last] for first, last in pairwise((0, *cuts, len(string)))]

    def _record(self, record: ModelRecord | TokenizerRecord | Source) -> None:
        """Note something in the catalog, best effort: everything in it can be found out again."""
        try:
            if self.db.catalog is not None and not self.db.readonly:
                self.db.catalog.save(record)
        except CatalogError as error:
            logger.warning("the catalog missed a record: %s", error)

    def __repr__(self) -> str:
        return f"<LanguageModel {self._source.name}{'' if self.is_loaded else ' (not loaded)'} on {self.db!r}>"


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


_models_of_pairs: weakref.WeakValueDictionary[tuple[int, int], LanguageModel] = weakref.WeakValueDictionary()


def language_model_of(model: Any, tokenizer: Any) -> LanguageModel:
    """Return the `LanguageModel` of a pair of objects on the default database, the same one as long as it is in use."""
    pair = id(model), id(tokenizer)
    lm = _models_of_pairs.get(pair)
    if lm is None:
        lm = _models_of_pairs[pair] = LanguageModel(model, tokenizer)
    return lm
