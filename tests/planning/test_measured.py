"""What a CPU engine's plan says against the memory that its process then takes: the default model."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.memory import table_of
from benchmarks.memory_engine import Order, read_order
from engine.config import Device, KVCacheDType, Quantization

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

# (weights, KV cache, tokens of context). A tied head's second copy is 17 % of the bfloat16 weights, an int8 cache's
# scales are 6 %.
ENGINES = (
    (Quantization.NONE, KVCacheDType.INT8, 2048),
    (Quantization.W8A8, KVCacheDType.AUTO, 512),
)
TOLERANCE = 0.03  # buffers of the libraries and of the C library's allocator: 1 to 5 MB of some 200


def test_the_plan_is_what_is_taken(default_model_path: Path) -> None:
    orders = [
        Order(str(default_model_path), "", Device.CPU, *engine, max_num_seqs=4, token_budget=256) for engine in ENGINES
    ]
    command = [sys.executable, "-m", "benchmarks.memory_engine"]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in orders]
    try:
        rows = []
        for order, process in zip(orders, processes, strict=True):
            text = json.dumps(asdict(order))
            assert read_order(text) == order
            assert process.stdin is not None
            process.stdin.write(text)
            process.stdin.close()
        for order, process in zip(orders, processes, strict=True):
            assert process.stdout is not None
            outcome = json.loads(process.stdout.read())
            rows.append(asdict(order) | outcome)
            predicted, measured = outcome["predicted"], outcome["measured"]
            assert measured["num_blocks"] == predicted["num_blocks"] == 4 * order.max_model_len // 16 + 1
            for part in ("weights_bytes", "kv_cache_bytes"):
                assert measured[part] == pytest.approx(predicted[part], rel=TOLERANCE), (order, part)
        table = table_of("here", rows)
        assert [column.header for column in table.columns][3:] == ["weights, MiB", "kv_cache, MiB"]
        assert table.row_count == len(ENGINES)
    finally:
        for process in processes:
            process.kill()
            process.wait()
