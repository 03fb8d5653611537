"""Writes the tokenizer of a GGUF file as the files that a Hugging Face directory has for it."""

import json
from pathlib import Path
from typing import Any

from engine.tokenizer.chat_template import DEFAULT_NAME
from engine.tokenizer.gguf_vocabulary import read_gguf_tokenizer


def save_gguf_tokenizer(path: Path, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `load_tokenizer` reads as the same tokenizer.

    Raises:
        ModelError: the file holds no tokenizer, or a malformed one.
    """
    parts = read_gguf_tokenizer(path)
    parts.backend.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = dict(parts.special_tokens)
    templates = [{"name": name, "template": template} for name, template in parts.chat_templates.items()]
    if list(parts.chat_templates) == [DEFAULT_NAME]:
        config["chat_template"] = parts.chat_templates[DEFAULT_NAME]
    elif templates:
        config["chat_template"] = templates
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
