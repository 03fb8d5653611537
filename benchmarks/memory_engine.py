"""One engine in a process of its own: what its plan says, and what it then takes. For benchmarks.memory.

An order as JSON on standard input, the outcome as JSON on standard output.
"""

import ctypes
import gc
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_runs import measure
from benchmarks.shapes import SHAPES, RandomCheckpoint
from engine.config import CacheConfig, Device, EngineConfig, KVCacheDType, Quantization, SchedulerConfig
from engine.llm_engine import LLMEngine
from engine.loader.checkpoint import Checkpoint, open_checkpoint
from engine.planning.card import card_of
from engine.planning.predict import predict_memory
from engine.request import SamplingParams
from engine.runner.memory import MemoryPlan
from engine.runner.start_up import Phase, Stage, StartUp

OUTPUT_TOKENS = 4


@dataclass(frozen=True)
class Order:
    """path: of a model; empty for random weights of a shape."""

    path: str
    shape: str
    device: Device
    quantization: Quantization
    kv_cache_dtype: KVCacheDType
    max_model_len: int
    max_num_seqs: int
    token_budget: int

    def checkpoint(self) -> Checkpoint:
        if self.shape:
            return RandomCheckpoint(SHAPES[self.shape], torch.device(self.device))
        return open_checkpoint(Path(self.path))

    def config(self) -> EngineConfig:
        limits = SchedulerConfig(self.max_num_seqs, self.token_budget, max_model_len=self.max_model_len)
        cache = CacheConfig(enable_prefix_caching=False, dtype=self.kv_cache_dtype)
        num_threads = 1 if self.device is Device.CPU else None  # more would take no more memory
        return EngineConfig(self.device, None, self.quantization, cache, limits, num_threads=num_threads)


def run(order: Order) -> dict[str, Any]:
    """{"predicted": bytes of each part, "measured": the same}. On a CPU only weights and KV cache can be told apart."""
    checkpoint, config = order.checkpoint(), order.config()
    on_gpu = order.device is Device.CUDA
    if on_gpu:
        torch.zeros(1, device="cuda")  # the context is there before anybody reads what is free
    else:
        torch.set_num_threads(1)
        torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))  # and so are the libraries' own buffers
    predicted = predict_memory(checkpoint.config, config, card_of(None if on_gpu else "cpu"))
    before = 0 if on_gpu else anonymous_bytes()
    start_up = WatchedStartUp() if not on_gpu else StartUp()
    engine = LLMEngine.from_checkpoint(checkpoint, config, start_up)
    assert start_up.memory is not None
    if isinstance(start_up, WatchedStartUp):
        measured = _on_cpu(engine, before, start_up.loaded_bytes)
    else:
        measured = _on_gpu(engine, start_up.memory, order)
    return {"predicted": parts_of(predicted), "measured": measured}


def parts_of(plan: MemoryPlan) -> dict[str, int]:
    """Of a plan, or, of an engine on a GPU that is ready, what its parts take."""
    fields = asdict(plan) | {"kv_cache_bytes": plan.kv_cache_bytes, "other_bytes": plan.other_bytes}
    kept = ("weights_bytes", "workspace_bytes", "sampler_bytes", "kv_cache_bytes", "graph_bytes", "other_bytes")
    return {name: fields[name] for name in (*kept, "free_bytes", "num_blocks")}


def anonymous_bytes() -> int:
    """Of this process's memory, without mapped files. Nothing that the C library only keeps for later."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


class WatchedStartUp(StartUp):
    """Reads the process's memory as soon as the weights are there. What loading has freed goes back to the system then:
    a KV cache on such pages would count as there before anybody has written it."""

    loaded_bytes = 0

    def _show_end(self, stage: Stage) -> None:
        if stage.phase is Phase.WEIGHTS:
            self.loaded_bytes = anonymous_bytes()


def _on_cpu(engine: LLMEngine, before: int, loaded: int) -> dict[str, int]:
    kv_cache = engine._runner.forward.kv_cache
    for tensor in (kv_cache._data, kv_cache._scales):
        if tensor is not None:
            tensor.fill_(0)  # pages cost nothing until they are written
    return {
        "weights_bytes": loaded - before,
        "kv_cache_bytes": anonymous_bytes() - loaded,
        "num_blocks": kv_cache.num_blocks,
    }


def _on_gpu(engine: LLMEngine, plan: MemoryPlan, order: Order) -> dict[str, int]:
    """The engine's own readings; what torch holds then; and what is left when every kind of step has been captured and
    one batch has been decoded."""
    held = {"reserved_bytes": torch.cuda.memory_reserved(), "allocated_bytes": torch.cuda.memory_allocated()}
    while engine.prepare_next():
        pass
    captured, _ = torch.cuda.mem_get_info()
    sampling = SamplingParams(temperature=0.0, seed=1, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    measure(engine, order.max_num_seqs, min(128, order.max_model_len - OUTPUT_TOKENS), OUTPUT_TOKENS, sampling)
    at_work, _ = torch.cuda.mem_get_info()
    return (
        parts_of(plan)
        | held
        | {
            "all_graph_bytes": plan.graph_bytes + max(0, plan.free_bytes - captured),
            "most_allocated_bytes": torch.cuda.max_memory_allocated(),
            "free_at_work_bytes": at_work,
        }
    )


def read_order(text: str) -> Order:
    fields = json.loads(text)
    kinds = {"device": Device, "quantization": Quantization, "kv_cache_dtype": KVCacheDType}
    return Order(**{name: kinds[name](value) if name in kinds else value for name, value in fields.items()})


if __name__ == "__main__":
    print(json.dumps(run(read_order(sys.stdin.read()))))
