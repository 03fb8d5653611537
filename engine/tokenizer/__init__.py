"""Text to token ids and back, and chat messages to prompts."""

from engine.tokenizer.detokenizer import IncrementalDetokenizer
from engine.tokenizer.loading import load_tokenizer
from engine.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer", "load_tokenizer"]
