"""What an engine reports about itself, for health checks, metrics and autoscaling."""

from dataclasses import dataclass


@dataclass(slots=True)  # not frozen: its owner counts in it, and hands out copies
class RemoteStats:
    """How it goes with a draft model in another process; counters count from the engine's start. `is_connected` is as
    of the last round: an engine without requests does not look."""

    rounds: int = 0  # calls for drafts, whether the draft could be asked or not
    missed_rounds: int = 0  # of those, waited for in vain
    remote_proposals: int = 0  # orders that got drafts from the draft model
    fallback_proposals: int = 0  # orders that got some from the fallback
    garbage: int = 0  # malformed messages, and answers that cannot be meant
    reconnects: int = 0  # connections after the first
    hop_latency_s: float = 0.0  # moving average from sending a round to its first answer, where it was waited for
    last_hop_latency_s: float = 0.0
    is_connected: bool = False
    num_mirrors: int = 0  # of the draft, for all its engines
    draft_step_time_s: float = 0.0


@dataclass(frozen=True)
class SpeculationStats:
    """Drafts and what the target made of them; counters count from the engine's start."""

    num_rounds: int = 0  # verifications of one request's drafts
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    remote: RemoteStats | None = None  # None: the drafts come from the engine's own process

    @property
    def acceptance_rate(self) -> float:
        return self.num_accepted_tokens / self.num_drafted_tokens if self.num_drafted_tokens else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a round brings, with the one that the target chooses behind the accepted drafts."""
        return 1 + self.num_accepted_tokens / self.num_rounds if self.num_rounds else 1.0


@dataclass(frozen=True)
class EngineStats:
    """A snapshot; counters count from the engine's start."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    num_blocks: int = 0  # usable blocks of the pool
    num_blocks_in_use: int = 0  # held by requests; cached but idle blocks are free
    num_steps: int = 0
    step_time_s: float = 0.0  # moving average
    num_preemptions: int = 0
    num_integrity_checks: int = 0  # times that every block was found to be accounted for; else the engine ends
    prefix_cache_queries: int = 0  # prompt tokens looked up
    prefix_cache_hits: int = 0  # of those, tokens found
    prompt_tokens: int = 0
    output_tokens: int = 0
    speculation: SpeculationStats | None = None  # None: off

    @property
    def kv_cache_usage(self) -> float:
        return self.num_blocks_in_use / self.num_blocks if self.num_blocks else 0.0
