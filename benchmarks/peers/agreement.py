"""Whether peers answer alike: greedy answers to a few questions, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.peers.workload import Client
from engine.tokenizer import Tokenizer

QUESTIONS = (
    "What is gravity?",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
)
ANSWER_TOKENS = 32
SAME_NUMBERS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of GGUF files, and what others call it
REFERENCE = "slipstream"


@dataclass(frozen=True)
class Answers:
    """To QUESTIONS, and how many tokens each question had by the server's count."""

    texts: tuple[str, ...]
    prompt_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Agreement:
    """Of a peer with another one. mean_tokens: from the beginning, alike; of mean_of."""

    title: str  # of the other one
    num_equal: int
    num_answers: int
    mean_tokens: float
    mean_of: float

    def __str__(self) -> str:
        if self.num_equal == self.num_answers:
            return f"all {self.num_answers} answers"
        return f"{self.num_equal} of {self.num_answers}, {self.mean_tokens:.0f} of {self.mean_of:.0f} tokens"


def ask(client: Client) -> Answers:
    """Raises:
    OSError, ValueError: an answer is missing.
    """
    bodies = [client.answer([{"role": "user", "content": question}], ANSWER_TOKENS) for question in QUESTIONS]
    try:
        return Answers(
            tuple(str(body["choices"][0]["message"]["content"]) for body in bodies),
            tuple(int(body["usage"]["prompt_tokens"]) for body in bodies),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"an answer without {error}") from None


def compare(found: Answers, other: Answers, title: str, tokenizer: Tokenizer) -> Agreement:
    """Spaces at the ends do not count: some servers cut them off."""
    pairs = [
        tuple(tokenizer.encode_batch([text.strip(), reference.strip()], add_special_tokens=False))
        for text, reference in zip(found.texts, other.texts, strict=True)
    ]
    return Agreement(
        title=title,
        num_equal=sum(ours == theirs for ours, theirs in pairs),
        num_answers=len(pairs),
        mean_tokens=fmean(_num_alike(ours, theirs) for ours, theirs in pairs),
        mean_of=fmean(max(len(ours), len(theirs)) for ours, theirs in pairs),
    )


def reference_of(number_format: str, titles: Sequence[str]) -> str | None:
    """Slipstream in the same format, else in its first: which of `titles` (`peer:format`)."""
    same = f"{REFERENCE}:{SAME_NUMBERS.get(number_format, number_format)}"
    if same in titles:
        return same
    return next((title for title in titles if title.startswith(f"{REFERENCE}:")), None)


def _num_alike(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    count = 0
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            break
        count += 1
    return count
