"""Tokens as strings, out of the catalog alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import backprompt_db as bp
from backprompt_db.catalog.catalog import Catalog
from backprompt_db.catalog.records import TokenizerRecord
from backprompt_db.compute.tokens import SegmentTokenizer
from backprompt_db.database import vocabulary
from backprompt_db.database.vocabulary import Vocabulary, open_vocabulary, packed
from backprompt_db.prompt.ids import TokenizerId, tokenizer_id
from tests.conftest import CORPUS, train_tokenizer
from tests.support.catalogs import TOKENIZER, new_catalog, origin_of, stored

WORDS = st.sampled_from(["the", " quick", " fox", "\n", "  ", "endpoint", " GET", "é", "\N{MUSHROOM}", ".", "\u0301"])
TEXTS = st.lists(WORDS, max_size=30).map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Every string begins with a space, and what is unknown is spelled in bytes."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", *in_bytes], show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>")


def bert_like() -> PreTrainedTokenizerFast:
    """Lowercases, drops spaces and accents."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    pieces.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]")


def saved(catalog: Catalog, tokenizer: Any) -> TokenizerId:
    """Save a tokenizer as an engine does, and return its id."""
    known = SegmentTokenizer(tokenizer)
    catalog.save(TokenizerRecord(known.id, "name", "kind", len(tokenizer), packed(known.definition())))
    return known.id


def opened(catalog: Catalog, tokenizer: Any) -> Vocabulary:
    found = open_vocabulary(catalog, saved(catalog, tokenizer))
    assert found is not None
    return found


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with new_catalog(tmp_path / "catalog.sqlite") as opened:
        yield opened


MAKERS = [train_tokenizer, sentencepiece_like, bert_like]


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Vocabulary]:
    tokenizer = request.param()
    with new_catalog(tmp_path_factory.mktemp("vocabulary") / "catalog.sqlite") as catalog:
        return tokenizer, opened(catalog, tokenizer)


