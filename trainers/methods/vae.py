"""Method `vae`: train a small Qwen-Image VAE on crops of collages; exported with the release's latent statistics."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from unipic_core.conditioning.images import to_images, to_tensor
from unipic_core.model.vae import ImageVAE, VAEConfig, channels_last
from unipic_core.weights.vae import video_weights

from ..config.methods import OptimizerConfig
from ..config.run import RunConfig, required
from ..data.picture_grid import picture_grid
from ..loop.export import Export
from ..loop.method import MAIN, Batch, Method, Share
from ..loop.metrics import Metrics
from ..nano.backgrounds import draw, sample_background
from ..nano.catalogue import Split
from ..nano.emoji import Bank
from ..roles.types import NamedParameters
from ..seeds import sample_generators
from .losses import vae_loss
from .vae_prior import PrincipalComponents, fold_statistics

SIDE = 128
STATISTICS_PICTURES = 512


@dataclass(frozen=True)
class Crops:
    """Batch of pictures [B, 3, crop, crop] in [-1, 1] at micro step `index`."""

    pictures: Tensor
    index: int
    name: str
    counts: bool = True

    def to(self, device: torch.device | str) -> Crops:
        return replace(self, pictures=self.pictures.to(device))


class VAETraining(Method):
    """Training of the 2-D VAE, which is exact for single pictures; exported in the video layout."""

    def __init__(self, config: RunConfig) -> None:
        self.options, self.config = required(config.vae), config
        self.loader_workers = self.options.loader_workers
        self.bank = Bank.open()
        print(self.bank.note)
        torch.manual_seed(config.seed)
        vae_config = VAEConfig(base_dim=self.options.base_dim, num_res_blocks=self.options.num_res_blocks)
        self.vae = channels_last(ImageVAE(vae_config))
        self.ema = copy.deepcopy(self.vae).requires_grad_(False).eval()
        self.share = Share()

    def place(self, device: torch.device, share: Share) -> None:
        self.share = share
        self.vae.to(device)
        self.ema.to(device)

    def updates(self, step: int) -> tuple[str, ...]:
        return (MAIN,)

    def trained(self, part: str) -> NamedParameters:
        return list(self.vae.named_parameters())

    def averaged(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.ema.parameters(), self.vae.parameters(), strict=True))

    def optimizer(self, part: str) -> OptimizerConfig:
        return self.config.optimizer

    @cached_property
    def collages(self) -> Collages:
        return Collages(self.bank, "train")

    @cached_property
    def components(self) -> PrincipalComponents | None:
        if self.options.prior == "normal":
            return None
        return PrincipalComponents(self._pictures("train", STATISTICS_PICTURES, seed=2), VAEConfig.z_dim)

    def batch(self, index: int) -> Batch[Crops]:
        """Draw the whole batch and take this process's share."""
        rng = np.random.default_rng([self.config.seed, index])
        crops = [random_crop(self.collages.picture(rng), self.options.crop, rng) for _ in range(self.config.batch_size)]
        share = crops[self.share.part(len(crops))]
        pictures = torch.stack([to_tensor(crop) for crop in share])
        return Batch.of_one(Crops(pictures, index, f"crops of micro step {index}"))

    def loss(self, part: str, batch: Crops) -> tuple[Tensor, Metrics]:
        pictures = batch.pictures.contiguous(memory_format=torch.channels_last)
        first = self.share.part(self.config.batch_size).start
        generators = sample_generators(self.config.seed, batch.index, len(pictures), first)
        decoded, mean, log_var = self.vae(pictures, generators)
        prior = (self.components(pictures), self.options.prior_std) if self.components else (0.0, 1.0)
        weights = {"l1_weight": self.options.l1_weight, "kl_weight": self.options.kl_weight}
        return vae_loss(pictures, decoded, mean, log_var, *prior, **weights)

    def preview(self) -> Image.Image:
        """Draw held-out pictures above their reconstructions."""
        pictures = self._pictures("heldout", 8, seed=0).to(self.ema.quant_conv.weight)
        decoded = self.ema.decode_raw(self.ema.posterior(pictures)[0])
        return picture_grid([to_images(pictures), to_images(decoded.clamp(-1, 1))], ["input", "decoded"])

    def exports(self) -> list[Export]:
        """`vae/` of a diffusers pipeline folder, bfloat16."""
        return [Export("vae", 0, self.export)]

    def export(self, folder: Path) -> None:
        save_vae(self.ema.cpu(), self._pictures("train", STATISTICS_PICTURES, seed=1), folder / "vae")

    def _pictures(self, split: Split, count: int, seed: int) -> Tensor:
        rng, collages = np.random.default_rng([self.config.seed, seed, 7]), Collages(self.bank, split)
        return torch.stack([to_tensor(collages.picture(rng)) for _ in range(count)])


class Collages:
    """Training pictures: a few assets over a drawn background, or one on a plain colour."""

    def __init__(self, bank: Bank, split: Split, backgrounds: int = 400) -> None:
        self.bank, self.assets = bank, (*bank.objects(split), *bank.persons(split))
        self.count = backgrounds
        self.drawn: dict[int, Image.Image] = {}

    def picture(self, rng: np.random.Generator) -> Image.Image:
        """Draw one collage, RGB, 128 x 128."""
        if rng.random() < 0.3:
            canvas = Image.new("RGB", (SIDE, SIDE), _pastel(rng) if rng.random() < 0.3 else (255, 255, 255))
            self._paste(canvas, rng, 0.85)
            return canvas
        canvas = self._background(int(rng.integers(self.count))).copy()
        for _ in range(int(rng.integers(1, 4))):
            self._paste(canvas, rng, rng.uniform(0.3, 0.75))
        return canvas

    def _background(self, index: int) -> Image.Image:
        if index not in self.drawn:
            self.drawn[index] = draw(sample_background(np.random.default_rng([11, index])), SIDE, SIDE)
        return self.drawn[index]

    def _paste(self, canvas: Image.Image, rng: np.random.Generator, share: float) -> None:
        sprite = self.bank.sprite(self.assets[int(rng.integers(len(self.assets)))])
        scale = share * SIDE / max(sprite.size)
        size = max(round(sprite.width * scale), 1), max(round(sprite.height * scale), 1)
        sprite = sprite.resize(size, reducing_gap=2)
        corner = (int(rng.integers(SIDE - sprite.width + 1)), int(rng.integers(SIDE - sprite.height + 1)))
        canvas.paste(sprite, corner, sprite)


def _pastel(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(170, 256, 3)
    return int(red), int(green), int(blue)


def random_crop(picture: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    """Crop a random square of `side` pixels."""
    left, top = int(rng.integers(picture.width - side + 1)), int(rng.integers(picture.height - side + 1))
    return picture.crop((left, top, left + side, top + side))


def save_vae(vae: ImageVAE, pictures: Tensor, folder: Path) -> None:
    """Write config.json and weights in diffusers' layout. pictures: to measure latent statistics on (vae_prior.py)."""
    vae = copy.deepcopy(vae)
    fold_statistics(vae, pictures)
    weights = {k: w.to(torch.bfloat16).contiguous() for k, w in video_weights(vae).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(vae.config.to_dict(), indent=2) + "\n", encoding="utf-8")
