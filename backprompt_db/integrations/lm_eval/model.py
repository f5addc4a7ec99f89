"""The model that the harness calls `backprompt`: it gives the answers of the `hf` model, out of a database."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from tqdm import tqdm

from backprompt_db.compute.engine import Engine
from backprompt_db.compute.inference.loading import GivenModel, ModelSource, pretrained_model
from backprompt_db.database.database import Database
from backprompt_db.database.opening import open_database
from backprompt_db.errors import PromptError
from backprompt_db.integrations.lm_eval import arguments
from backprompt_db.integrations.lm_eval.generating import GenerationSettings, Generator
from backprompt_db.integrations.lm_eval.greedy import GreedyPaths
from backprompt_db.integrations.lm_eval.scoring import Answer, Question, Scorer, batches
from backprompt_db.integrations.lm_eval.token_pieces import PieceFinder
from backprompt_db.prompt.model_counters import ModelCounters

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)

_NO_CONTEXT = "Mend the task: a context must have a token, and white space at its end does not count for one."

_GENERATED_TOGETHER = 16
"""Prompts in a batch, where `batch_size` does not say how many."""


@register_model("backprompt")
class BackpromptLM(TemplateLM):  # type: ignore[misc]  # the harness is untyped
    """A causal language model of transformers whose answers are kept in a database.

    `pretrained` is a model's name or directory, or a transformers model, and then `tokenizer` its tokenizer. `db` is a
    directory or an open `Database`, the default one if not given. `dtype`, `revision`, `trust_remote_code`,
    `gguf_file`, `max_length`, `max_gen_toks`, `prefix_token_id` and `chat_template_args` are those of `--model hf`;
    `batch_size` is how many prompts are generated together, and says nothing of scoring, which is packed by cost.
    Raises `PromptError` for other arguments.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        tokenizer: Any = None,
        db: str | Database | None = None,
        namespace: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        batch_size: int | str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        arguments.check(others)
        self._db = db if isinstance(db, Database) else open_database(db, namespace=namespace or "")
        self._loading = arguments.loading(others)
        self._source = self._find(pretrained, tokenizer)
        self._engine = Engine(self._source, self._db, deterministic=False, progress=False)
        self._given_max_length = max_length
        self._given_prefix_token_id = prefix_token_id
        self._max_gen_toks = max_gen_toks
        self._chat_template_args = chat_template_args or {}
        self._batch_size = batch_size

    def _find(self, pretrained: Any, tokenizer: Any) -> ModelSource:
        if not isinstance(pretrained, str):
            return GivenModel(pretrained, tokenizer)
        if tokenizer is not None:
            arguments.check({"tokenizer": tokenizer})
        return pretrained_model(pretrained, self._loading, model_metadata=self._db.model_metadata)

    @property
    def db(self) -> Database:
        """The database that answers come from."""
        return self._db

    @property
    def counters(self) -> ModelCounters:
        """What this model did since it was made."""
        return self._engine.counters

    @property
    def is_loaded(self) -> bool:
        """Whether the model's weights are in memory. A run in which everything is found does not load them."""
        return self._source.is_loaded

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._source.tokenizer.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer, by which the harness keeps requests apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a string without a context."""
        if self._given_prefix_token_id is not None:
            return self._given_prefix_token_id
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @cached_property
    def max_length(self) -> int:
        """How many tokens the model reads at once. Its weights are not loaded for that."""
        return int(self._given_max_length or resolve_max_length(self._config, self.tokenizer))

    @property
    def max_gen_toks(self) -> int:
        """How many tokens are generated at most, where a task does not say."""
        return self._max_gen_toks

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,  # noqa: FBT001 - the harness calls it so
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        """Return the token ids of a string, the last `left_truncate_len` of them, as the harness's `hf` model does."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,  # noqa: FBT001, FBT002 - the harness calls it so
        **_: Any,
    ) -> list[tuple[float, bool]]:
        questions = [self._question(context, continuation) for _, context, continuation in requests]
        answers: dict[int, tuple[float, bool]] = {}
        for number, answer in self._answered(questions, "Running loglikelihood requests", disable=disable_tqdm):
            answers[number] = answer.logprob, answer.is_greedy
            self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return [answers[number] for number in range(len(requests))]

    def loglikelihood_rolling(
        self,
        requests: Sequence[Instance],
        disable_tqdm: bool = False,  # noqa: FBT001, FBT002 - the harness calls it so
    ) -> list[float]:
        """Return the log-likelihood of each whole string, in windows as the harness's `hf` model has them."""
        owners, questions = list[int](), list[Question]()
        for number, (string,) in enumerate(request.args for request in requests):
            windows = self._windows(string)
            questions += windows
            owners += [number] * len(windows)
        sums = [0.0] * len(requests)
        described = "Running loglikelihood_rolling requests"
        for number, answer in self._answered(questions, described, disable=disable_tqdm):
            sums[owners[number]] += answer.logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(
        self,
        requests: Sequence[Instance],
        disable_tqdm: bool = False,  # noqa: FBT001, FBT002 - the harness calls it so
    ) -> list[str]:
        """Return what the model writes after each context, up to a stop string. Greedy continuations are stored.

        Raises `PromptError` for arguments that cannot be followed here.
        """
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        groups: dict[str, list[int]] = {}
        for number, (_, gen_kwargs) in enumerate(request.args for request in requests):
            groups.setdefault(repr(gen_kwargs), []).append(number)
        strings: dict[int, str] = {}
        with self._bar(len(requests), "Running generate_until requests", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                settings = GenerationSettings.of(requests[numbers[0]].args[1], max_gen_toks=self.max_gen_toks, eos=eos)
                for some, prompts in self._prompts(requests, numbers, settings):
                    written = self._generator.strings(prompts, settings, self._finder)
                    strings |= dict(zip(some, written, strict=True))
                    bar.update(len(some))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, strings[number])
        return [strings[number] for number in range(len(requests))]

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,  # noqa: FBT001, FBT002 - the harness calls it so
    ) -> str:
        """Return the prompt that the tokenizer's chat template makes; without system messages where it knows none."""
        try:
            return self._templated(chat_history, add_generation_prompt=add_generation_prompt)
        except TemplateError:
            logger.warning("the chat template refuses these messages: those of the system are left out")
            others = [message for message in chat_history if message["role"] != "system"]
            return self._templated(others, add_generation_prompt=add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside its results: what was found and what was computed."""
        return {"backprompt_db": {"directory": str(self._db.directory or ""), **asdict(self.counters)}}

    def _templated(self, chat_history: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        string: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._chat_template_args,
        )
        return string

    def _question(self, context: list[int], continuation: list[int], *, wants_greedy: bool = True) -> Question:
        """Return the question about these token ids. A context that is too long loses its beginning."""
        if not 0 < len(continuation) <= self.max_length:
            raise PromptError(
                f"a continuation has {len(continuation):,} tokens of its own, not 1 to {self.max_length:,}",
                hint="Mend the task: a continuation must add to its context, and fit into the model.",
            )
        if not context:
            raise PromptError("nothing predicts a continuation's first token", hint=_NO_CONTEXT)
        ids = (context + continuation)[-(self.max_length + 1) :]
        return Question(ids, len(continuation), wants_greedy)

    def _windows(self, string: str) -> list[Question]:
        windows = utils.get_rolling_token_windows(
            token_list=self.tok_encode(string),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [self._question(*utils.make_disjoint_window(window), wants_greedy=False) for window in windows]

    def _answered(
        self, questions: Sequence[Question], description: str, *, disable: bool
    ) -> Iterator[tuple[int, Answer]]:
        """Yield the number of each question with its answer, in the order in which they are answered."""
        with self._bar(len(questions), description, disable=disable) as bar:
            for numbers in batches(questions):
                yield from zip(
                    numbers, self._scorer.answers([questions[each] for each in numbers], self._finder), strict=True
                )
                bar.update(len(numbers))

    def _prompts(
        self, requests: Sequence[Instance], numbers: Sequence[int], settings: GenerationSettings
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Yield batches: numbers of requests, and the token ids of their contexts, sorted."""
        longest = self.max_length - settings.max_new_tokens
        if longest <= 0:
            raise PromptError(
                f"{settings.max_new_tokens:,} tokens to generate leave no room in {self.max_length:,}",
                hint="Give a smaller max_gen_toks.",
            )
        ids = {number: self.tok_encode(requests[number].args[0], left_truncate_len=longest) for number in numbers}
        if not all(ids.values()):
            raise PromptError("nothing predicts the first token of what is written", hint=_NO_CONTEXT)
        order = sorted(numbers, key=ids.__getitem__)
        for begin in range(0, len(order), self._num_together):
            some = order[begin : begin + self._num_together]
            yield some, [ids[number] for number in some]

    @property
    def _num_together(self) -> int:
        size = str(self._batch_size)
        return int(size) if size.isdecimal() and int(size) > 1 else _GENERATED_TOGETHER

    @cached_property
    def _finder(self) -> PieceFinder:
        return PieceFinder(self.tokenizer)

    @cached_property
    def _paths(self) -> GreedyPaths:
        return GreedyPaths(self._db)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._engine, paths=self._paths, namespace=self._db.namespace)

    @cached_property
    def _generator(self) -> Generator:
        return Generator(
            self._engine,
            self._source,
            paths=self._paths,
            generation_config=self._generation_config,
            namespace=self._db.namespace,
        )

    @property
    def _config(self) -> Any:
        """The model's configuration. Its weights are not loaded for that."""
        from transformers import AutoConfig

        if self.is_loaded:
            return self._source.runner.model.config
        return AutoConfig.from_pretrained(self._source.name, **arguments.file_names(self._loading))

    @property
    def _generation_config(self) -> Any:
        from transformers import GenerationConfig

        if self.is_loaded:
            return self._source.runner.model.generation_config
        try:
            return GenerationConfig.from_pretrained(self._source.name, **arguments.file_names(self._loading))
        except OSError:  # there is no such file
            return GenerationConfig.from_model_config(self._config)

    @staticmethod
    def _bar(total: int, description: str, *, disable: bool) -> Any:
        return tqdm(total=total, desc=description, disable=disable)
