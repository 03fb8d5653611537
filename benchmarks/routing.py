"""`python -m benchmarks.routing`: what prefix-aware routing is worth, and what it costs in balance, simulated."""

import heapq
import itertools
import json
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, quantiles
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.autoscaling.service import CURVES, CurveName, ServiceCurve
from serve_app.placement import HOME_REQUESTS, TOKENS_PER_REQUEST, Candidate, PlacementRule
from serve_app.prefix_index import PrefixIndex

BLOCK_SIZE = 16
REPORT_S = 0.02  # how old an engine's number of requests may be: a few of its steps
DECODE_STEPS = 4  # that are simulated at once where no prompt is computed
WARM_UP = 0.2  # of the time, which is not counted


@dataclass(frozen=True)
class Traffic:
    """Conversations under a few system prompts, and prompts that have nothing in common."""

    system_prompts: int = 8
    system_tokens: int = 512
    turns: float = 5.0  # of a conversation, in the mean
    message_tokens: float = 64.0
    answer_tokens: float = 192.0
    pause_s: float = 2.0  # from an answer to the next turn
    unrelated: float = 0.4  # of the first turns, the part that is a prompt of its own
    unrelated_tokens: int = 512


@dataclass(eq=False)
class Turn:
    """One request. `chain` is that of its prompt; blocks are made up, and differ where tokens would."""

    chain: list[bytes]
    answer_tokens: int
    turns_left: int
    sent_s: float = 0.0
    ingress: int = 0
    to_compute: int = 0
    to_decode: int = 0
    first_s: float = 0.0


def blocks(tokens: float, rng: random.Random) -> list[bytes]:
    """New ones, that nobody has."""
    return [rng.randbytes(16) for _ in range(max(1, round(tokens / BLOCK_SIZE)))]


class Engine:
    """A replica: seats, a cache of the blocks used last, and steps that take what the curve says."""

    def __init__(self, curve: ServiceCurve, cache_blocks: int) -> None:
        self._curve = curve
        self.cache = PrefixIndex(BLOCK_SIZE, cache_blocks)
        self.waiting: deque[Turn] = deque()
        self.running: list[Turn] = []
        self.is_stepping = False
        self.prompt_tokens = self.cached_tokens = 0

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + len(self.running)

    def step_s(self) -> float:
        """Begins a step: takes in what there are seats for, and says how long it takes."""
        while self.waiting and len(self.running) < self._curve.max_num_seqs:
            turn = self.waiting.popleft()
            held = self.cache.num_held_blocks("", turn.chain)
            self.prompt_tokens += len(turn.chain) * BLOCK_SIZE
            self.cached_tokens += held * BLOCK_SIZE
            turn.to_compute = (len(turn.chain) - held) * BLOCK_SIZE + 1
            self.cache.record("", turn.chain)
            self.running.append(turn)
        streams = sum(not turn.to_compute for turn in self.running)
        budget, self._chunks = 2048, []
        for turn in self.running:
            if turn.to_compute and budget:
                chunk = min(budget, turn.to_compute)
                self._chunks.append((turn, chunk))
                budget -= chunk
        self._decodes = 1 if self._chunks else DECODE_STEPS
        return self._decodes * self._decode_s(streams) + sum(c for _, c in self._chunks) * self._curve.prompt_token_s

    def _decode_s(self, streams: int) -> float:
        if not streams:
            return 0.0
        points = list(zip(self._curve.streams, self._curve.tokens_per_s, strict=True))
        for (low, slow), (high, fast) in itertools.pairwise(points):
            if streams <= high:
                return streams / (slow + (fast - slow) * (streams - low) / (high - low))
        return streams / points[-1][1]

    def end_step(self, now_s: float) -> list[Turn]:
        """Returns the turns that have their whole answer."""
        for turn in self.running:
            if not turn.to_compute:
                turn.to_decode -= self._decodes
        for turn, chunk in self._chunks:
            turn.to_compute -= chunk
            if not turn.to_compute:
                turn.first_s, turn.to_decode = now_s, turn.answer_tokens
        done = [turn for turn in self.running if not turn.to_compute and turn.to_decode <= 0]
        self.running = [turn for turn in self.running if turn.to_compute or turn.to_decode > 0]
        return done


