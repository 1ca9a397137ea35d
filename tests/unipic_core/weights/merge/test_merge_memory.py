"""Merging needs a few tensors of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.paths import ROOT, TINY
from unipic_core.model.config import MMDiTConfig
from unipic_core.weights.lora import save_lora
from unipic_core.weights.transformer import expected_shapes
from unipic_core.weights.write import write_safetensors

MEASURE = """
import sys
import torch
from unipic_core.weights.merge import merge

def status(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name + ":")) * 1024

torch.set_num_threads(1)
tiny, small, source, lora, out = sys.argv[1:]
merge(tiny, out + "/warm.safetensors", [(small, 1.0)], dtype="bf16")
for dst in ("/o.safetensors", "/model"):
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = status("VmRSS")
    merge(source, out + dst, [(lora, 1.0)], dtype="bf16")
    print(status("VmHWM") - before)
"""


def big_tensors(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        yield name, torch.full(shape, 0.25, dtype=torch.bfloat16)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_merging_needs_a_few_tensors_of_memory(tmp_path: Path, out: Path, lora: Path) -> None:
    shapes = expected_shapes(MMDiTConfig(num_layers=6, num_attention_heads=4, joint_attention_dim=512))
    source, large = tmp_path / "big.safetensors", tmp_path / "large.safetensors"
    write_safetensors(source, {n: (torch.bfloat16, s) for n, s in shapes.items()}, big_tensors(shapes), {})
    names = [
        n for n, s in shapes.items() if n.startswith("transformer_blocks.") and n.endswith("weight") and len(s) > 1
    ]
    save_lora(large, {n[:-7]: (torch.zeros(16, shapes[n][1]), torch.zeros(shapes[n][0], 16)) for n in names})
    biggest = 4 * max(torch.Size(shape).numel() for shape in shapes.values())
    assert source.stat().st_size > 100e6
    command = [sys.executable, "-c", MEASURE, str(TINY), str(lora), str(source), str(large), str(out)]
    # glibc would keep freed blocks of this size (not those of a 20B network), and they would be counted
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, cwd=ROOT, env=env)
    for peak in map(int, done.stdout.split()):
        assert peak < 5 * biggest + large.stat().st_size, (peak, biggest)
