"""Proving a model before anything of it is stored, once on a machine, and recording what that has shown."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from backprompt_db.catalog.records import TokenizerRecord
from backprompt_db.compute.inference import canary, verdicts
from backprompt_db.database.vocabulary import packed
from backprompt_db.errors import ModelMismatch

if TYPE_CHECKING:
    from backprompt_db.compute.call import Addresses
    from backprompt_db.compute.inference.canary import Canary
    from backprompt_db.compute.inference.loading import ModelSource
    from backprompt_db.compute.inference.runner import ModelRunner
    from backprompt_db.database.catalogs import ModelMetadata
    from backprompt_db.prompt.ids import WeightsId

logger = logging.getLogger(__name__)


class Prover:
    """Gets the model of a source, loaded and proven.

    With `checks_again`, the canary that this machine remembers spares no pass: the shape of keys and values, and the
    head, are shown anew.
    """

    def __init__(
        self, source: ModelSource, model_metadata: ModelMetadata, *, checks_again: bool, progress: bool
    ) -> None:
        self._source = source
        self._metadata = model_metadata
        self._checks_again = checks_again
        self._progress = progress

    def runner(self, addresses: Addresses) -> ModelRunner:
        """Return the loaded model after its self-check. Raises `UnsupportedModel`, or `ModelMismatch` if it changed.

        Everything that is computed passes through here first, so nothing is stored of a model that is not settled.
        """
        runner = self._source.runner
        if not addresses.is_certain and self._source.ids != addresses.ids:
            raise ModelMismatch(
                f"{self._source.name} is not the model that was recorded for its files",
                hint="Make the LanguageModel again; nothing was stored under the wrong name.",
            )
        if not runner.is_proven(addresses.ids.weights_id):
            self._settle(runner, addresses.ids.weights_id)
            self._metadata.describe(addresses.ids.tokenizer_id, self._describe_tokenizer)
        runner.require_supported()
        return runner

    def _settle(self, runner: ModelRunner, weights_id: WeightsId) -> None:
        """Prove a model, and compare it with its canary; what was shown with that is not shown again."""
        known = canary.recalled(weights_id, runner.conditions)
        if known is not None and not self._checks_again:
            runner.trust(known)
        self._prove(runner, weights_id)
        if not runner.is_refused:
            self._compare(runner, weights_id, known)
        runner.settle(weights_id)

    def _compare(self, runner: ModelRunner, weights_id: WeightsId, known: Canary | None) -> None:
        """Run the canary, unless there is no place to remember it. Raises `ModelMismatch` if it was another one."""
        place = canary.place_of(weights_id, runner.conditions)
        if place is None:
            return
        computed = runner.canary(weights_id)
        if known is None:
            canary.remember(computed)
        elif not computed.is_like(known):
            raise ModelMismatch(
                f"{runner.name} computes other numbers than it did on this machine, and nothing that has an id differs",
                hint="Nothing was stored. Start again without what patches torch or transformers, or chooses other "
                f"kernels; if nothing does, as after a new driver, delete {place}.",
            )

    def _prove(self, runner: ModelRunner, weights_id: WeightsId) -> None:
        """Settle how the model is computed: by what the database or this machine remembers, else by a self-check."""
        device = runner.device.type
        known = self._metadata.recall(lambda catalog: catalog.model(weights_id))
        if runner.accepts(known):
            runner.prove(weights_id, known)
            return
        known = verdicts.recalled(weights_id, device=device, name=runner.name)
        is_settled = runner.accepts(known)
        with nullcontext() if is_settled else self._notice(f"checking once that {runner.name} can be cached"):
            record = runner.prove(weights_id, known)
        if record is not None:
            verdicts.remember(record, device=device)
        self._metadata.save(*(found for found in [record or known] if found is not None))

    def _notice(self, text: str) -> tqdm[Any]:
        """Show a line in a terminal while something is done that takes long and has no measure."""
        logger.info("%s", text)
        return tqdm(desc=text, bar_format="{desc} ...", disable=None if self._progress else True, leave=False)

    def _describe_tokenizer(self) -> TokenizerRecord:
        tokenizer = self._source.tokenizer
        kind = type(tokenizer.tokenizer).__name__
        definition = packed(tokenizer.definition()) if tokenizer.is_fast else b""
        return TokenizerRecord(tokenizer.id, self._source.name, kind, len(tokenizer.tokenizer), definition)
