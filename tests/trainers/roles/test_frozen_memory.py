"""A frozen base in its stored forms: what is held in memory, where, and for how long."""

import subprocess
import sys
import weakref

import pytest
import torch

from tests.trainers.roles.stored_bases import FORMS, base, example, gradients, layers, roles, skip_without
from trainers.config.run import ConfigError
from trainers.roles.frozen import FrozenLinear
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.weights.transformer import CONFIG_KEY
from unipic_core.weights.write import write_safetensors


@pytest.fixture(scope="module")
def inputs():
    return example()


@pytest.mark.parametrize("kind", FORMS[1:])
def test_a_restored_copy_lives_for_one_product(kind, inputs, monkeypatch):
    made, seen = roles(kind), []
    restore = FrozenLinear.dequantised

    def recorded(self, device, dtype):
        assert not any(r() is not None for r in seen), "another restored weight is still there"
        weight = restore(self, device, dtype)
        if weight.data_ptr() != self.weight.data_ptr():
            seen.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(FrozenLinear, "dequantised", recorded)
    gradients(made, inputs)
    assert len(seen) > 150  # forward and backward


def test_nothing_of_a_swapped_block_moves_and_the_rest_does():
    swapped = base("fp8", block_swap=2)
    for name, module in layers(swapped).items():
        module.place(torch.device("meta"))  # any device that is not the main memory
        behind = name.startswith(("transformer_blocks.4.", "transformer_blocks.5."))
        assert (module.weight.device.type == "cpu") == behind, name
        assert module.scale is None or (module.scale.device.type == "cpu") == behind, name
        assert module.bias.device.type == "meta"
    with pytest.raises(ConfigError, match=r"block_swap must be at most the network's 6 blocks, got 7"):
        base(block_swap=7)


def test_placing_on_the_cpu_changes_nothing(inputs):
    made = roles("fp8", block_swap=3)
    before = gradients(made, inputs)[0]
    made.place(torch.device("cpu"))
    assert torch.equal(gradients(made, inputs)[0], before)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "nf4"])
def test_loading_needs_no_second_copy(kind, tmp_path):
    """Most memory of a process of its own: what is stored, and a few layers on their way."""
    skip_without(kind)
    sizes = MMDiTConfig(num_layers=4, num_attention_heads=8, joint_attention_dim=128)
    file = write_wide(tmp_path / "wide.safetensors", sizes)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(file), kind], check=True, capture_output=True, text=True, timeout=300
    )
    stored, peak = (int(n) for n in done.stdout.split()[-2:])
    largest = 6 * sizes.width**2 * 4  # the modulation, in float32
    assert stored < {"bf16": 1.02, "fp8": 0.52, "nf4": 0.32}[kind] * file.stat().st_size
    assert peak < stored + 8 * largest, (stored / 1e6, peak / 1e6)


PEAK = """
import sys
from pathlib import Path
import torch
from trainers.config.run import AdapterConfig, NetworkConfig
from trainers.roles.frozen import FrozenLinear, load_frozen
if sys.argv[2] == "nf4":
    import bitsandbytes

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

torch.set_num_threads(1)
before = status("VmRSS")
network = load_frozen(NetworkConfig(sys.argv[1], weights=sys.argv[2], adapter=AdapterConfig()))
held = [p for p in network.parameters()] + [b for b in network.buffers()]
print(sum(t.nbytes for t in held), status("VmHWM") - before)
"""


def write_wide(path, sizes):
    """A checkpoint of about 300 MB in bfloat16; its numbers do not matter."""
    import json

    network = MMDiT(sizes, device="meta").state_dict()
    described = {n: (torch.bfloat16, tuple(w.shape)) for n, w in network.items()}
    data = ((n, torch.randn(w.shape).mul_(0.02).bfloat16()) for n, w in network.items())
    write_safetensors(path, described, data, {CONFIG_KEY: json.dumps(sizes.to_dict())})
    return path
