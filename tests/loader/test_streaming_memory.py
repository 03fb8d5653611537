"""Streaming a checkpoint must not hold more of it than its largest tensor: measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import save_file

from tests.loader.files import write_config

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

ROWS, COLUMNS, NUM_TENSORS = 2560, 2048, 10  # 20 MiB each in float32, 200 MiB together
TENSOR_BYTES = ROWS * COLUMNS * 4

# Anonymous memory alone: pages of the mapped file are the page cache's, and the kernel takes them back at will.
SCRIPT = """
import sys, torch
from pathlib import Path
from engine.loader.checkpoint import open_checkpoint

def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
torch.ones(1).to(torch.bfloat16).sum().item()
checkpoint = open_checkpoint(Path(sys.argv[1]))
baseline, peak, checked = anonymous_bytes(), 0, 0.0
for name in checkpoint.tensors:
    loaded = checkpoint.load(name)
    checked += float(loaded.sum())
    peak = max(peak, anonymous_bytes())
    del loaded
print(peak - baseline, len(checkpoint.tensors), checked)
"""


def measure(path: Path) -> tuple[int, int, float]:
    """(most anonymous memory beyond the start's, number of tensors, sum of all elements)"""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=True, timeout=280
    )
    peak_bytes, num_tensors, checked = run.stdout.split()
    return int(peak_bytes), int(num_tensors), float(checked)


def test_safetensors_are_mapped(tmp_path: Path) -> None:
    tensors = {f"model.layers.{index}.mlp.up_proj.weight": torch.ones(ROWS, COLUMNS) for index in range(NUM_TENSORS)}
    save_file(tensors, write_config(tmp_path) / "model.safetensors")
    peak_bytes, num_tensors, checked = measure(tmp_path)
    assert num_tensors == NUM_TENSORS
    assert checked == ROWS * COLUMNS * NUM_TENSORS
    assert peak_bytes < TENSOR_BYTES // 2, "a mapped tensor takes no memory of its own"


def test_gguf_is_dequantised_one_tensor_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in (
        ("context_length", 512),
        ("embedding_length", COLUMNS),
        ("block_count", NUM_TENSORS),
        ("feed_forward_length", ROWS),
        ("attention.head_count", 16),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((2, COLUMNS), np.float32))
    block = np.concatenate([np.frombuffer(np.float16(1).tobytes(), np.uint8), np.ones(32, np.uint8)])
    stored = np.tile(block, (ROWS, COLUMNS // 32))  # Q8_0: every element is 1
    for index in range(NUM_TENSORS):
        writer.add_tensor(f"blk.{index}.ffn_up.weight", stored, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    peak_bytes, num_tensors, checked = measure(path)
    assert num_tensors == NUM_TENSORS + 1
    assert checked == ROWS * COLUMNS * NUM_TENSORS
    assert TENSOR_BYTES // 2 < peak_bytes < TENSOR_BYTES * 1.5
