"""The rule by which a prompt gets its engine replica: how much of it is cached there, and how much there is to do."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

# See docs/routing.md for the numbers that they come from.
TOKENS_PER_REQUEST = 128
HOME_REQUESTS = 4.0


@dataclass(frozen=True)
class Candidate:
    """A replica that may have a prompt."""

    replica_id: str
    num_requests: int  # that it has, running and waiting
    num_held_tokens: int = 0  # of the prompt's beginning


class Choice(StrEnum):
    """What decided."""

    PREFIX = "prefix"  # no replica has more of the prompt than the chosen one, which has some
    LOAD = "load"  # one has more, and too much to do
    NEW = "new"  # none has any


@dataclass(frozen=True)
class Placement:
    replica_id: str
    choice: Choice
    num_held_tokens: int  # of the prompt, in the chosen replica


@dataclass(frozen=True)
class PlacementRule:
    """The cheapest replica is chosen. Its cost is in tokens: `tokens_per_request` for each request that it has, less
    the tokens of the prompt that it need not compute.

    Of those that hold most, one is the prompt's *home*, by rendezvous hashing of the first block that none of them
    holds: other ingresses, which know other prompts, find the same one. It is let off `home_requests` of its requests.
    """

    block_size: int
    tokens_per_request: float = TOKENS_PER_REQUEST
    home_requests: float = HOME_REQUESTS

    def choose(self, candidates: Sequence[Candidate], chain: Sequence[bytes], rng: random.Random) -> Placement:
        """candidates: at least one. chain: of the prompt, see PrefixIndex; empty for one shorter than a block.

        It looks at five of them: the home, two of those that hold most of the prompt, and two of all. Looking at all
        would send whatever several ingresses have to the replica that was least busy when they last heard.
        """
        num_held = max(each.num_held_tokens for each in candidates)
        knowing = [each for each in candidates if each.num_held_tokens == num_held]
        few = [*two_of(knowing, rng), *two_of(candidates, rng)]
        home: Candidate | None = None
        if chain:
            first_unknown = chain[min(num_held // self.block_size, len(chain) - 1)]
            home = max(knowing, key=lambda each: _weight(each.replica_id, first_unknown))
            few.insert(0, home)

        def cost(each: Candidate) -> float:
            num_requests = each.num_requests - (self.home_requests if each is home else 0)
            return num_requests * self.tokens_per_request - each.num_held_tokens

        chosen = min(few, key=cost)
        if chosen.num_held_tokens < num_held:
            choice = Choice.LOAD
        else:
            choice = Choice.PREFIX if num_held else Choice.NEW
        return Placement(chosen.replica_id, choice, chosen.num_held_tokens)


class PlacementObserver(Protocol):
    """Called on the event loop: returns at once and never raises."""

    def on_placed(self, placement: Placement, num_streams: int) -> None:
        """A prompt of so many choices has its replica. Not called where prefixes do not count."""

    def on_moved(self, num_streams: int) -> None:
        """So many that had not begun have left a replica where they would have waited."""


class NoPlacementObserver:
    """Where nobody wants to know."""

    def on_placed(self, placement: Placement, num_streams: int) -> None: ...

    def on_moved(self, num_streams: int) -> None: ...


def two_of(candidates: Sequence[Candidate], rng: random.Random) -> Sequence[Candidate]:
    """The power of two choices: nearly as good as all, and ingresses with the same news do not all choose the same."""
    return rng.sample(candidates, 2) if len(candidates) > 2 else candidates


def _weight(replica_id: str, block: bytes) -> bytes:
    return hashlib.blake2b(block + replica_id.encode(), digest_size=8).digest()
