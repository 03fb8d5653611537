"""What users ask: kinds of requests, each drawn from its seed and its number alone, whoever sends it and when.

    python -m loadtest.workloads --workload short_chat --seed 0 --count 100 > requests.jsonl

writes requests as JSON lines, for other clients to send the same.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer

from loadtest.lengths import (
    ALPACA_ANSWER,
    ALPACA_PROMPT,
    AZURE_CODE_ANSWER,
    AZURE_CODE_PROMPT,
    EDITED_CODE,
    FEW_SHOT_PREFIX_TOKENS,
    SHAREGPT_ANSWER,
    SHAREGPT_PROMPT,
    LogNormal,
)
from loadtest.prompts import code, prose

NUM_PREFIXES = 4
MIXED = "mixed"
_MIXTURE = {"short_chat": 50, "long_prompt": 15, "long_answer": 15, "shared_prefix": 10, "code_edit": 10}


@dataclass(frozen=True)
class LengthLimits:
    """In tokens; None: as drawn. `prompt` and `output` replace what is drawn, the maxima cut it."""

    prompt: int | None = None
    output: int | None = None
    max_prompt: int | None = None
    max_output: int | None = None


@dataclass(frozen=True)
class Prompt:
    """One request. `prompt_tokens` is what was aimed at: the server's tokenizer decides."""

    workload: str
    messages: tuple[dict[str, str], ...]
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """`write(draw, seed, num_tokens)` gives the messages, of about `num_tokens` tokens together."""

    description: str
    prompt: LogNormal
    output: LogNormal | None  # None: as long as the prompt
    write: Callable[[random.Random, int, int], tuple[dict[str, str], ...]]
    fixed_tokens: int = 0  # of each prompt, in front of what is drawn


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _ask(draw: random.Random, seed: int, num_tokens: int) -> tuple[dict[str, str], ...]:
    del seed
    return (_user(prose(draw, num_tokens)),)


def _ask_behind_prefix(draw: random.Random, seed: int, num_tokens: int) -> tuple[dict[str, str], ...]:
    number = draw.randrange(NUM_PREFIXES)
    prefix = prose(random.Random(f"{seed}/prefix/{number}"), FEW_SHOT_PREFIX_TOKENS)
    return {"role": "system", "content": prefix}, _user(prose(draw, max(1, num_tokens - FEW_SHOT_PREFIX_TOKENS)))


def _edit(draw: random.Random, seed: int, num_tokens: int) -> tuple[dict[str, str], ...]:
    del seed
    text, name = code(draw, num_tokens)
    return (_user(f"Rename `{name}` to `first_{name}`. Answer with the whole file.\n\n```python\n{text}\n```"),)


WORKLOADS = {
    "short_chat": Workload("a short question, a short answer", ALPACA_PROMPT, ALPACA_ANSWER, _ask),
    "long_prompt": Workload("much to read, little to say", AZURE_CODE_PROMPT, AZURE_CODE_ANSWER, _ask),
    "long_answer": Workload("a conversation's question, a long answer", SHAREGPT_PROMPT, SHAREGPT_ANSWER, _ask),
    "shared_prefix": Workload(
        f"one of {NUM_PREFIXES} system prompts of {FEW_SHOT_PREFIX_TOKENS} tokens, and a short question",
        ALPACA_PROMPT,
        ALPACA_ANSWER,
        _ask_behind_prefix,
        FEW_SHOT_PREFIX_TOKENS,
    ),
    "code_edit": Workload("a file to be returned with a name changed", EDITED_CODE, None, _edit),
}
WORKLOAD_NAMES = (*WORKLOADS, MIXED)


def draw_prompt(name: str, seed: int, index: int, limits: LengthLimits = LengthLimits()) -> Prompt:
    """Request number `index` of a workload; the same for the same arguments."""
    draw = random.Random(f"{seed}/{name}/{index}")
    if name == MIXED:
        name = draw.choices(list(_MIXTURE), weights=list(_MIXTURE.values()))[0]
    workload = WORKLOADS[name]
    prompt_tokens = workload.fixed_tokens + workload.prompt.draw(draw)
    output_tokens = workload.output.draw(draw) if workload.output is not None else prompt_tokens
    prompt_tokens = limits.prompt or min(prompt_tokens, limits.max_prompt or prompt_tokens)
    output_tokens = limits.output or min(output_tokens, limits.max_output or output_tokens)
    return Prompt(name, workload.write(draw, seed, prompt_tokens), prompt_tokens, output_tokens)


def main(
    workload: Annotated[str, typer.Option(help=" | ".join(WORKLOAD_NAMES))] = "short_chat",
    seed: Annotated[int, typer.Option(help="of all that is drawn")] = 0,
    count: Annotated[int, typer.Option(help="of requests")] = 100,
    output_tokens: Annotated[int | None, typer.Option(help="of each answer, in place of what is drawn")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(help="of each answer, at most")] = None,
) -> None:
    """Print requests as JSON lines, with the names that guidellm knows."""
    if workload not in WORKLOAD_NAMES:
        raise typer.BadParameter(f"{workload}: one of {', '.join(WORKLOAD_NAMES)}")
    limits = LengthLimits(output=output_tokens, max_output=max_output_tokens)
    for index in range(count):
        prompt = draw_prompt(workload, seed, index, limits)
        text = "\n\n".join(message["content"] for message in prompt.messages)
        row = {"prompt": text, "prompt_tokens_count": prompt.prompt_tokens, "output_tokens_count": prompt.max_tokens}
        print(json.dumps(row))


if __name__ == "__main__":
    typer.run(main)
