"""Tokenizers of every kind that models have, trained on a little text of many scripts; always the same ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind at all.\n\nReview: 3.5 of 10 stars!\n",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Любовь и мир.\n",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Καλημέρα κόσμε!\n",
    "敏捷的棕色狐狸跳过了懒狗。今天天气很好，我们去公园。\n",  # noqa: RUF001
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر.\n",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश।\n",
    "def add(left, right):\r\n    return left + right  # the sum\r\n\tif x == 1000000:\r\n        print(f'{x!r}')\n",
    "emoji 🙂👩‍👩‍👧 and   runs of    spaces \t tabs…  naïve café e\u0301te\u0301 ﬁn İstanbul 12345678 don't I'LL\n",
]
"""Six scripts, code with CR LF, emoji, runs of spaces, combining characters."""

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(*, add_prefix_space: bool = False, trim_offsets: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return _trained_bpe(made, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _llama_3() -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_LLAMA_3), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    made = _trained_bpe(made, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    return made


def _sentencepiece_bpe() -> Tokenizer:
    """Like that of Llama 2: no pre-tokeniser, a space before every text, bytes for what it does not know."""
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.add_special_tokens(["<unk>"])
    return _trained_bpe(made)


def _metaspace_bpe(scheme: str) -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _trained_bpe(made)


def _gemma() -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return _trained_bpe(made)


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=500, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    )
    return made


def _word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"], show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return made


def _with_added_tokens() -> Tokenizer:
    made = _byte_level()
    made.add_tokens(
        [
            AddedToken("<|im_end|>", special=True),
            AddedToken("<sep>", lstrip=True, rstrip=True),
            AddedToken("brown fox"),
            AddedToken("Review", single_word=True),
        ]
    )
    return made


def _normalising() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained_bpe(made, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _trained_bpe(made: Tokenizer, *, initial_alphabet: list[str] | None = None) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "<unk>"], initial_alphabet=initial_alphabet or [], show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


_KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "byte-level with a prefix space": lambda: _byte_level(add_prefix_space=True),
    "byte-level with trimmed offsets": lambda: _byte_level(trim_offsets=True),
    "Llama 3, with BOS": _llama_3,
    "sentencepiece BPE": _sentencepiece_bpe,
    "metaspace, always": lambda: _metaspace_bpe("always"),
    "metaspace, first": lambda: _metaspace_bpe("first"),
    "metaspace, never": lambda: _metaspace_bpe("never"),
    "Gemma": _gemma,
    "Unigram": _unigram,
    "WordPiece": _word_piece,
    "added tokens": _with_added_tokens,
    "normalising": _normalising,
}

KINDS = tuple(_KINDS)


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of one kind."""
    made = _KINDS[kind]()
    bos = "<s>" if made.token_to_id("<s>") is not None else None
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos)
