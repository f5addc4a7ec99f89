"""Recomputing: whether a model gives what is stored under its name, and how far apart two values are.

Digests tell whether a value is the one that was written. Only recomputing tells whether it was right when it was
written, be it by a forger, a broken machine or a faulty library.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from backprompt_db.codec.fidelity import Fidelity, restore
from backprompt_db.database.lineage import Ids, Lineage, origin_of
from backprompt_db.database.opening import open_catalog
from backprompt_db.errors import CatalogError, ModelMismatch
from backprompt_db.operations.inspection import Kind, Problem, inspect
from backprompt_db.operations.verify import Found, sample
from backprompt_db.prompt.ids import Address, WeightsId
from backprompt_db.prompt.representation import OWN_PARTS, Array, Arrays, Part
from backprompt_db.prompt.segments import Segment, ancestry
from backprompt_db.store.contract import Key, Store

if TYPE_CHECKING:
    from backprompt_db.database.database import Database


_TOKENS_PER_BATCH = 4096
"""How many tokens are computed at once and held in memory; one prompt alone may have more."""
_NUM_COMPARED = 3
"""Prompts are put in order by so many of their first segments."""
_NUM_DIGITS = 12

_TOLERANCE = {"F64": 1e-3, "F32": 1e-3, "F16": 0.1, "BF16": 0.5}
_TOLERANCE_OF_LOSSY = {Fidelity.EXACT: 0.0, Fidelity.BFLOAT16: 0.1, Fidelity.INT8: 0.25}
"""Both were measured on a trained model (SmolLM2-135M, 1,100 tokens of prose), then multiplied by three or more."""

_MIN_PROBABILITY = 1e-4
"""Logits of tokens that both sides find less likely are not compared: half precision moves them far, which does not
matter."""

_TINY = 1e-30
"""The least number by which an error is divided."""

_Floats = npt.NDArray[np.float64]


class Model(Protocol):
    """What recomputes; `compute/answers.py` has one."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def ids(self) -> Ids:
        """Its weights id and tokenizer id."""

    @property
    def kv_dtype(self) -> str:
        """The safetensors name of the dtype of keys and values."""

    def compute(self, wanted: Mapping[Segment, frozenset[Part]]) -> Mapping[tuple[Segment, Part], Arrays]:
        """Return parts of segments, computed from the strings alone."""


@dataclass(frozen=True, slots=True)
class Recomputation:
    """What recomputing found."""

    num_representations: int = 0
    """Representations that were computed again, of those that the model has."""
    num_parts: int = 0
    """Their own stored parts, each of which was compared; what may follow them is left out."""
    num_left_out: int = 0
    """Chosen ones that cannot be computed again, because the text of an ancestor is not in the store any more."""
    tolerance: float = 0.0
    """Up to which error a part counts as the same; `error` explains the unit."""
    max_errors: Mapping[Part, float] = field(default_factory=dict)
    """The largest error of each kind of part that was compared."""
    problems: tuple[Problem, ...] = ()
    """The parts whose error is larger than the tolerance."""

    @property
    def found(self) -> Found:
        """What kind of problem was found."""
        return Found.RECOMPUTATION if self.problems else Found.NOTHING


class _Target(NamedTuple):
    """A representation to compute again."""

    address: Address
    segment: Segment
    parts: frozenset[Part]
    """Those of its own parts that are stored."""


