"""A miniature of the whole nano training: untrained folder, cache of a few samples; made once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainers.cache import build, load_image_vae
from trainers.config import CacheConfig, OptimizerConfig, RunConfig, SFTMethod
from trainers.data.emoji import SUBSET
from trainers.nano import write_folder
from trainers.vae import save_vae
from unipic_core.image_vae import ImageVAE, VAEConfig


@pytest.fixture(scope="session", autouse=True)
def subset_only():
    """Tests must pass with the vendored pictures alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIPIC_DATA", str(SUBSET))
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory, subset_only) -> RunConfig:
    folder: Path = tmp_path_factory.mktemp("nano")
    torch.manual_seed(0)
    vae = ImageVAE(VAEConfig(base_dim=4, num_res_blocks=1)).eval()
    save_vae(vae, torch.randn(4, 3, 64, 64), folder / "vae")
    write_folder(folder / "vae", folder / "init", seed=0, corpus_size=300)
    data = CacheConfig(folder=str(folder / "cache"), samples=48, samples_per_shard=24, workers=0)
    build(data, load_image_vae(folder / "init" / "vae"))
    model = str(folder / "init")
    options = SFTMethod(model=model, data=data, train_text_encoder=True, preview_samples=2, preview_steps=2)
    return RunConfig(
        method="sft",
        output=str(folder / "run"),
        options=options,
        steps=6,
        batch_size=4,
        save_every=2,
        sample_every=6,
        log_every=1,
        optimizer=OptimizerConfig(lr=1e-3, muon_lr=1e-2, warmup_steps=2),
    )


@pytest.fixture(scope="session")
def examples() -> Path:
    """The bundled pictures."""
    return Path(__file__).parents[1] / "pictures"


@pytest.fixture
def changed(run, tmp_path):
    """The run with other values, in an output folder of its own."""

    def change(options=None, **values):
        return replace(run, output=str(tmp_path / "run"), options=replace(run.options, **(options or {})), **values)

    return change