class TestPieces:
    @given(text=TEXTS)
    def test_they_join_to_the_text_and_there_is_one_for_each_token(
        self, kind: tuple[Any, Vocabulary], text: str
    ) -> None:
        tokenizer, known = kind
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = known.pieces(text, ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == (text if ids else "")

    def test_a_space_belongs_to_the_token_after_it(self, catalog: Catalog, tokenizer: PreTrainedTokenizerFast) -> None:
        text = "The quick  fox\n"
        pieces = opened(catalog, tokenizer).pieces(text, tokenizer(text)["input_ids"])
        assert pieces == tokenizer.batch_decode([[each] for each in tokenizer(text)["input_ids"]])
        assert " quick" in pieces

    def test_the_first_of_several_tokens_has_the_whole_character(
        self, catalog: Catalog, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        ids = tokenizer("\N{MUSHROOM}!")["input_ids"]
        assert opened(catalog, tokenizer).pieces("\N{MUSHROOM}!", ids) == ["\N{MUSHROOM}", "", "", "", "!"]

    def test_start_tokens_have_their_names(self, catalog: Catalog, tokenizer_with_bos: PreTrainedTokenizerFast) -> None:
        known = opened(catalog, tokenizer_with_bos)
        ids = tokenizer_with_bos("A prompt")["input_ids"]
        pieces = known.pieces("A prompt", ids)
        assert (pieces[0], "".join(pieces[1:])) == ("<s>", "A prompt")
        assert "".join(known.pieces("A prompt", ids[1:])) == "A prompt"

    def test_a_text_may_write_special_tokens_itself(self, catalog: Catalog, tokenizer: PreTrainedTokenizerFast) -> None:
        ids = tokenizer("<s>A prompt</s>")["input_ids"]
        pieces = opened(catalog, tokenizer).pieces("<s>A prompt</s>", ids)
        assert (pieces[0], pieces[-1], "".join(pieces)) == ("<s>", "</s>", "<s>A prompt</s>")

    def test_tokens_that_the_text_would_not_be_given_are_shown_one_by_one(self, kind: tuple[Any, Vocabulary]) -> None:
        tokenizer, known = kind
        ids = tokenizer("the lazy dog", add_special_tokens=False)["input_ids"]
        assert known.pieces("something else", ids) == [known.token(each) for each in ids]


class TestTokens:
    def test_the_space_that_a_token_begins_with_is_shown(self, kind: tuple[Any, Vocabulary]) -> None:
        tokenizer, known = kind
        first = tokenizer("the dog", add_special_tokens=False)["input_ids"][0]
        assert known.token(first).strip() in "the"
        assert "".join(map(known.token, tokenizer("a the dog", add_special_tokens=False)["input_ids"])).endswith(" dog")

    def test_parts_of_characters_and_special_tokens_have_names(
        self, catalog: Catalog, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        known = opened(catalog, tokenizer)
        part = tokenizer("\N{MUSHROOM}")["input_ids"][0]
        assert known.token(part) == tokenizer.convert_ids_to_tokens(part)
        assert known.token(0) == "<s>"

    @pytest.mark.parametrize("unknown", [10_000, 2**40, -1])
    def test_one_that_is_not_in_the_vocabulary_is_nothing(
        self, catalog: Catalog, tokenizer: PreTrainedTokenizerFast, unknown: int
    ) -> None:
        known = opened(catalog, tokenizer)
        assert known.token(unknown) == ""
        assert known.pieces("text", [unknown]) == [""]


class TestWhatTheCatalogKeeps:
    def test_what_nobody_has_saved_is_unknown(self, catalog: Catalog) -> None:
        assert open_vocabulary(catalog, TOKENIZER) is None
        catalog.record([stored(origin_of("text"))], at=1.0)
        assert open_vocabulary(catalog, TOKENIZER) is None
        assert not catalog.has_definition(TOKENIZER)

    def test_a_definition_under_another_id_is_none(self, catalog: Catalog, tokenizer: PreTrainedTokenizerFast) -> None:
        definition = packed(SegmentTokenizer(tokenizer).definition())
        catalog.save(TokenizerRecord(TOKENIZER, "forged", "", 1, definition))
        assert open_vocabulary(catalog, TOKENIZER) is None

    @pytest.mark.parametrize("damage", [lambda kept: kept[:-9], lambda kept: b"garbage", lambda kept: kept[:99] * 3])
    def test_a_damaged_definition_is_none(
        self, catalog: Catalog, tokenizer: PreTrainedTokenizerFast, damage: Callable[[bytes], bytes]
    ) -> None:
        known = SegmentTokenizer(tokenizer)
        catalog.save(TokenizerRecord(known.id, "", "", 1, damage(packed(known.definition()))))
        assert open_vocabulary(catalog, known.id) is None

    def test_a_definition_that_the_library_cannot_read_is_none(self, catalog: Catalog) -> None:
        definition = json.dumps({"start_ids": [], "split_special_tokens": False, "tokenizer": {"model": "new"}})
        catalog.save(TokenizerRecord(tokenizer_id(definition), "", "", 1, packed(definition)))
        assert open_vocabulary(catalog, tokenizer_id(definition)) is None

    def test_a_bomb_is_not_unpacked(self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
        bomb = "0" * 50_000_000
        name = tokenizer_id(bomb)
        catalog.save(TokenizerRecord(name, "", "", 1, packed(bomb)))
        monkeypatch.setattr(vocabulary, "MAX_NBYTES", 1_000_000)
        tracemalloc.start()
        assert open_vocabulary(catalog, name) is None
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
        tracemalloc.stop()
        assert packed(bomb) == b""

    def test_it_is_a_small_part_of_a_database(self, tokenizer: PreTrainedTokenizerFast) -> None:
        definition = SegmentTokenizer(tokenizer).definition()
        assert zlib.decompress(packed(definition)).decode() == definition
        assert len(packed(definition)) < len(definition) / 2


class TestDatabases:
    def test_a_database_knows_the_tokens_of_what_was_run_in_it(
        self, lm: bp.LanguageModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        lm("Pick the endpoint.")
        [record] = catalog_records(lm.db)
        found = open_vocabulary(lm.db.catalog, record.tokenizer_id)  # type: ignore[arg-type]
        assert found is not None
        assert "".join(found.pieces("Pick it.", tokenizer("Pick it.")["input_ids"])) == "Pick it."
        assert (record.kind, record.vocab_size) == (type(tokenizer).__name__, len(tokenizer))

    def test_one_that_older_code_has_written_learns_them_when_the_model_is_loaded(
        self, make_lm: Callable[..., bp.LanguageModel], open_db: Callable[..., bp.Database], tmp_path: Path
    ) -> None:
        with open_db(tmp_path / "db") as db:
            make_lm(db=db)("Pick the endpoint.")
            [record] = catalog_records(db)
            assert db.catalog is not None
            db.catalog.save(TokenizerRecord(record.tokenizer_id, record.name, record.kind, record.vocab_size))
        with open_db(tmp_path / "db") as db:
            lm = make_lm(db=db)
            lm("Pick the endpoint.")
            assert [found.definition for found in catalog_records(db)] == [None]
            lm("Something new.")
            assert catalog_records(db) == [record]

    def test_a_tokenizer_that_cannot_be_written_down_is_noted_once(
        self, make_lm: Callable[..., bp.LanguageModel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SegmentTokenizer, "is_fast", False)
        lm = make_lm()
        lm("Pick the endpoint.")
        [record] = catalog_records(lm.db)
        assert record.definition == b""
        assert lm.db.catalog is not None
        assert lm.db.catalog.has_definition(record.tokenizer_id)
        assert open_vocabulary(lm.db.catalog, record.tokenizer_id) is None

    def test_neither_torch_nor_transformers_is_imported_to_read_them(
        self, lm: bp.LanguageModel, tmp_path: Path
    ) -> None:
        lm("Pick the endpoint.")
        [record] = catalog_records(lm.db)
        assert lm.db.directory is not None
        script = (
            "import sys; from pathlib import Path\n"
            "from backprompt_db.database.opening import open_catalog\n"
            "from backprompt_db.database.vocabulary import open_vocabulary\n"
            f"with open_catalog(Path({str(lm.db.directory)!r})) as catalog:\n"
            f"    print(open_vocabulary(catalog, bytes.fromhex({record.tokenizer_id.hex()!r})).token(0))\n"
            "print({'torch', 'transformers'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
        assert done.stdout == "<s>\nset()\n"


def catalog_records(db: bp.Database) -> list[TokenizerRecord]:
    db.flush()
    assert db.catalog is not None
    return db.catalog.tokenizers()
