"""From a model's path to its tokenizer."""

from pathlib import Path

from engine.errors import ModelError
from engine.tokenizer.chat_template import MAX_TEMPLATE_CHARS
from engine.tokenizer.gguf_vocabulary import read_gguf_tokenizer
from engine.tokenizer.huggingface_files import read_huggingface_tokenizer
from engine.tokenizer.tokenizer import Tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a model: a Hugging Face directory or a GGUF file.

    A chat template that does not compile is an error of the requests that use it, not of loading.

    Raises:
        ModelError: there is no tokenizer, or one that is malformed or not supported; file and field are named.
    """
    parts = read_huggingface_tokenizer(path) if path.is_dir() else read_gguf_tokenizer(path)
    for name, source in parts.chat_templates.items():
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(f"{path}: chat template {name!r}: is longer than {MAX_TEMPLATE_CHARS} characters")
        if not source.isascii() and any("\ud800" <= character <= "\udfff" for character in source):
            raise ModelError(f"{path}: chat template {name!r}: holds a lone surrogate")
    return Tokenizer(parts)