class Ingress:
    """What one ingress knows: its own requests at once, those of others as of the last report."""

    def __init__(self, engines: list[Engine], rng: random.Random, rule: PlacementRule | None) -> None:
        self.index = PrefixIndex(BLOCK_SIZE)
        self.own = [0] * len(engines)
        self.foreign = [0] * len(engines)
        self._engines, self._rng, self._rule = engines, rng, rule

    def hear(self) -> None:
        self.foreign = [engine.num_requests - own for engine, own in zip(self._engines, self.own, strict=True)]

    def choose(self, turn: Turn) -> int:
        busy = [own + foreign for own, foreign in zip(self.own, self.foreign, strict=True)]
        if self._rule is None:
            return min(self._rng.sample(range(len(busy)), min(2, len(busy))), key=busy.__getitem__)
        candidates = [
            Candidate(str(place), num_requests, self.index.num_held_blocks(str(place), turn.chain) * BLOCK_SIZE)
            for place, num_requests in enumerate(busy)
        ]
        place = int(self._rule.choose(candidates, turn.chain, self._rng).replica_id)
        self.index.record(str(place), turn.chain)
        return place


@dataclass
class Outcome:
    hit_rate: float
    imbalance: float  # requests of the busiest replica to the mean
    ttft_mean_s: float
    ttft_p99_s: float
    e2e_mean_s: float
    finished_per_s: float


@dataclass
class Simulation:
    curve: ServiceCurve
    traffic: Traffic
    num_engines: int
    num_ingresses: int
    first_turns_per_s: float  # for each engine
    duration_s: float
    rule: PlacementRule | None  # None: power of two choices
    cache_blocks: int = 16_384
    seed: int = 0
    _rng: random.Random = field(init=False)
    _events: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    _serial: Iterator[int] = field(default_factory=itertools.count)
    _imbalances: list[float] = field(default_factory=list)
    _done: list[tuple[Turn, float]] = field(default_factory=list)

    def run(self) -> Outcome:
        self._rng = random.Random(self.seed)
        self._systems = [blocks(self.traffic.system_tokens, self._rng) for _ in range(self.traffic.system_prompts)]
        self._engines = [Engine(self.curve, self.cache_blocks) for _ in range(self.num_engines)]
        self._ingresses = [Ingress(self._engines, self._rng, self.rule) for _ in range(self.num_ingresses)]
        self._at(0.0, self._arrive)
        self._at(0.0, self._report)
        while self._events:
            now_s, _, act = heapq.heappop(self._events)
            if now_s > self.duration_s:
                break
            act(now_s)
        return self._outcome()

    def _at(self, when_s: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._serial), act))

    def _arrive(self, now_s: float) -> None:
        rate = self.first_turns_per_s * self.num_engines
        self._at(now_s + self._rng.expovariate(rate), self._arrive)
        rng, traffic = self._rng, self.traffic
        if rng.random() < traffic.unrelated:
            self._send(Turn(blocks(rng.expovariate(1 / traffic.unrelated_tokens), rng), self._answer(), 0), now_s)
            return
        # Popular system prompts and rare ones: 1, 1/2, 1/3, ...
        [system] = rng.choices(self._systems, [1 / (place + 1) for place in range(len(self._systems))])
        turns_left = int(rng.expovariate(1 / max(1e-9, traffic.turns - 0.5)))
        self._send(Turn([*system, *self._message()], self._answer(), turns_left), now_s)

    def _message(self) -> list[bytes]:
        return blocks(self._rng.expovariate(1 / self.traffic.message_tokens), self._rng)

    def _answer(self) -> int:
        return 1 + int(self._rng.expovariate(1 / self.traffic.answer_tokens))

    def _send(self, turn: Turn, now_s: float) -> None:
        turn.sent_s, turn.ingress = now_s, self._rng.randrange(self.num_ingresses)
        ingress = self._ingresses[turn.ingress]
        place = ingress.choose(turn)
        ingress.own[place] += 1
        self._engines[place].waiting.append(turn)
        self._step(place, now_s)

    def _step(self, place: int, now_s: float) -> None:
        engine = self._engines[place]
        if not engine.is_stepping and engine.num_requests:
            engine.is_stepping = True
            self._at(now_s + engine.step_s(), lambda now_s: self._end_step(place, now_s))

    def _end_step(self, place: int, now_s: float) -> None:
        engine = self._engines[place]
        engine.is_stepping = False
        for turn in engine.end_step(now_s):
            self._end(turn, place, now_s)
        self._step(place, now_s)

    def _end(self, turn: Turn, place: int, now_s: float) -> None:
        ingress = self._ingresses[turn.ingress]
        ingress.own[place] -= 1
        whole = [*turn.chain, *blocks(turn.answer_tokens, self._rng)]
        self._engines[place].cache.record("", whole)
        ingress.index.record(str(place), whole)
        if now_s > WARM_UP * self.duration_s:
            self._done.append((turn, now_s))
        if turn.turns_left:
            following = Turn([*whole, *self._message()], self._answer(), turn.turns_left - 1)
            pause_s = self._rng.expovariate(1 / self.traffic.pause_s)
            self._at(now_s + pause_s, lambda now_s: self._send(following, now_s))

    def _report(self, now_s: float) -> None:
        self._at(now_s + REPORT_S, self._report)
        for ingress in self._ingresses:
            ingress.hear()
        busy = [engine.num_requests for engine in self._engines]
        if now_s > WARM_UP * self.duration_s:
            self._imbalances.append(max(busy) / max(1.0, fmean(busy)))
        elif now_s + REPORT_S > WARM_UP * self.duration_s:
            for engine in self._engines:
                engine.prompt_tokens = engine.cached_tokens = 0

    def _outcome(self) -> Outcome:
        ttfts = [turn.first_s - turn.sent_s for turn, _ in self._done]
        return Outcome(
            hit_rate=sum(e.cached_tokens for e in self._engines) / sum(e.prompt_tokens for e in self._engines),
            imbalance=fmean(self._imbalances),
            ttft_mean_s=fmean(ttfts),
            ttft_p99_s=quantiles(ttfts, n=100)[98],
            e2e_mean_s=fmean(end_s - turn.sent_s for turn, end_s in self._done),
            finished_per_s=len(self._done) / (self.duration_s * (1 - WARM_UP)),
        )


