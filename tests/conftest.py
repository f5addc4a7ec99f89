"""Fixtures that the tests share: a small tokenizer, tiny seeded models, databases in temporary directories."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from alembic import command
from alembic.config import Config
from hypothesis import HealthCheck, settings
from sqlalchemy import Connection
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import backprompt_db as bp
from backprompt_db.catalog.records import ModelRecord

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["BACKPROMPT_DB_VERDICTS"] = ""  # no verdict of another run decides here what is checked
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of children: the models are tiny, and threads wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell, also by all children
torch.set_num_threads(1)

ANY_PACE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("quick", ANY_PACE, max_examples=20, stateful_step_count=15)
settings.register_profile("exhaustive", ANY_PACE, max_examples=50, stateful_step_count=20)
settings.load_profile("quick")  # `--hypothesis-profile exhaustive` comes later and wins

VOCAB_SIZE = 600
CORPUS = [
    "Pick the endpoint for the request.\nGET /users lists users. POST /orders creates an order.\n",
    "Request: show me everyone who signed up this week\nEndpoint: GET /users\n",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n",
    "A prompt is built by plain concatenation. Every piece of text has one representation under one model.\n",
]


@pytest.fixture(scope="session", autouse=True)
def copied_schema() -> Iterator[None]:
    """New catalogs get the tables of the first one at once: to run every migration takes longer than most tests."""
    statements: list[str] = []

    def upgrade(config: Config, revision: str) -> None:
        connection = config.attributes.get("connection")
        if connection is None or tables(connection):
            migrate(config, revision)
        elif statements:
            for statement in statements:
                connection.exec_driver_sql(statement)
        else:
            migrate(config, revision)
            (found,) = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars()
            statements.extend([*tables(connection), f"INSERT INTO alembic_version VALUES ('{found}')"])  # noqa: S608

    migrate = command.upgrade
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(command, "upgrade", upgrade)
        yield


def tables(connection: Connection) -> list[str]:
    """The statements that make the tables and indexes which a catalog has."""
    statement = "SELECT sql FROM sqlite_master WHERE sql NOT NULL ORDER BY rowid"
    return list(connection.exec_driver_sql(statement).scalars())


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a small vocabulary, no start tokens."""
    return train_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_with_bos() -> PreTrainedTokenizerFast:
    """The same, with a BOS token before every prompt."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer()
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the small tokenizer; the result is always the same."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def tiny_gpt2(*, seed: int = 0, n_positions: int = 256) -> Any:
    """A seeded GPT-2 of 3 layers; its weights are large enough that wrong keys and values show."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=n_positions, n_embd=64, n_layer=3, n_head=4, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def gpt2() -> Any:
    """A tiny seeded GPT-2 that a test may change."""
    return tiny_gpt2()


@pytest.fixture
def open_db(tmp_path: Path) -> Iterator[Callable[..., bp.Database]]:
    """Open databases that are closed after the test; without a path, each time another new one."""
    opened: list[bp.Database] = []
    numbers = itertools.count()

    def open_one(path: Path | None = None, **options: Any) -> bp.Database:
        opened.append(bp.open(path or tmp_path / f"db{next(numbers)}", **options))
        return opened[-1]

    yield open_one
    for db in opened:
        db.close()


@pytest.fixture
def db(open_db: Callable[..., bp.Database]) -> bp.Database:
    """A new database."""
    return open_db()


@pytest.fixture(scope="session")
def proven(tmp_path_factory: pytest.TempPathFactory) -> ModelRecord:
    """What the self-check has found of the tiny GPT-2. It is found once: proving takes longer than most tests."""
    with bp.open(tmp_path_factory.mktemp("proven")) as db:
        bp.LanguageModel(tiny_gpt2(), train_tokenizer(), db=db)("a")
        assert db.catalog is not None
        (record,) = db.catalog.models()
        return record


@pytest.fixture
def lm(make_lm: Callable[..., bp.LanguageModel], db: bp.Database) -> bp.LanguageModel:
    """The tiny GPT-2 on a new database, proven."""
    return make_lm(db=db)


@pytest.fixture
def make_lm(
    gpt2: Any, tokenizer: PreTrainedTokenizerFast, open_db: Callable[..., bp.Database], proven: ModelRecord
) -> Callable[..., bp.LanguageModel]:
    """Make further language models: on the same tiny GPT-2, proven, and a new database unless given."""

    def make(model: Any = None, *, db: bp.Database | None = None, **options: Any) -> bp.LanguageModel:
        db = db or open_db()
        if model is None:
            db.model_metadata.save(proven)
        return bp.LanguageModel(model or gpt2, tokenizer, db=db, **options)

    return make


def cases(values: Iterable[Any], *, by_default: Container[Any]) -> list[Any]:
    """Parameters of a test, those that are not tested by default marked `exhaustive`."""
    return [pytest.param(each, marks=() if each in by_default else pytest.mark.exhaustive) for each in values]


def plain_logprobs(model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle: one plain forward pass. Returns the log-probability of each token [T] and the last logits."""
    with torch.no_grad():
        logits = model(input_ids[None]).logits[0].float()
    chosen = logits[:-1].log_softmax(-1).gather(1, input_ids[1:, None])[:, 0]
    return torch.cat([torch.tensor([torch.nan]), chosen]), logits[-1]
