"""What is recorded is what an engine launches. In a process of its own, since kernels are interpreted in this one."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json
from dataclasses import replace

import torch

from engine.config import CacheConfig, KVCacheDType, ModelConfig, Quantization, SchedulerConfig
from engine.precompile import recorded_kernels
from engine.precompile.gpus import GPUS

MODEL = ModelConfig("Qwen3ForCausalLM", 320, 64, 144, 3, 4, 2, 16, 1e-5, 2048, qkv_bias=True)
LIMITS = SchedulerConfig(max_num_seqs=20, token_budget=40, max_model_len=64)
FORMATS = {
    "plain": (MODEL, Quantization.NONE, KVCacheDType.AUTO),
    "int8": (replace(MODEL, qk_norm=True, tie_word_embeddings=True), Quantization.INT8, KVCacheDType.AUTO),
    "w8a8": (replace(MODEL, stored_quantization=Quantization.W8A8), Quantization.W8A8, KVCacheDType.INT8),
}


def record(name, layers=3, place="meta"):
    '''Names of kernels that nothing before it has launched.'''
    model, quantization, cache_dtype = FORMATS[name]
    recorded_kernels.NOWHERE = torch.device(place)
    kernels = recorded_kernels.engine_kernels(
        replace(model, num_layers=layers),
        GPUS["h100"],
        torch.bfloat16,
        quantization,
        CacheConfig(dtype=cache_dtype),
        LIMITS,
    )
    return [kernel.name for kernel in kernels]


class OnCPU(recorded_kernels.ShapesOnly):
    '''Tensors at real addresses, which begin at multiples of 64.'''

    def load(self, name):
        return torch.ones_like(super().load(name), device="cpu")


found = {name: record(name) for name in FORMATS}
recorded_kernels.ShapesOnly = OnCPU
print(json.dumps({"found": found, "at_addresses": [record(name, layers=5, place="cpu") for name in FORMATS]}))
"""


def test_recorded_kernels() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    recorded = json.loads(ended.stdout)
    found = recorded["found"]
    products = {"_norm_qkv_rope", "_product_residual", "_norm_gate_up_silu", "_norm_logits"}
    others = {
        "_step_inputs",
        "_further_inputs",
        "_worklist_kernel",
        "_embed_rows",
        "attention_kernel",
        "_score_chunks",
        "_choose",
    }
    rounding = {"_round_rows", "_store_kv_int8"}
    assert set(found["plain"]) == products | others
    assert products <= set(found["int8"]) <= products | others
    assert products | rounding <= set(found["w8a8"]) <= products | others | rounding
    # Where the number of rows makes a difference, every number of rows is there.
    assert all(found["plain"].count(name) >= 4 for name in products)
    # The same models at addresses, and deeper, launch nothing that was not launched before.
    assert recorded["at_addresses"] == [[], [], []]