# First turns a second of each engine. A flood shares one long beginning.
TRAFFICS = {
    "conversations": (Traffic(), 30.0),
    "flood": (Traffic(system_prompts=1, system_tokens=2048, turns=1.0, unrelated=0.1), 40.0),
}
RULES: tuple[tuple[float, float] | None, ...] = (
    None,
    (1, 0),
    (32, 0),
    (TOKENS_PER_REQUEST, 0),
    (512, 0),
    (32, HOME_REQUESTS),
    (TOKENS_PER_REQUEST, HOME_REQUESTS),
    (TOKENS_PER_REQUEST, 2 * HOME_REQUESTS),
    (512, HOME_REQUESTS),
)


@dataclass(frozen=True)
class Case:
    traffic: str
    num_engines: int
    num_ingresses: int
    rule: tuple[float, float] | None  # tokens for a request, requests for a home; None: power of two choices

    def run(self, curve: CurveName, duration_s: float, seed: int) -> Outcome:
        traffic, rate = TRAFFICS[self.traffic]
        rule = None if self.rule is None else PlacementRule(BLOCK_SIZE, *self.rule)
        return Simulation(
            CURVES[curve], traffic, self.num_engines, self.num_ingresses, rate, duration_s, rule, seed=seed
        ).run()


def table_of(results: Sequence[tuple[Case, Outcome]]) -> Table:
    table = Table()
    names = ("traffic", "engines", "ingresses", "rule", "hits", "busiest", "TTFT", "p99", "end to end")
    for name in names:
        table.add_column(name, justify="left" if name in ("traffic", "rule") else "right")
    for case, outcome in results:
        rule = "power of two" if case.rule is None else f"{case.rule[0]:g} tokens, home {case.rule[1]:g}"
        table.add_row(
            case.traffic,
            str(case.num_engines),
            str(case.num_ingresses),
            rule,
            f"{outcome.hit_rate:.1%}",
            f"{outcome.imbalance:.2f}",
            f"{outcome.ttft_mean_s * 1e3:.1f} ms",
            f"{outcome.ttft_p99_s * 1e3:.0f} ms",
            f"{outcome.e2e_mean_s:.3f} s",
        )
    return table


cli = typer.Typer(add_completion=False)


@cli.command()
def main(
    traffics: Annotated[list[str] | None, typer.Option("--traffic", help="May be repeated; all if left out.")] = None,
    curve: Annotated[CurveName, typer.Option(help="What a replica does.")] = CurveName.TINYLLAMA_H100,
    engines: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated.")] = None,
    ingresses: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated.")] = None,
    duration_s: Annotated[float, typer.Option(min=1)] = 20.0,
    seed: int = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Simulate conversations, shared beginnings and unrelated prompts against measured service curves."""
    unknown = set(traffics or ()) - TRAFFICS.keys()
    if unknown:
        raise typer.BadParameter(f"{unknown.pop()} is none of {', '.join(TRAFFICS)}", param_hint="--traffic")
    cases = [
        Case(*case) for case in itertools.product(traffics or TRAFFICS, engines or (2, 8), ingresses or (1, 3), RULES)
    ]
    with ProcessPoolExecutor() as pool:
        futures = [pool.submit(case.run, curve, duration_s, seed) for case in cases]
        results = [(case, future.result()) for case, future in zip(cases, futures, strict=True)]
    Console(width=None if Console().is_terminal else 150).print(table_of(results))
    if json_path is not None:
        found = [asdict(case) | asdict(outcome) for case, outcome in results]
        json_path.write_text(json.dumps({"curve": curve, "seed": seed, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    cli()
