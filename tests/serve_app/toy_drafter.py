"""A deterministic stand-in for a draft model, and requests that a target of the same kind would answer alike."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from engine.request import Request, SamplingParams
from engine.speculative.proposer import DraftOrder

VOCAB_SIZE = 1000


def next_token(token_ids: Sequence[int]) -> int:
    """What the target chooses; the drafter guesses right."""
    return (token_ids[-1] * 7 + len(token_ids)) % VOCAB_SIZE


def continuation(token_ids: Sequence[int], count: int) -> list[int]:
    tokens = list(token_ids)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(token_ids) :]


def make_request(name: str = "r", prompt: Sequence[int] = (1, 2, 3)) -> Request:
    return Request(name, list(prompt), SamplingParams(seed=1))


def advance(request: Request, count: int = 1) -> None:
    """The target chooses some tokens."""
    for token_id in continuation(request.token_ids(0, request.num_tokens), count):
        request.append_output(token_id)


def order(request: Request, num_draft_tokens: int = 3) -> DraftOrder:
    return DraftOrder(request, num_draft_tokens)


@dataclass
class _Mirror:
    accepted: list[int]
    drafts: list[int]
    num_wanted: int = 0
    is_read: bool = False


class ToyDrafter:
    """One draft a step for each mirror that lacks some; the step after opening reads the prompt.

    While `may_step` is not set, a step does not end.
    """

    def __init__(self, max_tokens: int = 10_000, vocab_size: int = VOCAB_SIZE) -> None:
        self.may_step = threading.Event()
        self.may_step.set()
        self.max_tokens = max_tokens
        self.mirrors: dict[str, _Mirror] = {}
        self.num_steps = 0
        self.num_checks = 0
        self.is_broken = False  # its books do not add up
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def open(
        self,
        key: str,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        sampling: SamplingParams,
        choice_index: int,  # noqa: ARG002 - draws nothing
    ) -> None:
        assert sampling.seed is not None
        self.mirrors[key] = _Mirror([*prompt_token_ids, *output_token_ids], [])

    def accept(self, key: str, num_tokens: int, token_ids: Sequence[int]) -> bool:
        mirror = self.mirrors.get(key)
        if mirror is None or num_tokens > len(mirror.accepted):
            return False
        new = list(token_ids[len(mirror.accepted) - num_tokens :])
        agrees = mirror.drafts[: len(new)] == new
        mirror.drafts = mirror.drafts[len(new) :] if agrees else []
        mirror.accepted += new
        return True

    def order(self, key: str, num_draft_tokens: int) -> None:
        self.mirrors[key].num_wanted = num_draft_tokens

    def branch(self, key: str, num_branches: int, num_draft_tokens: int) -> None:
        """It does without."""

    def drop(self, key: str) -> None:
        self.mirrors.pop(key, None)

    def _lacks(self, mirror: _Mirror) -> bool:
        has_room = len(mirror.accepted) + len(mirror.drafts) < self.max_tokens
        return not mirror.is_read or (has_room and len(mirror.drafts) < mirror.num_wanted)

    @property
    def has_work(self) -> bool:
        return any(map(self._lacks, self.mirrors.values()))

    def step(self) -> list[str]:
        self.num_steps += 1
        self.may_step.wait()
        grown = []
        for key, mirror in self.mirrors.items():
            if not mirror.is_read:
                mirror.is_read = True
            elif self._lacks(mirror):
                mirror.drafts.append(next_token(mirror.accepted + mirror.drafts))
                grown.append(key)
        return grown

    def drafts(self, key: str) -> tuple[int, list[int]]:
        mirror = self.mirrors[key]
        return len(mirror.accepted), list(mirror.drafts)

    def check_integrity(self) -> None:
        assert not self.is_broken, "a mirror's blocks are lost"
        self.num_checks += 1


class ScriptedProposer:
    """A fallback that proposes the same for everybody, and counts."""

    def __init__(self, drafts: Sequence[int] = ()) -> None:
        self.answer = list(drafts)
        self.forgotten: list[str] = []
        self.is_closed = False

    def may_propose(self, request: Request) -> bool:  # noqa: ARG002
        return bool(self.answer)

    def propose(self, orders: Sequence[DraftOrder], wait_s: float) -> Sequence[Sequence[int]]:
        assert wait_s == 0.0, "the time has been spent on the draft model"
        return [self.answer for _ in orders]

    def forget(self, request: Request) -> None:
        self.forgotten.append(request.request_id)

    def close(self) -> None:
        self.is_closed = True
