"""What is known of one request, and the times that follow from it."""

from dataclasses import dataclass, field
from typing import Any

UNFINISHED = "unfinished"  # the run ended first: not the server's error
DECIMALS = 5  # of a second, in files: 10 µs


@dataclass(slots=True)
class RequestRecord:
    """Times are seconds; `due_s` and `sent_s` since the epoch, `chunk_s` since `sent_s`."""

    workload: str
    due_s: float  # when it should have been sent; in a closed loop, when it was
    sent_s: float
    chunk_s: list[float] = field(default_factory=list)  # of each chunk that has text
    e2e_latency_s: float = 0.0  # to the end of the stream, or to the failure
    prompt_tokens: int | None = None
    output_tokens: int = 0
    is_usage: bool = False  # the tokens are those of the server's `usage`; else chunks were counted
    queue_time_s: float | None = None  # as the server reports it
    finish_reason: str = ""
    received_bytes: int = 0
    error: str = ""  # its kind; empty: answered

    @property
    def is_answered(self) -> bool:
        return not self.error

    @property
    def ended_s(self) -> float:
        return self.sent_s + self.e2e_latency_s

    @property
    def ttft_s(self) -> float | None:
        return self.chunk_s[0] if self.chunk_s else None

    @property
    def itl_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.chunk_s, self.chunk_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        """None for answers of one token."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.e2e_latency_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def send_delay_s(self) -> float:
        return self.sent_s - self.due_s

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "workload": self.workload,
            "due_s": round(self.due_s, DECIMALS),
            "sent_s": round(self.sent_s, DECIMALS),
            "chunk_s": [round(at_s, DECIMALS) for at_s in self.chunk_s],
            "e2e_latency_s": round(self.e2e_latency_s, DECIMALS),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "is_usage": self.is_usage,
            "queue_time_s": self.queue_time_s,
            "finish_reason": self.finish_reason,
            "received_bytes": self.received_bytes,
            "error": self.error,
        }
