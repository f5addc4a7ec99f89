"""`LanguageModel`, the object that users run prompts on. The loop behind it is in `compute/engine.py`."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from backprompt_db.codec.fidelity import Fidelity
from backprompt_db.compute import answers
from backprompt_db.compute.batch import warm
from backprompt_db.compute.batch.requests import Requests
from backprompt_db.compute.batch.run_plan import RunPlan, Warmed
from backprompt_db.compute.engine import Engine
from backprompt_db.compute.explain import explain_run
from backprompt_db.compute.healing import Healed, Healer
from backprompt_db.compute.inference.loading import GivenModel, ModelSource, pretrained_model
from backprompt_db.compute.keeping import AUTO, Keep, Keeper
from backprompt_db.compute.splitting import split_pieces
from backprompt_db.compute.tokens import vocabulary
from backprompt_db.database.database import MEMORY, Database
from backprompt_db.database.opening import open_database
from backprompt_db.errors import ModelMismatch, PromptError, StoreReadOnly
from backprompt_db.prompt.best import Best
from backprompt_db.prompt.explanation import Explanation
from backprompt_db.prompt.generated import Generated
from backprompt_db.prompt.ids import ModelIds, TokenizerId, WeightsId
from backprompt_db.prompt.model_counters import ModelCounters
from backprompt_db.prompt.numbers import plain_int
from backprompt_db.prompt.representation import Array
from backprompt_db.prompt.segments import Seam, Segment, ancestry
from backprompt_db.prompt.text import ModelRepr, Text, as_texts
from backprompt_db.views.console import grid, html_text
from backprompt_db.views.formatting import visible

if TYPE_CHECKING:
    import torch

    from backprompt_db.compute.adopt.adopt import Adopted, Check
    from backprompt_db.compute.generate_arguments import GenerateArguments
    from backprompt_db.compute.generations import GenerationMemory
    from backprompt_db.views.scene import Vocabulary


_Texts = Text | str | Iterable[Text | str]
_Keep = str | Iterable[str]
_Given = Database | str | PathLike[str] | None


class LanguageModel:
    """A causal language model whose representations are kept in a database.

    `model` and `tokenizer` are any decoder-only Hugging Face pair; `db` is a `Database` or the directory of one, the
    default one if not given. `deterministic` computes each segment in a pass of its own, so that a representation that
    was evicted is recomputed bit for bit on the same machine and versions; it is slower for many short segments.
    `exact` demands exact values: a database of another fidelity is not read, and what is computed stays in memory as
    long as this object. `progress` shows a bar in a terminal for what takes longer than a second.

    `keep` says what is stored of what is computed, where a call does not say otherwise. With `"auto"`, scores always
    are; keys, values and logits are where something follows or may follow, and else once they are asked for, or
    computed for the second time. `"all"` stores scores, logits and kv, `["scores"]` and the like only these.

    The model is used in evaluation mode; its training mode is restored after each call. Raises `PromptError` for names
    in place of objects, see `from_pretrained` and `bp.open`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        db: _Given = None,
        deterministic: bool = False,
        exact: bool = False,
        progress: bool = True,
        keep: _Keep = AUTO,
    ) -> None:
        if isinstance(model, str | PathLike) or isinstance(tokenizer, str | PathLike):
            raise PromptError(
                "a LanguageModel is made of a model and a tokenizer, not of their names",
                hint="Use LanguageModel.from_pretrained(name), or load both with transformers.",
            )
        self._build(
            GivenModel(model, tokenizer),
            _opened(db),
            deterministic=deterministic,
            exact=exact,
            progress=progress,
            keep=keep,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        db: _Given = None,
        deterministic: bool = False,
        exact: bool = False,
        progress: bool = True,
        keep: _Keep = AUTO,
        **arguments: Any,
    ) -> LanguageModel:
        """Return the model of that name or directory; `arguments` go to transformers' `from_pretrained`.

        If the database knows the ids of exactly these files, nothing is loaded until something must be computed.
        Raises `ModelMismatch` for a path at which no model is.
        """
        lm = cls.__new__(cls)
        database = _opened(db) or open_database()
        source = pretrained_model(
            str(name_or_path), arguments, model_metadata=database.model_metadata, checks_again=deterministic
        )
        lm._build(source, database, deterministic=deterministic, exact=exact, progress=progress, keep=keep)
        return lm

    def _build(
        self,
        source: ModelSource,
        db: Database | None,
        *,
        deterministic: bool,
        exact: bool,
        progress: bool,
        keep: _Keep,
    ) -> None:
        self.keep = keep
        self._source = source
        self._given_db = db
        self._exact = exact
        self._options = {"deterministic": deterministic, "progress": progress}

    @cached_property
    def db(self) -> Database:
        """The database; the default one is opened at the first use."""
        return self._given_db if self._given_db is not None else open_database()

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self._source, self._answering_db, unhealed=self._healer.unhealed, **self._options)

    @cached_property
    def _answering_db(self) -> Database:
        """The database that values come from: one in memory if this object demands exact values and `db` is lossy."""
        is_lossy = self.db.fidelity is not Fidelity.EXACT
        return open_database(MEMORY, namespace=self.namespace) if self._exact and is_lossy else self.db

    @cached_property
    def _keeper(self) -> Keeper:
        return Keeper(self._answering_db)

    @cached_property
    def _generations(self) -> GenerationMemory:
        from backprompt_db.compute.generations import GenerationMemory

        return GenerationMemory(self._answering_db)

    @cached_property
    def _healer(self) -> Healer:
        return Healer(self._source, self.db.model_metadata)

    @property
    def namespace(self) -> str:
        """The namespace of the database."""
        return self.db.namespace

    @property
    def keep(self) -> _Keep:
        """What is stored of what is computed, where a call does not say otherwise. May be set."""
        return self._keep

    @keep.setter
    def keep(self, keep: _Keep) -> None:
        given = keep if isinstance(keep, str) else tuple(keep)
        Keep.named(given)
        self._keep = given

    @property
    def model(self) -> Any:
        """The transformers model; loads it if it is not loaded."""
        return self._source.runner.model

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; loads it if it is not loaded."""
        return self._source.tokenizer.tokenizer

    @property
    def is_loaded(self) -> bool:
        """Whether the model's weights are in memory. A run of full hits does not load them."""
        return self._source.is_loaded

    @property
    def weights_id(self) -> WeightsId:
        """The weights id of the model as it is now."""
        return self._source.ids.weights_id

    @property
    def tokenizer_id(self) -> TokenizerId:
        """The id of the tokenizer as it is now."""
        return self._source.tokenizer_id

    @property
    def counters(self) -> ModelCounters:
        """What this object has done since it was made."""
        return self._engine.counters

    def text(
        self,
        string: str,
        *,
        start: int | None = None,
        eager: bool = False,
        split: int | None = None,
        seams: str | None = None,
    ) -> Text:
        """Return a text that runs on this model. Building it computes nothing, unless `eager`.

        `start` is an explicit position id for the first token. `split` cuts a long string into segments of about that
        many tokens, with exactly the tokens of the whole string, so that long strings with a common beginning share
        its representation; finding the cuts loads the tokenizer, unless the database remembers them.

        What is concatenated without branches has the tokens of the joined string, wherever it is cut (`seams="heal"`).
        With `seams="keep"` each piece has the tokens that it has alone, and with `"error"` a text is refused in which
        the two differ. Branches, and pieces with an explicit start, always keep their own tokens.

        Raises `InvalidText` for anything but a string without lone surrogates.
        """
        if split is None:
            return Text(string, self, start=start, eager=eager, seams=seams)
        first, *others = split_pieces(string, split, source=self._source, model_metadata=self.db.model_metadata)
        text = Text(first, self, start=start, seams=seams)
        for piece in others:
            text += piece
        return Text("", self, eager=eager) + text

    def chat(
        self, messages: Iterable[Mapping[str, Any]], *, add_generation_prompt: bool = True, **template_arguments: Any
    ) -> Text:
        """Return the text that the tokenizer's chat template makes of `messages`, dicts as transformers takes them.

        It is what `tokenizer.apply_chat_template(messages, tokenize=False, ...)` returns, with the same tokens, in
        segments that end where messages do, so that each turn of a conversation reuses those before it; what an
        assistant wrote is a segment of its own. `template_arguments` are those of `apply_chat_template`, such as
        `tools=`, `documents=` or `chat_template=`. Loads the tokenizer, not the model.

        Start tokens that the tokenizer puts before a prompt, and that the template does not write, are put there too.
        Raises `PromptError` without messages or a template, and where the template refuses the messages.
        """
        from backprompt_db.compute.splitting import chat_pieces

        text = Text("", self)
        for piece in chat_pieces(
            self._source.tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            template_arguments=template_arguments,
        ):
            text += piece
        return text

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is iterable
        self, texts: Text | str, *, keep: _Keep | None = ...
    ) -> ModelRepr: ...
    @overload
    def __call__(self, texts: Iterable[Text | str], *, keep: _Keep | None = ...) -> list[ModelRepr]: ...
    def __call__(
        self, texts: Text | str | Iterable[Text | str], *, keep: _Keep | None = None
    ) -> ModelRepr | list[ModelRepr]:
        """Return the representation of a text, or of each of several, computing only what is not stored.

        Shared prefixes are computed once, and what is missing in several texts is computed together. `keep` says what
        is stored of it, as in `LanguageModel`.

        Raises `PromptError` for an empty text, `ContextLengthExceeded` for one that is too long, before anything is
        computed, and `UnsupportedModel` for a model that cannot be cached and stay right.
        """
        if isinstance(texts, Text | str) or not isinstance(texts, Iterable):
            return self._run([texts], keep)[0]
        return self._run(list(texts), keep)

    def run(self, text: Text) -> ModelRepr:
        """Return the representation of one text; `text()` calls this."""
        return self._run([text], None)[0]

    def score(
        self, prompt: _Texts, completions: Iterable[Text | str], *, keep: _Keep | None = None
    ) -> npt.NDArray[np.float64]:
        """Return the log-probability of each completion given the prompt, summed over its tokens: [num_completions].

        For several prompts, the result is [num_prompts, num_completions] and everything missing is computed together.
        Only the scores of completions are kept; of the prompts' last pieces too, until they are needed again. `keep`
        says otherwise for all pieces of the prompts.

        It is the log-probability of prompt and completion less that of the prompt, each with the tokens of its joined
        string; without a token across the seam, that of the completion's own tokens. With one it may be above 0: a
        prompt that ends in a space, for instance, is unlikely where no word follows.

        Raises `PromptError` for an empty prompt or completion, and where nothing predicts the first token: where a
        completion directly follows parallel branches, or a token crosses from the first token of the prompt.
        """
        if isinstance(completions, str | Text):
            raise PromptError("completions is one text", hint="Give a list of completions.")
        completions = list(completions)
        if isinstance(prompt, str | Text):
            return self._score([prompt], completions, keep).reshape(len(completions))
        return self._score(list(prompt), completions, keep)

    @overload
    def best(  # type: ignore[overload-overlap]  # a str is iterable
        self,
        prompt: Text | str,
        completions: Iterable[Text | str],
        *,
        k: None = ...,
        bias: npt.ArrayLike | None = ...,
        normalize: str | npt.ArrayLike | None = ...,
        keep: _Keep | None = ...,
    ) -> Best: ...
    @overload
    def best(  # type: ignore[overload-overlap]  # a str is iterable
        self,
        prompt: Text | str,
        completions: Iterable[Text | str],
        *,
        k: int,
        bias: npt.ArrayLike | None = ...,
        normalize: str | npt.ArrayLike | None = ...,
        keep: _Keep | None = ...,
    ) -> list[Best]: ...
    @overload
    def best(
        self,
        prompt: Iterable[Text | str],
        completions: Iterable[Text | str],
        *,
        k: None = ...,
        bias: npt.ArrayLike | None = ...,
        normalize: str | npt.ArrayLike | None = ...,
        keep: _Keep | None = ...,
    ) -> list[Best]: ...
    @overload
    def best(
        self,
        prompt: Iterable[Text | str],
        completions: Iterable[Text | str],
        *,
        k: int,
        bias: npt.ArrayLike | None = ...,
        normalize: str | npt.ArrayLike | None = ...,
        keep: _Keep | None = ...,
    ) -> list[list[Best]]: ...
    def best(
        self,
        prompt: _Texts,
        completions: Iterable[Text | str],
        *,
        k: int | None = None,
        bias: npt.ArrayLike | None = None,
        normalize: str | npt.ArrayLike | None = None,
        keep: _Keep | None = None,
    ) -> Best | list[Best] | list[list[Best]]:
        """Return the likeliest completion of a prompt, or of each of several, without scoring all of them to the end.

        With `k`, a list of the `k` best, the best first, those of equal value in the order given. It is what sorting
        `bias + weight * lm.score(...)` gives, mostly from a fraction of the tokens: a completion is left as soon as
        enough others are better, whatever the rest of its tokens. What was learned is stored, and computed once.

        `bias` has a number for each completion, or a row of them for each prompt: minus what `score` says without the
        request calibrates. `normalize` says what a log-probability is divided by: `"tokens"` of the completion,
        `"bytes"` of its string, or an array of weights, above 0, by which it is multiplied. `keep` is as in `score`.

        Raises `PromptError` where `score` does, and for `k`, `bias` or `normalize` that do not fit.
        """
        if isinstance(completions, str | Text):
            raise PromptError("completions is one text", hint="Give a list of completions.")
        prompts = [prompt] if isinstance(prompt, str | Text) else list(prompt)
        results = self._best(
            prompts, list(completions), k=1 if k is None else k, bias=bias, normalize=normalize, keep=keep
        )
        several = results if k is not None else [best[0] for best in results]
        return several[0] if isinstance(prompt, str | Text) else several

    @overload
    def generate(self, prompt: Text | str, *, num_return_sequences: None = ..., **arguments: Any) -> Generated: ...
    @overload
    def generate(self, prompt: Text | str, *, num_return_sequences: int, **arguments: Any) -> list[Generated]: ...
    @overload
    def generate(
        self, prompt: Iterable[Text | str], *, num_return_sequences: None = ..., **arguments: Any
    ) -> list[Generated]: ...
    @overload
    def generate(
        self, prompt: Iterable[Text | str], *, num_return_sequences: int, **arguments: Any
    ) -> list[list[Generated]]: ...
    def generate(
        self,
        prompt: Text | str | Iterable[Text | str],
        *,
        max_new_tokens: int = 20,
        num_return_sequences: int | None = None,
        streamer: Any = None,
        store: bool = True,
        seed: int | None = None,
        keep: _Keep | None = None,
        **arguments: Any,
    ) -> Generated | list[Generated] | list[list[Generated]]:
        """Return what transformers' `generate` writes after a prompt, or after each of several, generated together.

        The prompt's keys and values come from the database; what is missing is computed and kept. `arguments` are those
        of `generate` that say which tokens are chosen, such as `do_sample`, `top_p`, `num_beams` or `stop_strings`; the
        result is what a plain call gives, with `seed` what it gives after `torch.manual_seed(seed)`.
        `num_return_sequences` gives a list for each prompt.

        What was generated before, with the same arguments and without random numbers or with a `seed`, is found
        again: nothing is loaded. What was cut short by `max_new_tokens` then is gone on with now.

        `streamer` is one of transformers', for a single prompt. Unless `store` is false, a continuation that is
        tokenised as it was generated is kept like any text. `keep` has the parts to keep of prompt and continuation.

        Raises `PromptError` for arguments that cannot be used here and for a prompt that ends in parallel branches,
        `ContextLengthExceeded` where prompt and `max_new_tokens` need more positions than the model has.
        """
        from backprompt_db.compute.generate_arguments import GenerateArguments, ended_at_errors

        with ended_at_errors(streamer) as stream:
            generate_arguments = GenerateArguments(
                max_new_tokens=plain_int(max_new_tokens),
                num_return_sequences=plain_int(num_return_sequences),
                streamer=stream,
                store=store,
                seed=plain_int(seed),
                others={name: plain_int(value) for name, value in arguments.items()},
            )
            prompts = [prompt] if isinstance(prompt, Text | str) else prompt
            results = self._generate(prompts, generate_arguments, keep)
        if num_return_sequences is not None:
            return results if prompts is prompt else results[0]
        firsts = [several[0] for several in results]
        return firsts if prompts is prompt else firsts[0]

    def adopt(
        self,
        text: Text | str,
        past_key_values: Any,
        *,
        logits: torch.Tensor | None = None,
        row: int | None = None,
        check: Check = "sample",
    ) -> Adopted:
        """Store keys and values of a text that you computed, once they have proven to be this model's for this text.

        `past_key_values` is a transformers `Cache` of exactly the text's tokens. If it has several rows, `row` is the
        text's, which may be padded on the left. The check computes the logits after the text, and they are stored too.
        With `logits` after every token, [T, vocab_size], all parts are stored. What was stored before stays as it is.

        `check="sample"` computes every token in the first layer; one token in 16 and the last one of each piece are
        computed in all layers, over the given keys and values before it. It can miss other tokens that are wrong in
        deeper layers alone, and their logits. `check="full"` computes everything, and stores its own scores and logits;
        a model that only runs chains is always checked so. Loads the model.

        Raises `ModelMismatch`, with the place of the error, for another model's or another text's keys and values,
        `PromptError` for a cache that has another number of tokens, has forgotten some, or has rows and no `row`, and
        `StoreReadOnly` where nothing may be stored.
        """
        from backprompt_db.compute.adopt.adopt import AdoptArguments, adopt

        if self._answering_db is not self.db:
            raise StoreReadOnly(
                f"this model demands exact values, and the database keeps them as {self.db.fidelity.value}",
                hint="Adopt into an exact database, or with a LanguageModel without exact=True.",
            )
        arguments = AdoptArguments(cache=past_key_values, logits=logits, row=row, check=check)
        return adopt(self._engine, self._source, self._healed([text])[0], arguments)

    def pin(self, texts: Text | str | Iterable[Text | str], *, label: str | None = None) -> None:
        """Protect texts, with all parts of all their segments, from eviction; what is missing is computed now.

        The command line can select the texts by `label`. Raises `StoreReadOnly` where nothing may be written, and
        `CatalogError` where there is no catalog, as in memory.
        """
        warm.pin(self._engine, self._answering_db, self._segments(texts), label=label)

    def unpin(self, texts: Text | str | Iterable[Text | str]) -> None:
        """Let texts be evicted again, including segments shared with others. Raises the same errors as `pin`."""
        warm.unpin(self._engine, self._answering_db, self._segments(texts))

    def plan(
        self, texts: _Texts, completions: _Texts | None = None, *, keep: _Keep | None = None, batch_size: int = 64
    ) -> RunPlan:
        """Return what `warm` with these arguments would find, compute, write and need. Printed, it is a table.

        Texts that are too long are listed. Nothing is computed or written. Loads the tokenizer, but not the weights;
        where everything is stored, neither.
        """
        from backprompt_db.compute.batch.forecast import forecast

        requests = self._requests(texts, completions, keep)
        return forecast(self._engine, self._source, self._answering_db, requests, batch_size=batch_size)

    def warm(
        self, texts: _Texts, completions: _Texts | None = None, *, keep: _Keep | None = None, batch_size: int = 64
    ) -> Warmed:
        """Compute and store the parts that running texts, or scoring completions after them, will need.

        `texts` may be an iterator over more than memory holds: `batch_size` texts are computed together. For segments
        of texts the parts `keep` are stored, for completions their scores. With `"auto"` it is what a run or `score`
        would store, and the logits after texts without completions. What is stored is skipped, so a run that was
        interrupted continues where it stopped. Texts that are too long are skipped and listed.

        Raises what `Database.flush` raises if something cannot be stored, and `StoreReadOnly` if nothing may be stored.
        """
        from backprompt_db.compute.batch.warm import Warmer

        requests = self._requests(texts, completions, keep)
        warmer = Warmer(self._engine, self._source, self._answering_db)
        return warmer.run(requests, batch_size=batch_size, progress=self._options["progress"])

    def seams(self, text: Text) -> list[Seam]:
        """Return the seams of a text that change tokens; see `Text.seams`."""
        return self._source.tokenizer.seams(self._own(text).segments(self.namespace))

    def explain(self, text: Text | str) -> Explanation:
        """Return what running a text would find, and what it would compute and why; see `Text.explain`."""
        return explain_run(self._answering_db, self._source, self._healed([text])[0])

    def vocabulary(self, tokenizer_id: TokenizerId) -> Vocabulary:
        """Return the tokens, as strings, of the tokenizer that has this id.

        They come from the catalog if it has them; else the tokenizer is loaded, but never the model. Raises
        `ModelMismatch` if the tokenizer has another id by now.
        """
        return vocabulary(self._answering_db, tokenizer_id, load=lambda: self._source.tokenizer)

    def past_key_values(self, text: Text, *, ids: ModelIds | None = None) -> Any:
        """Return a transformers `Cache` of a text's keys and values, on the model's device if it is loaded.

        Segments come in the order in which they were written. Keys and values that are not stored are computed and
        kept. With `ids`, raises `ModelMismatch` if the model or the tokenizer has another id by now.
        """
        from backprompt_db.compute.inference.kv_cache import KVShape, assemble

        if ids is not None and ids != self._source.ids:
            raise ModelMismatch("the model has changed since this was computed", hint="Run the text again.")
        parts = answers.past_key_values(self._engine, self._healed([text])[0])
        device = self._source.runner.device if self.is_loaded else None
        num_tokens = sum(arrays["keys"].shape[2] for arrays in parts)
        return assemble(KVShape.of(parts[0]), parts, capacity=num_tokens, device=device).cache()

    def logits_after(self, result: ModelRepr) -> Array:
        """Return the logits [vocab_size] after a result's text; they are computed and stored if nothing has them.

        Raises `ModelMismatch` if the model has changed since.
        """
        return answers.logits(self._engine, result)

    def seconds_for(self, num_tokens: int) -> float | None:
        """Return about how long computing so many tokens takes once the model is warm; None if nothing tells."""
        return self._engine.seconds_for(num_tokens, weights_id=self.weights_id)

    def _kept(self, keep: _Keep | None) -> Keep:
        return Keep.named(self._keep if keep is None else keep)

    def _run(self, texts: Sequence[Text | str], keep: _Keep | None) -> list[ModelRepr]:
        return answers.run(self._engine, self._keeper, self._healed(texts), keep=self._kept(keep))

    def _generate(
        self, prompts: Iterable[Text | str], arguments: GenerateArguments, keep: _Keep | None
    ) -> list[list[Generated]]:
        from backprompt_db.compute.generations import Generator

        generator = Generator(
            self._engine,
            self._source,
            self._generations,
            heal=lambda text: self._healed([text])[0],
            keep=self._kept(keep),
        )
        return generator.generate(self._healed(prompts), arguments)

    def _score(
        self, prompts: Sequence[Text | str], completions: Sequence[Text | str], keep: _Keep | None
    ) -> npt.NDArray[np.float64]:
        own = [self._own(prompt) for prompt in as_texts(prompts, what="prompt")]
        others = [completion.on(self) for completion in as_texts(completions, what="completion")]
        endings = self._healer.endings(own, others, namespace=self.namespace)
        scored = answers.scored(self._engine, self._keeper, endings, keep=self._kept(keep))
        return np.array([each.logprob for each in scored]).reshape(len(own), len(others))

    def _best(
        self, prompts: Sequence[Text | str], completions: Sequence[Text | str], *, k: Any, bias: Any, normalize: Any,
        keep: _Keep | None,
    ) -> list[list[Best]]:  # fmt: skip
        from backprompt_db.compute.best import Chooser, Ranking
        from backprompt_db.compute.encodings import Encodings

        own = [self._own(prompt) for prompt in as_texts(prompts, what="prompt")]
        others = [completion.on(self) for completion in as_texts(completions, what="completion")]
        if not others:
            raise PromptError("there are no completions", hint="Give at least one.")
        strings = [str(each) for each in others]
        ranking = Ranking.of(k=k, bias=bias, normalize=normalize, num_prompts=len(own), completions=strings)
        endings = self._healer.endings(own, others, namespace=self.namespace)
        each_prompt = [endings[begin : begin + len(others)] for begin in range(0, len(endings), len(others))]
        encodings = Encodings(self._source, self._answering_db.model_metadata)
        chooser = Chooser(self._engine, self._source, self._keeper, encodings, self._kept(keep))
        return [
            [Best(each.number, completions[each.number], each.value, each.logprob, each.num_tokens) for each in found]
            for found in chooser.choose(each_prompt, ranking)
        ]

    def _requests(self, texts: _Texts, completions: _Texts | None, keep: _Keep | None) -> Requests:
        return Requests.of(
            texts,
            completions,
            keep=self._kept(keep),
            namespace=self.namespace,
            own=self._own,
            healer=self._healer,
            keeper=self._keeper,
            addresses=self._engine.addresses,
        )

    def _healed(self, texts: Iterable[Text | str]) -> list[Healed]:
        """Return texts with the segments in which they are run."""
        return self._healer.heal([self._own(text) for text in as_texts(texts, what="prompt")], namespace=self.namespace)

    def _segments(self, texts: Text | str | Iterable[Text | str]) -> list[Segment]:
        """Return the segments of texts, each once, parents before children."""
        healed = self._healed([texts] if isinstance(texts, Text | str) else texts)
        return ancestry(tip for each in healed for tip in each.tips)

    def _own(self, text: Text | str) -> Text:
        """Return the text on this model. Raises `PromptError` for an empty text, or one on another model."""
        own = text if isinstance(text, Text) else Text(text)
        if not own:
            raise PromptError("the prompt is empty", hint="Give at least one character.")
        return own.on(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the model, where its representations are kept, and what it did."""
        counters = self.counters
        facts = {
            "model": self._source.name + ("" if self.is_loaded else " (not loaded)"),
            "database": str(self.db.directory or MEMORY),
            "namespace": self.namespace or "(default)",
            "passes": f"{counters.num_model_calls:,}",
            "tokens": f"{counters.num_computed_tokens:,} computed, {counters.num_cached_tokens:,} cached",
        }
        return html_text(grid(facts, name_style="bold"))

    def __repr__(self) -> str:
        state = "" if self.is_loaded else " (not loaded)"
        return f"<LanguageModel {visible(self._source.name)}{state} on {self._given_db or 'the default database'}>"


_models_of_pairs: weakref.WeakValueDictionary[tuple[int, int], LanguageModel] = weakref.WeakValueDictionary()


def language_model_of(model: Any, tokenizer: Any) -> LanguageModel:
    """Return the `LanguageModel` of a pair of objects on the default database; the same one as long as it is in use."""
    pair = id(model), id(tokenizer)
    lm = _models_of_pairs.get(pair)
    if lm is None:
        lm = _models_of_pairs[pair] = LanguageModel(model, tokenizer)
    return lm


def _opened(db: _Given) -> Database | None:
    """Return a database that is given as an object or by its place; None for the default one."""
    return open_database(db) if isinstance(db, str | PathLike) else db
