"""What every kind of model file boils down to before a `Tokenizer` is made of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import tokenizers
from tokenizers import processors


@dataclass(frozen=True)
class TokenizerParts:
    backend: tokenizers.Tokenizer  # its post-processor adds the special tokens that the model's files ask for
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # the tokenizer's own first
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # "bos_token" and the like, for chat templates
    chat_templates: Mapping[str, str] = field(default_factory=dict)  # by name


def bos_eos_processor(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> processors.TemplateProcessing:
    """Puts the given tokens (text, id) before and after every text."""
    single = [*([bos[0]] if bos else []), "$A", *([eos[0]] if eos else [])]
    return processors.TemplateProcessing(single=single, special_tokens=[token for token in (bos, eos) if token])
