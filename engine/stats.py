"""What an engine reports about itself, for health checks, metrics and autoscaling."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SpeculationStats:
    """Drafts and what the target made of them; counters count from the engine's start."""

    num_rounds: int = 0  # verifications of one request's drafts
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0

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
    prefix_cache_queries: int = 0  # prompt tokens looked up
    prefix_cache_hits: int = 0  # of those, tokens found
    prompt_tokens: int = 0
    output_tokens: int = 0
    speculation: SpeculationStats | None = None  # None: off

    @property
    def kv_cache_usage(self) -> float:
        return self.num_blocks_in_use / self.num_blocks if self.num_blocks else 0.0
