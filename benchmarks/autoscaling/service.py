"""What a replica does, as measured, and how long it takes to start."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from serve_app.replica_counts import CPU_QUEUE_DEPTH, GPU_QUEUE_DEPTH_PER_SEQ


@dataclass(frozen=True)
class ServiceCurve:
    """Decoding speed by streams, and what a prompt costs beside it."""

    name: str
    streams: tuple[float, ...]  # at which the speed was measured, ascending, from 1
    tokens_per_s: tuple[float, ...]  # of all of them together
    prompt_token_s: float  # what each token of a prompt takes from decoding
    max_num_seqs: int
    target_queue_depth: float  # the service's default


# docs/performance.md: one H100, bfloat16. A step of 2,048 rows takes 14.5 ms, so a prompt's token 7.1 µs. Together they
# give 40,200 tokens/s for prompts of 512 and answers of 256, of which 39,154 were measured.
TINYLLAMA_H100 = ServiceCurve(
    "TinyLlama-1.1B on an H100",
    (1, 8, 32, 64, 256),
    (1_110, 8_547, 26_457, 46_914, 93_334),
    7.1e-6,
    256,
    GPU_QUEUE_DEPTH_PER_SEQ * 256,
)
# The same page: two cores. 128 tokens in take 0.26 s.
SMOLLM2_CPU = ServiceCurve("SmolLM2-135M on two cores", (1, 8, 32), (30, 193, 235), 2e-3, 256, CPU_QUEUE_DEPTH)


class CurveName(StrEnum):
    TINYLLAMA_H100 = "tinyllama-h100"
    SMOLLM2_CPU = "smollm2-cpu"


CURVES = {CurveName.TINYLLAMA_H100: TINYLLAMA_H100, CurveName.SMOLLM2_CPU: SMOLLM2_CPU}


@dataclass(frozen=True)
class Workload:
    """Every request; lengths of answers vary, with this mean."""

    prompt_tokens: float
    output_tokens: float


class Replica:
    """A curve under a workload: how fast requests leave it. Tabulated, for a simulation asks some 100,000 times."""

    def __init__(self, curve: ServiceCurve, workload: Workload) -> None:
        self.max_num_seqs = curve.max_num_seqs
        streams = np.arange(curve.max_num_seqs + 1)
        speed = np.interp(streams, (0, *curve.streams), (0, *curve.tokens_per_s))
        request_s = workload.output_tokens / speed[1:] + workload.prompt_tokens * curve.prompt_token_s
        token_time_s = request_s * streams[1:] / workload.output_tokens
        self._finished_per_s = [0.0, *(1 / request_s).tolist()]
        self._token_time_s = [0.0, *token_time_s.tolist()]

    def finished_per_s(self, streams: float) -> float:
        """Requests that leave a replica with `streams` running, between the table's whole numbers too."""
        low = int(streams)
        if low >= self.max_num_seqs:
            return self._finished_per_s[-1]
        below, above = self._finished_per_s[low], self._finished_per_s[low + 1]
        return below + (streams - low) * (above - below)

    def token_time_s(self, streams: float) -> float:
        """From one token of a stream to the next, prompts of others included."""
        return self._token_time_s[min(round(streams), self.max_num_seqs)]

    def streams_within(self, token_time_s: float) -> int:
        """The most whose tokens come no further apart; 1 if even its do."""
        return max(1, sum(time_s <= token_time_s for time_s in self._token_time_s[1:]))

    @property
    def capacity_per_s(self) -> float:
        """Requests, with every place taken."""
        return self._finished_per_s[-1]


@dataclass(frozen=True)
class Fleet:
    """Where replicas run. Nodes that are there already make a replica wait for its own start only."""

    num_nodes: int  # with room for one replica each
    start_s: float = 8.0
    join_s: float = 120.0  # of a further node, before the replica starts

    def start_time_s(self, num_replicas: int) -> float:
        """Of a replica that is the `num_replicas`-th."""
        return self.start_s if num_replicas <= self.num_nodes else self.join_s + self.start_s