def recompute(
    db: Database,
    model: Model,
    *,
    share: float,
    seed: int,
    max_error: float | None = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Recomputation:
    """Compute a random share of what is stored of a model again, at least one representation, and compare.

    Nothing is changed: `Database.discard` removes what should go. `max_error` replaces the tolerance that follows from
    the model's dtype and the database's fidelity. `progress` wraps the list of what is computed. Raises `ModelMismatch`
    when the database has nothing of this model.
    """
    addresses = _of_model(db, model)
    chosen = sample(len(addresses), share=share, seed=seed)
    lineage = Lineage(db.store, model.ids)
    targets = _targets(db.store, lineage, [addresses[number] for number in sorted(chosen)])
    limit = tolerance(model.kv_dtype, db.fidelity) if max_error is None else max_error
    errors = dict[Key, float]()
    for batch in _batches(progress(targets), lineage.num_tokens):
        errors.update(_compare(db.store, model, batch))
    return Recomputation(
        num_representations=len(targets),
        num_parts=len(errors),
        num_left_out=len(chosen) - len(targets),
        tolerance=limit,
        max_errors={part: max(found) for part in Part if (found := _of_part(errors, part))},
        problems=tuple(_problem(key, found, limit) for key, found in errors.items() if not found <= limit),
    )


def _of_model(db: Database, model: Model) -> list[Address]:
    found, others = list[Address](), Counter[WeightsId]()
    for address, _ in itertools.groupby(db.store.keys(), key=lambda entry: entry[0].address):
        origin = origin_of(db.store, address)
        if origin is not None and (origin.weights_id, origin.tokenizer_id) == model.ids:
            found.append(address)
        elif origin is not None:
            others[origin.weights_id] += 1
    if not found:
        raise ModelMismatch(
            f"nothing in the database is of {model.name}, whose weights id is {model.ids[0].hex()[:_NUM_DIGITS]}",
            hint=f"It has {_listing(db, others)}.",
        )
    return found


def _listing(db: Database, others: Mapping[WeightsId, int]) -> str:
    names = _names(db)
    return ", ".join(f"{names.get(id_) or '?'} ({id_.hex()[:_NUM_DIGITS]})" for id_ in others) or "none of any model"


def _names(db: Database) -> dict[WeightsId, str]:
    with contextlib.suppress(CatalogError):
        if db.directory is not None:
            with open_catalog(db.directory) as catalog:
                return {record.weights_id: record.name for record in catalog.models()}
    return {}


def _targets(store: Store, lineage: Lineage, addresses: Iterable[Address]) -> list[_Target]:
    """Return what can be computed again, in an order in which prompts with the same beginning follow each other."""
    found = list[_Target]()
    for address in addresses:
        origin = origin_of(store, address)
        segment = lineage.segment(origin) if origin is not None else None
        if segment is not None:
            parts = frozenset(part for part in OWN_PARTS if store.has(Key(address, part)))
            found.append(_Target(address, segment, parts))
    return sorted(found, key=lambda target: [each.id for each in ancestry([target.segment])[:_NUM_COMPARED]])


def _batches(targets: Iterable[_Target], num_tokens: Mapping[Segment, int]) -> Iterator[list[_Target]]:
    batch, segments = list[_Target](), list[Segment]()
    for target in targets:
        new = ancestry([target.segment], without=segments)
        if batch and sum(num_tokens[segment] for segment in (*segments, *new)) > _TOKENS_PER_BATCH:
            yield batch
            batch, segments, new = [], [], ancestry([target.segment])
        batch.append(target)
        segments += new
    if batch:
        yield batch


def _compare(store: Store, model: Model, targets: Sequence[_Target]) -> Iterator[tuple[Key, float]]:
    again = model.compute({target.segment: target.parts | {Part.LOGITS} for target in targets})
    for address, segment, parts in targets:
        for part in parts:
            stored = inspect(store, Key(address, part)).arrays
            if stored is not None:  # else it was removed meanwhile, or is damaged: `verify` finds that
                logits = again[segment, Part.LOGITS]["logits"]
                yield Key(address, part), error(part, stored, again[segment, part], logits=logits)


def _of_part(errors: Mapping[Key, float], part: Part) -> list[float]:
    return [found for key, found in errors.items() if key.part is part]


def _problem(key: Key, found: float, limit: float) -> Problem:
    return Problem(*key, Kind.DIFFERENT, f"its error is {found:.2g}, where {limit:.2g} is allowed")


def tolerance(dtype: str, fidelity: Fidelity) -> float:
    """Return up to which error a part counts as the same, by the dtype of keys and values and by the fidelity."""
    return max(_TOLERANCE[dtype], _TOLERANCE_OF_LOSSY[fidelity])


def error(part: Part, stored: Arrays, again: Arrays, *, logits: Array) -> float:
    """Return the error of a stored part against the one that was computed `again`; infinite for other shapes or NaN.

    The unit of log-probabilities is the standard deviation of those of the whole vocabulary after this segment, from
    its `logits`. That of keys and values is the root mean square of their layer, against the vector of one head at one
    token.
    """
    if part is Part.KV:
        if "keys_scale" in stored:
            stored = restore(stored, "F32")
        return max(_kv_error(_floats(stored[name]), _floats(again[name])) for name in ("keys", "values"))
    spread = max(float(_logprobs(logits).std()), _TINY)
    nats = _scores_error(stored, again) if part is Part.SCORES else _logits_error(stored["logits"], again["logits"])
    return nats / spread


def _kv_error(stored: _Floats, again: _Floats) -> float:
    if stored.shape != again.shape or not stored.size:
        return 0.0 if stored.shape == again.shape else math.inf
    unit = np.sqrt(np.square(again).mean(axis=(1, 2, 3)))
    rows = np.sqrt(np.square(stored - again).mean(axis=3)).max(axis=(1, 2))
    return _finite((rows / np.maximum(unit, _TINY)).max())


def _scores_error(stored: Arrays, again: Arrays) -> float:
    if not np.array_equal(_floats(stored["input_ids"]), _floats(again["input_ids"])):
        return math.inf
    mine, theirs = _floats(stored["token_logprobs"]), _floats(again["token_logprobs"])
    is_defined = ~np.isnan(theirs)
    if not np.array_equal(~np.isnan(mine), is_defined):
        return math.inf
    return _finite(np.abs(mine - theirs)[is_defined].max(initial=0.0))


def _logits_error(stored: Array, again: Array) -> float:
    if stored.shape != again.shape:
        return math.inf
    mine, theirs = _logprobs(stored), _logprobs(again)
    is_likely = ~(np.maximum(mine, theirs) < math.log(_MIN_PROBABILITY))  # NaN counts as likely
    return _finite(np.abs(mine - theirs)[is_likely].max(initial=0.0))


def _logprobs(logits: Array) -> _Floats:
    values = _floats(logits)
    shifted = values - values.max()
    normalised: _Floats = shifted - np.log(np.exp(shifted).sum())
    return normalised


def _floats(array: Array) -> _Floats:
    found = array.torch().double().numpy() if array.dtype == "BF16" else array.numpy()  # NumPy has no bfloat16
    return np.asarray(found, dtype=np.float64)


def _finite(error: float) -> float:
    return float(error) if np.isfinite(error) else math.inf
