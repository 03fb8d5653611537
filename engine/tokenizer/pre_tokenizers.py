"""How text is cut into words before byte-level BPE, by the name that a GGUF file gives in `tokenizer.ggml.pre`.

The names and what they stand for: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp. The patterns
are those of the models' own `tokenizer.json`; llama.cpp's are adapted to its regex engine.
"""

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PREFIX = r"[^\r\n\p{L}\p{N}]?"

_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_TEKKEN = rf"{_PREFIX}{_UPPER}*{_LOWER}+|{_PREFIX}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"


@dataclass(frozen=True)
class BPEFlavour:
    """What a `tokenizer.ggml.pre` name implies beside the vocabulary."""

    splits: tuple[str, ...] = ()  # patterns applied one after the other; none: GPT-2's word pattern
    single_digits: bool = False  # every digit is a word of its own, cut off before the pattern applies
    nfc: bool = False  # text is brought to Unicode normal form C first
    ignore_merges: bool = False  # a word that is in the vocabulary is that token, whatever the merges say
    add_bos: bool = False  # where the file does not say

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps += [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.splits]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.splits))
        return pre_tokenizers.Sequence(steps)

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)

FLAVOURS: dict[str, BPEFlavour] = {
    "default": BPEFlavour(splits=_DEFAULT),
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2"), BPEFlavour()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), BPEFlavour(single_digits=True)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3"), BPEFlavour(splits=(_LLAMA3,), ignore_merges=True, add_bos=True)
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), BPEFlavour(splits=(_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), BPEFlavour(splits=(_QWEN2,), nfc=True)),
    "stablelm2": BPEFlavour(splits=(_QWEN2,)),
    "tekken": BPEFlavour(splits=(_TEKKEN,), ignore_merges=True, add_bos=True),
}
