"""A miniature of the whole nano training: untrained folder, cache of a few samples; made once."""

import itertools
import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.paths import PICTURES
from trainers.cache import build, load_image_vae
from trainers.config.run import SECTIONS, RunConfig, parse_run, required, to_dict
from trainers.loop.loop import train
from trainers.methods.vae import save_vae
from trainers.nano.emoji import SUBSET
from trainers.nano.make_model import write_folder
from unipic_core.model.vae import ImageVAE, VAEConfig
from unipic_core.pipeline.text_encoder import TextEncoder

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # of programs that tests start
torch.set_num_threads(1)  # tensors here are tiny, and two workers share the cores

BASIC = {f.name for f in fields(RunConfig)} - {name for names in SECTIONS.values() for name in names}


@pytest.fixture(scope="session", autouse=True)
def subset_only():
    """Tests must pass with the vendored pictures alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIPIC_DATA", str(SUBSET))
        yield


def fill_zeros(file: Path) -> None:
    """Small numbers for the matrices that start as zeros: over a frozen base that says 0 whatever comes in, no adapter
    would get a gradient."""
    weights = load_file(file)
    generator = torch.Generator().manual_seed(1)
    silent = [name for name, w in sorted(weights.items()) if w.ndim == 2 and not w.any()]
    assert {name.split(".")[0] for name in silent} == {"transformer_blocks", "norm_out", "proj_out"}
    for name in silent:
        weights[name] = torch.randn(weights[name].shape, generator=generator) * 0.05
    save_file(weights, file, {"format": "pt"})


@pytest.fixture(scope="session")
def run(tmp_path_factory, subset_only) -> RunConfig:
    """Network and text encoder together, from nothing."""
    folder: Path = tmp_path_factory.mktemp("nano")
    torch.manual_seed(0)
    vae = ImageVAE(VAEConfig(base_dim=4, num_res_blocks=1)).eval()
    save_vae(vae, torch.randn(4, 3, 64, 64), folder / "vae")
    model = folder / "init"
    write_folder(folder / "vae", model, seed=0, corpus_size=300)
    fill_zeros(model / "transformer" / "diffusion_pytorch_model.safetensors")
    config = parse_run(
        {
            "method": "sft",
            "output": str(folder / "run"),
            "steps": 6,
            "batch_size": 4,
            "save_every": 2,
            "sample_every": 6,
            "log_every": 1,
            "optimizer": {"lr": 1e-3, "muon_lr": 1e-2, "warmup_steps": 2},
            "network": {"model": str(model)},
            "data": {"folder": str(folder / "cache"), "samples": 48, "samples_per_shard": 24, "workers": 0},
            "preview": {"samples": 2, "steps": 2},
            "sft": {"train_text_encoder": True},
        }
    )
    text = TextEncoder.from_pretrained(model, dtype=torch.float32)
    build(required(config.data), load_image_vae(model / "vae"), text, config.preview)
    return config


@pytest.fixture(scope="session")
def examples() -> Path:
    """The bundled pictures."""
    return PICTURES


@pytest.fixture
def changed(run, tmp_path):
    """The run with other values and other options of its sections, in an output folder of its own."""

    def change(method="sft", sections=None, **values):
        data = {k: v for k, v in to_dict(run).items() if k in (*BASIC, *SECTIONS[method])}
        for name, options in (sections or {}).items():
            data[name] = {**data.get(name, {}), **options}
        return parse_run({**data, "method": method, "output": str(tmp_path / "run"), **values})

    return change


@pytest.fixture(scope="session")
def broken_off():
    """Trains until the nth batch, where it is interrupted, and then to the end; returns the export."""

    def run(config, make, after):
        method, asked = make(config), itertools.count()
        batch = method.batch

        def fails(index):
            if next(asked) == after:
                raise KeyboardInterrupt
            return batch(index)

        method.batch = fails
        with pytest.raises(KeyboardInterrupt):
            train(config, method)
        return train(config, make(config))

    return run


@pytest.fixture(scope="session")
def metrics():
    """Reads a run's records, without what differs from run to run."""

    def read(output) -> list[dict[str, float]]:
        lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
        unlike = ("seconds_per_step", "samples_per_second", "peak_memory_gib")
        return [{k: v for k, v in json.loads(line).items() if k not in unlike} for line in lines]

    return read
