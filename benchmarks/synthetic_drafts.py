"""Draft models that are right as often as they are told to be.

Random weights agree about nothing, so acceptance has to be made up; what it costs to draft is real. Every draft is
computed, by a model of the shape in question, and then replaced: by the token that the target is known to choose, or
with a seeded coin by another one.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.batch import StepTokens
from engine.request import Request
from engine.runner.model_runner import LaunchedStep, ModelRunner
from engine.speculative.draft_model import DraftModel


@dataclass(frozen=True)
class Script:
    """outputs: what the target chooses behind each prompt, by the prompt. acceptance: the odds of a right draft."""

    outputs: Mapping[tuple[int, ...], Sequence[int]]
    acceptance: float
    vocab_size: int

    def draft(self, request: Request) -> int:
        """In place of what was chosen behind the request's tokens; the same whenever it is asked for there."""
        output = self.outputs[tuple(request.prompt_token_ids)]
        place = len(request.output_token_ids)
        right = output[place] if place < len(output) else 0
        draw = random.Random(f"{request.prompt_token_ids[:8]} {place}")
        if draw.random() < self.acceptance:
            return right
        return (right + 1 + draw.randrange(self.vocab_size - 1)) % self.vocab_size


class ScriptedRunner(ModelRunner):
    """Runs a draft model's steps, and says what the script says. Steps that run ahead go on from the model's own
    tokens, which changes nothing of the time that they take."""

    def __init__(self, runner: ModelRunner, script: Script) -> None:
        super().__init__(runner.forward, runner._sampler)
        self._script = script

    def read(self, launched: LaunchedStep) -> StepTokens:
        tokens = super().read(launched)
        return replace(tokens, token_ids=[self._script.draft(request) for request in launched.sampling])


def scripted(model: DraftModel, script: Script) -> DraftModel:
    """The model, which from now on follows the script."""
    model._runner = ScriptedRunner(model._runner, script)
    return model
