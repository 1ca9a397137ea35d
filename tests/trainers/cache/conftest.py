"""A miniature of a pipeline folder, its models, and small sets to cache."""

from pathlib import Path

import pytest
import torch

from tests.trainers.cache.small_sets import write_rows
from trainers.cache import build, load_image_vae
from trainers.config.run import DataConfig, PreviewConfig
from trainers.methods.vae import save_vae
from trainers.nano.make_model import write_folder
from unipic_core.model.vae import ImageVAE, VAEConfig
from unipic_core.pipeline.text_encoder import TextEncoder


@pytest.fixture(scope="session")
def folder(tmp_path_factory, subset_only) -> Path:
    """An untrained miniature of a pipeline folder."""
    place = tmp_path_factory.mktemp("miniature")
    torch.manual_seed(0)
    vae = ImageVAE(VAEConfig(base_dim=4, num_res_blocks=1)).eval()
    save_vae(vae, torch.randn(4, 3, 64, 64), place / "vae")
    write_folder(place / "vae", place / "init", seed=0, corpus_size=200)
    return place / "init"


@pytest.fixture
def vae(folder) -> ImageVAE:
    return load_image_vae(folder / "vae")


@pytest.fixture(scope="session")
def text(folder) -> TextEncoder:
    return TextEncoder.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def nano(folder, text, tmp_path_factory) -> DataConfig:
    """A whole cache of the composition set, which no test changes."""
    place = str(tmp_path_factory.mktemp("nano-cache"))
    data = DataConfig(folder=place, samples=12, samples_per_shard=6, workers=0)
    build(data, load_image_vae(folder / "vae"), text, PreviewConfig(samples=3))
    return data


@pytest.fixture
def jsonl(tmp_path) -> DataConfig:
    path = write_rows(tmp_path / "set", 7)
    return DataConfig(
        folder=str(tmp_path / "cache"),
        kind="jsonl",
        path=str(path),
        size=96,
        reference_budget=64,
        samples_per_shard=3,
        workers=0,
    )
