"""Every format of a weight file loads with one copy of the network, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.paths import ROOT, TINY
from unipic_core.model.config import MMDiTConfig
from unipic_core.weights.convert import convert
from unipic_core.weights.formats.pickle_file import read_pickle
from unipic_core.weights.transformer import expected_shapes

SIZES = MMDiTConfig(num_layers=4, num_attention_heads=4, joint_attention_dim=512)

MEASURE = """
import sys, torch
from unipic_core.weights.transformer import load_transformer

def status(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name + ":")) * 1024

torch.set_num_threads(1)
tiny, large = sys.argv[1:]
load_transformer(tiny)
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
before = status("VmRSS")
model = load_transformer(large, dtype=torch.bfloat16)
total = sum(float(p.detach().reshape(-1)[::512].float().sum()) for p in model.parameters())
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()), total)
"""

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).bfloat16().mul_(0.05)
        for name, shape in expected_shapes(SIZES).items()
    }


def single(folder: Path, state: State) -> Path:
    save_file(state, folder / "m.safetensors", {"unipic_config": json.dumps(SIZES.to_dict())})
    return folder / "m.safetensors"


def pickled(folder: Path, state: State, **how: bool) -> Path:
    torch.save(state, folder / "diffusion_pytorch_model.bin", **how)
    (folder / "config.json").write_text(json.dumps(SIZES.to_dict()))
    return folder


def shards(folder: Path, state: State, suffix: str) -> Path:
    weight_map = {}
    for i in range(3):
        part, file = {n: state[n] for n in sorted(state)[i::3]}, f"m-{i}.{suffix}"
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"diffusion_pytorch_model.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(SIZES.to_dict()))
    return folder


FORMATS: dict[str, Callable[[Path, State], Path]] = {
    "safetensors": single,
    "scaled fp8": lambda d, s: convert(single(d, s), d / "fp8.safetensors", dtype="fp8_scaled"),
    "shards": lambda d, s: shards(d, s, "safetensors"),
    "zip": pickled,
    "stream": lambda d, s: pickled(d, s, _use_new_zipfile_serialization=False),
    "sharded zip": lambda d, s: shards(d, s, "bin"),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("form", FORMATS)
def test_one_copy(form: str, state: State, tmp_path: Path) -> None:
    path = FORMATS[form](tmp_path, state)
    command = [sys.executable, "-c", MEASURE, str(TINY / "transformer"), str(path)]
    # glibc would keep freed blocks of this size (not those of a 20B network), and they would be counted
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, size, total = map(float, done.stdout.split())
    assert size > 70e6
    assert 0.9 * size < peak < 1.15 * size + 8e6, (peak, size)
    want = sum(float(t.reshape(-1)[::512].float().sum()) for t in state.values())
    assert total == pytest.approx(want, abs=0.5 if form == "scaled fp8" else 1e-2)


@pytest.mark.parametrize("order", ["numbers", "letters"])
def test_records_in_either_order_lie_where_the_zip_says(order: str, tmp_path: Path) -> None:
    """PyTorch 2.6 and later write "0", "1", "10", "11", "2", ...; earlier ones by number."""
    state = {f"t{i}": torch.full((64,), float(i)) for i in range(24)}
    torch.save(state, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as old, zipfile.ZipFile(tmp_path / "b.bin", "w") as new:
        names = [info.filename for info in old.infolist()]
        data = [name for name in names if "/data/" in name]
        data.sort(key=lambda n: int(n.rpartition("/")[2]) if order == "numbers" else n)
        for name in (*(n for n in names if n not in data), *data):
            new.writestr(name, old.read(name))
    table = read_pickle(tmp_path / "b.bin")
    assert all(torch.equal(table[name].read(), tensor) for name, tensor in state.items())
    offsets = {name: spec.offset for name, spec in table.items()}
    by_number = sorted(offsets, key=lambda n: offsets[n]) == sorted(offsets, key=lambda n: int(n[1:]))
    assert by_number == (order == "numbers")
