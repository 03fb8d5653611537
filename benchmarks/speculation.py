"""Speed with and without drafts, on random weights: `python -m benchmarks.speculation --shape tinyllama-1.1b`.

The acceptance is synthetic (see synthetic_drafts), and every figure says so.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.engine_runs import make_requests
from benchmarks.hardware import hardware_name
from benchmarks.shapes import SHAPES, RandomCheckpoint, ShapeName
from benchmarks.synthetic_drafts import Script, scripted
from engine.config import (
    DEFAULT_DRAFT_TOKENS,
    CacheConfig,
    Device,
    EngineConfig,
    KVCacheDType,
    Quantization,
    SchedulerConfig,
)
from engine.llm_engine import LLMEngine
from engine.request import Request, SamplingParams
from engine.speculative.draft_model import DraftModel
from engine.speculative.local import LocalProposer
from engine.speculative.ngram import NgramProposer
from engine.speculative.proposer import Proposer
from engine.speculative.speculation import Speculation

errors = Console(stderr=True)
CONNECT_S = 120.0  # a draft process compiles its kernels first


@dataclass(frozen=True)
class Setting:
    """What is compared, and on what."""

    shape: str
    draft_shape: str
    device: Device
    quantization: Quantization
    kv_cache_dtype: KVCacheDType
    input_tokens: int
    output_tokens: int
    max_num_seqs: int
    num_draft_tokens: int

    @property
    def max_draft_tokens(self) -> int:
        """Rows of a step."""
        return max(self.max_num_seqs, 64)

    def engine_config(self) -> EngineConfig:
        return EngineConfig(
            device=self.device,
            quantization=self.quantization,
            cache=CacheConfig(enable_prefix_caching=False, dtype=self.kv_cache_dtype, device_share=0.75),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_model_len=self.input_tokens + self.output_tokens,
                max_draft_tokens=self.max_draft_tokens,
            ),
        )

    def draft_model(self) -> DraftModel:
        """On the device, with a small share of its memory."""
        config = EngineConfig(
            device=self.device,
            cache=CacheConfig(device_share=0.1),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                token_budget=512,
                max_model_len=self.input_tokens + self.output_tokens,
            ),
        )
        checkpoint = RandomCheckpoint(SHAPES[self.draft_shape], torch.device(self.device))
        return DraftModel.from_checkpoint(checkpoint, config)


@dataclass(frozen=True)
class Row:
    """One way to decode one batch. Of `repeats` runs, the one with the median speed."""

    method: str
    num_draft_tokens: str
    synthetic_acceptance: float
    batch: int
    output_tokens_per_s: float
    ratio: float  # to exact mode, in the same process
    mean_acceptance_length: float
    drafted_share: float  # draft tokens a token of output
    equals_exact: bool
    hop_latency_s: float | None = None
    repeats: dict[str, list[float]] = field(default_factory=dict)  # the figures of each run


def decode(engine: LLMEngine, requests: list[Request]) -> float:
    """Output tokens a second, from the step after the last prefill."""
    for request in requests:
        engine.add(request)
    while any(not request.output_token_ids for request in requests):
        engine.step()
    before = sum(len(request.output_token_ids) for request in requests)
    started = perf_counter()
    while engine.has_work:
        engine.step()
    return (sum(len(request.output_token_ids) for request in requests) - before) / (perf_counter() - started)


def repeats_of(speeds: list[float]) -> dict[str, list[float]]:
    return {"output_tokens_per_s": speeds}


class Comparison:
    """Exact mode and speculation in one engine, in turns."""

    def __init__(self, setting: Setting, engine: LLMEngine) -> None:
        self.setting = setting
        self.engine = engine
        self.outputs: dict[tuple[int, ...], list[int]] = {}
        self.exact_speeds: dict[int, float] = {}

    def requests(self, batch: int, repeat: int) -> list[Request]:
        setting = self.setting
        sampling = SamplingParams(temperature=0.0, seed=1, max_tokens=setting.output_tokens, ignore_eos=True)
        return make_requests(self.engine, batch, setting.input_tokens, sampling, seed=1000 * batch + repeat)

    def exact(self, batch: int, repeats: int) -> Row:
        self.engine._speculation = None
        speeds = []
        for repeat in range(repeats):
            requests = self.requests(batch, repeat)
            speeds.append(decode(self.engine, requests))
            self.outputs |= {tuple(request.prompt_token_ids): request.output_token_ids for request in requests}
        self.exact_speeds[batch] = median(speeds)
        return Row("exact", "0", 0.0, batch, median(speeds), 1.0, 1.0, 0.0, True, repeats=repeats_of(speeds))

    def drafted(
        self,
        method: str,
        proposer: Proposer,
        num_draft_tokens: int,
        always: bool,
        acceptance: float,
        batch: int,
        repeats: int,
    ) -> Row:
        padded_sizes = self.engine._runner.forward.padded_sizes
        speculation = Speculation(
            proposer, num_draft_tokens, self.setting.max_draft_tokens, padded_sizes, always=always
        )
        self.engine._speculation = speculation
        decode(self.engine, self.requests(batch, 0))  # steps are timed, graphs captured
        speeds, equal, drafted, produced = [], True, 0, 0
        for repeat in range(repeats):
            requests = self.requests(batch, repeat)
            speeds.append(decode(self.engine, requests))
            equal &= all(self.outputs[tuple(r.prompt_token_ids)] == r.output_token_ids for r in requests)
            drafted += sum(request.num_drafted_tokens for request in requests)
            produced += sum(len(request.output_token_ids) for request in requests)
        stats = speculation.stats()
        return Row(
            method,
            str(num_draft_tokens) if always else f"up to {num_draft_tokens}",
            acceptance,
            batch,
            median(speeds),
            median(speeds) / self.exact_speeds[batch],
            stats.mean_acceptance_length,
            drafted / produced,
            equal,
            stats.remote.hop_latency_s if stats.remote else None,
            repeats_of(speeds),
        )


@contextmanager
def remote_proposer(setting: Setting, script: Script) -> Iterator[Proposer]:
    """Over a draft server in a process of its own, on the same device."""
    from serve_app.draft_client import RemoteProposer
    from serve_app.draft_transport import Endpoint

    order = {
        "setting": asdict(setting),
        "acceptance": script.acceptance,
        "outputs": [[list(prompt), list(output)] for prompt, output in script.outputs.items()],
    }
    command = [sys.executable, "-m", "benchmarks.speculation_draft"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            endpoint = Endpoint(process.stdout.readline().strip())
            proposer = RemoteProposer(
                lambda _: [endpoint], NgramProposer(), vocab_size=script.vocab_size, target_name="random weights"
            )
            if not proposer.wait_for_connection(CONNECT_S):
                raise RuntimeError("the draft process does not answer")
            yield proposer
            proposer.close()
        finally:
            process.kill()


def compare(
    setting: Setting, methods: list[str], sizes: list[int], acceptances: list[float], repeats: int
) -> list[Row]:
    """All of it, in one process and on one card."""
    checkpoint = RandomCheckpoint(SHAPES[setting.shape], torch.device(setting.device))
    local = setting.draft_model() if "local" in methods else None
    engine = LLMEngine.from_checkpoint(checkpoint, setting.engine_config())
    while engine.prepare_next():
        pass
    comparison = Comparison(setting, engine)
    rows = []
    for size in track(sizes, description="exact mode", console=errors, transient=True):
        rows.append(comparison.exact(size, repeats))
    for acceptance, method in product(acceptances, methods):
        script = Script(comparison.outputs, acceptance, checkpoint.config.vocab_size)
        with proposer_of(method, setting, script, local) as proposer:
            count = setting.num_draft_tokens
            kinds = list(product(sizes, ((count, True), (count, False), (DEFAULT_DRAFT_TOKENS, False))))
            for size, kind in track(kinds, description=f"{method}, {acceptance:g}", console=errors, transient=True):
                rows.append(comparison.drafted(method, proposer, *kind, acceptance, size, repeats))
    return rows


@contextmanager
def proposer_of(method: str, setting: Setting, script: Script, local: DraftModel | None) -> Iterator[Proposer]:
    if method == "remote":
        with remote_proposer(setting, script) as proposer:
            yield proposer
    else:
        assert local is not None
        yield LocalProposer(scripted(local, script))


def table_of(title: str, rows: list[Row]) -> Table:
    table = Table(title=title)
    for name in ("method", "drafts", "acceptance (synthetic)", "batch", "tok/s", "ratio", "tokens a round", "equal"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            row.num_draft_tokens,
            f"{row.synthetic_acceptance:g}" if row.method != "exact" else "",
            str(row.batch),
            f"{row.output_tokens_per_s:,.1f}",
            f"{row.ratio:.2f}",
            f"{row.mean_acceptance_length:.2f}",
            "yes" if row.equals_exact else "NO",
        )
    return table


def main(
    shape: ShapeName = "tinyllama-1.1b",
    draft_shape: ShapeName = "draft-4x512",
    methods: Annotated[str, typer.Option(help="local, remote, or both, separated by a comma")] = "local",
    batch: Annotated[str, typer.Option(help="batch sizes, separated by commas")] = "1,8,64",
    acceptance: Annotated[str, typer.Option(help="odds of a right draft, separated by commas")] = "0.8,0.6",
    num_draft_tokens: Annotated[int, typer.Option(help="in each step, and at most; beside the default")] = 4,
    input: Annotated[int, typer.Option(help="prompt tokens of each request")] = 128,
    output: Annotated[int, typer.Option(help="output tokens of each request")] = 256,
    device: Device = Device.CPU,
    quantization: Quantization = Quantization.NONE,
    kv_cache_dtype: KVCacheDType = KVCacheDType.AUTO,
    repeats: Annotated[int, typer.Option(help="runs of each; the median counts")] = 3,
    results: Annotated[Path, typer.Option(help="folder for the JSON file")] = Path("benchmarks/results"),
) -> None:
    """Decoding speed with drafts over that without, at a synthetic acceptance."""
    for name in methods.split(","):
        if name not in ("local", "remote"):
            raise typer.BadParameter(f"--methods are local and remote, not {name}")
    if SHAPES[shape].vocab_size != SHAPES[draft_shape].vocab_size:
        raise typer.BadParameter(f"{draft_shape} has another vocabulary than {shape}")
    sizes = [int(size) for size in batch.split(",")]
    setting = Setting(
        shape, draft_shape, device, quantization, kv_cache_dtype, input, output, max(sizes), num_draft_tokens
    )
    rows = compare(setting, methods.split(","), sizes, [float(odds) for odds in acceptance.split(",")], repeats)
    hardware = hardware_name(device)
    Console().print(table_of(f"{shape} with {draft_shape}, random weights, synthetic acceptance, {hardware}", rows))
    now = datetime.now(UTC)
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"speculation-{now:%Y%m%d-%H%M%S}.json"
    report = {"time": now.isoformat(timespec="seconds"), "torch": torch.__version__, "hardware": hardware}
    file.write_text(json.dumps(report | asdict(setting) | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    Console().print(f"written to {file}")


if __name__ == "__main__":
    typer.run(main)
