"""Small vocabularies trained on the spot, and the files models ship them in."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

CORPUS = (
    "The lighthouse keeper wrote down the weather twice a day, and once more when the wind turned.",
    "Nobody reads the old logs, but the numbers in them are exact: 1013, 998, 1021, 977.",
    "def add(left: int, right: int) -> int:\n    return left + right\n\n\nprint(add(1, 2))",
    "Ünïcödé prüft man früh: naïve café, Straße, señor, kočka, żółw.",
    "Быстрая лиса прыгает через ленивую собаку, а собака спит.",
    "今日は天気がいいので、灯台まで歩きました。",
    "She said \"it's fine\", they'd said they'll go; we've   three   spaces and a\ttab.",
    "🎉 party 🎉 and a family 👩‍👩‍👧 on the beach 🏖️",
)
TEXTS = (
    "",
    " ",
    "hello",
    " hello",
    "  hello  world ",
    "The weather, again: 2024-05-17 at 07:30!",
    "12345 67 8 ٣٤٥ ½ Ⅷ x² 3.14159",
    "it's they'd WE'LL I'M you're she's 'twas 'S",
    "tabs\tand\r\nnewlines\n\n\n  and   runs    of spaces\u00a0\u3000\u2003end",
    'for i in range(10):\n\tif i % 2:\n\t\tprint(f"{i:>3}")  # odd\n',
    "naïve café Straße ÀÉÎõü ﬁ ﬂ e\u0301 a\u0308",
    "Привет, мир. Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया. สวัสดีชาวโลก",
    "今日は世界、你好世界，안녕하세요 세계",
    "🎉🏳️‍🌈👩‍👩‍👧‍👦🇫🇷 👍🏽 ok",
    "math: ∑∫√∞≠≤ → ⇒ • … — – “quoted” ‘single’ €£¥",
    "a\u200bb\u200dc\ufeffd \x00\x01\x7f",
    "camelCaseAndSCREAMING_SNAKE_CASE kebab-case-word http://example.org/a?b=c&d=e#f",
    '{"key": [1, 2.5e-3, null, true], "nested": {"a": "b\\n"}}',
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\u2581meta\u2581space \u0120 \u010a <0x41> <unk>",
    "𝕳𝖊𝖑𝖑𝖔 \U0001f9ff \U000e0041 \U0010ffff",
)
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level_backend(vocab_size: int = 420) -> tokenizers.Tokenizer:
    """Byte-level BPE with three special tokens in front and two whole, not special ones behind."""
    backend = tokenizers.Tokenizer.from_str(_byte_level_json(vocab_size))
    backend.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("two words", normalized=False)])
    return backend


@cache
def _byte_level_json(vocab_size: int) -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CHATML_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    text: str = backend.to_str()
    return text


@cache
def sentencepiece_bytes(**options: Any) -> bytes:
    """A trained `tokenizer.model`: BPE with byte fallback and Llama's rules unless `options` say otherwise."""
    written = io.BytesIO()
    defaults: dict[str, Any] = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.98,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=written, **(defaults | options)
    )
    return written.getvalue()


def sentencepiece_processor(serialized: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=serialized)


def write_gguf(path: Path, **entries: Any) -> Path:
    """A GGUF file without tensors. `__` in a name stands for a dot; numpy-free values of the obvious types."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in entries.items():
        key = name.replace("__", ".")
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level_entries(backend: tokenizers.Tokenizer, pre: str) -> dict[str, Any]:
    """GGUF entries of a byte-level tokenizer made by `byte_level_backend`."""
    state = json.loads(backend.to_str())
    ids = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=ids.__getitem__)
    added = {token["content"]: 3 if token["special"] else 4 for token in state["added_tokens"]}
    return {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": pre,
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__token_type": [added.get(token, 1) for token in tokens],
        "tokenizer__ggml__merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__eos_token_id": 2,
    }


def sentencepiece_entries(serialized: bytes) -> dict[str, Any]:
    """GGUF entries of a SentencePiece model, by the `sentencepiece` package."""
    processor = sentencepiece_processor(serialized)
    ids = range(processor.get_piece_size())

    def kind(index: int) -> int:
        if processor.is_unknown(index):
            return 2
        return 3 if processor.is_control(index) else 6 if processor.is_byte(index) else 1

    return {
        "tokenizer__ggml__model": "llama",
        "tokenizer__ggml__pre": "default",
        "tokenizer__ggml__tokens": [processor.id_to_piece(index) for index in ids],
        "tokenizer__ggml__scores": [processor.get_score(index) for index in ids],
        "tokenizer__ggml__token_type": [kind(index) for index in ids],
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__unknown_token_id": 0,
    }
