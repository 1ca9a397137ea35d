"""Flow-matching fine-tuning of the network on cached latents, with the text encoder training along or frozen."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from unipic_core.attention import BACKENDS
from unipic_core.checkpoints import load_transformer, read_shift
from unipic_core.flow import add_noise
from unipic_core.guidance import guided_velocity
from unipic_core.images import to_images
from unipic_core.mmdit import MMDiT
from unipic_core.pipeline.text import EncoderInputs, TextEncoder
from unipic_core.recipe import Recipe
from unipic_core.samplers import sample_euler, seeded_noise
from unipic_core.schedules import base_times
from unipic_core.sequence import (
    LatentShape,
    PackedLatents,
    TextCond,
    pack_latents,
    pack_with_references,
    unpack_latents,
)

from .batches import BucketOrder
from .cache import Bucket, Compositions, encode_rows, load_image_vae, read_cache
from .config import RunConfig, SFTMethod
from .data.catalogue import Split
from .grid import picture_grid
from .loop import Metrics
from .losses import flow_matching_loss, logit_normal_times, sample_generators
from .nano import save_network
from .text_cache import encode_prompts, encoder_inputs

UNCOND_PROMPT = " "


@dataclass(frozen=True)
class Inputs:
    """One batch as the network takes it. x0 [B, N, 4C]; references: latents [B, C, h, w]; text: inputs or embeds."""

    x0: Tensor
    target: LatentShape
    references: tuple[Tensor, ...]
    text: EncoderInputs | TextCond

    def to(self, device: torch.device | str) -> Inputs:
        moved = {k: v.to(device) for k, v in self.text.items()} if isinstance(self.text, dict) else self.text.to(device)
        return replace(self, x0=self.x0.to(device), references=tuple(r.to(device) for r in self.references), text=moved)

    def pack(self, x_t: Tensor) -> PackedLatents:
        """The sequence with x_t [B, N, 4C] as its target."""
        samples = [[r[i][:, None] for r in self.references] for i in range(len(x_t))]
        return pack_with_references(x_t, self.target, samples)


class Student(nn.Module):
    """What trains, as one module: the network and, when it trains along, the text encoder."""

    def __init__(self, network: MMDiT, encoder: nn.Module | None) -> None:
        super().__init__()
        self.network = network
        self.encoder = encoder

    def forward(self, latents: PackedLatents, t: Tensor, text: TextCond) -> Tensor:
        return self.network(latents, t, text)


class SFTTraining:
    """Method `sft`."""

    loader_workers = 0

    def __init__(self, config: RunConfig) -> None:
        self.options: SFTMethod = config.options
        self.config = config
        self.folder = Path(self.options.model)
        self.text = TextEncoder.from_pretrained(self.folder, dtype=torch.float32)
        network = load_transformer(self.folder, dtype=torch.float32, attention=BACKENDS[self.options.attention])
        network.gradient_checkpointing = self.options.gradient_checkpointing
        encoder = self.text.network if self.options.train_text_encoder else None
        self.model: nn.Module = Student(network.requires_grad_(True).train(), encoder)
        if encoder is not None:
            encoder.requires_grad_(True)
            # padded and short sequences: faster than the fused kernel
            self.text.model.set_attn_implementation({"text_config": "eager"})
        self.shift = read_shift(self.folder)
        self.buckets = read_cache(self.options.data)
        sizes = {name: len(bucket) for name, bucket in self.buckets.items()}
        self.order = BucketOrder(sizes, config.batch_size, config.seed)
        folder = Path(self.options.data.folder)
        frozen = not self.options.train_text_encoder
        self.frozen_text = encode_prompts(self.text, self.buckets, folder) if frozen else None

    def to(self, device: torch.device) -> None:
        self.text.to(device)

    def batch(self, step: int) -> Inputs:
        name, rows = self.order[step]
        bucket = self.buckets[name]
        drop = np.random.default_rng([self.config.seed, step, 1]).random(len(rows)) < self.options.prompt_dropout
        return make_inputs(bucket, rows, self._text(name, bucket, rows, drop))

    def loss(self, batch: Inputs, step: int) -> tuple[Tensor, Metrics]:
        text = batch.text if isinstance(batch.text, TextCond) else self.text.forward(batch.text)
        generators = sample_generators(self.config.seed, step, len(batch.x0))
        options, tokens = self.options, batch.x0.shape[1]
        t = logit_normal_times(generators, tokens, options.t_mean, options.t_std, self.shift).to(batch.x0.device)
        eps = torch.stack([torch.randn(x.shape, generator=g) for x, g in zip(batch.x0, generators, strict=True)])
        eps = eps.to(batch.x0)
        v = self.model(batch.pack(add_noise(batch.x0, eps, t)), t, text)
        return flow_matching_loss(v, batch.x0, eps), {}

    def preview(self, ema: nn.Module) -> Image.Image:
        """Training and held-out scenes: the references, the truth, and a sample from fixed noise."""
        network, text = self._ema_parts(ema)
        vae = load_image_vae(self.folder / "vae")
        rows: list[list[Image.Image]] = [[], [], []]
        splits: tuple[tuple[Split, int], ...] = (("train", 3), ("heldout", 4))
        for split, seed in splits:
            scenes = Compositions(self.options.data, 0, self.options.preview_samples // 2, split, seed)
            for i in range(len(scenes)):
                row = scenes[i]
                (bucket,) = encode_rows(vae, [row]).values()
                options = self.options
                times = base_times(options.preview_steps, bucket.num_target_tokens, self.shift)
                x0 = sample_bucket(network, text, bucket, times.tolist(), options.preview_guidance, seed=i)
                column = (_strip(row.references), Image.fromarray(row.target), to_images(vae.decode(x0))[0])
                for cells, cell in zip(rows, column, strict=True):
                    cells.append(cell)
        return picture_grid(rows, ["references", "truth", "sample"])

    def export(self, ema: nn.Module, folder: Path) -> None:
        """A whole pipeline folder with the EMA weights in bfloat16; parts that did not train are copied."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer"))
        network, text = self._ema_parts(ema)
        save_network(network, folder / "transformer", torch.bfloat16)
        if self.options.train_text_encoder:
            shutil.rmtree(folder / "text_encoder")
            text.model.config.unipic_positions = text.positions
            text.model.bfloat16().save_pretrained(folder / "text_encoder")
        recipe = Recipe.read(folder) or Recipe()
        made = {**recipe.made, "method": "sft", "steps": self.config.steps, "seed": self.config.seed}
        (folder / "recipe.json").write_text(replace(recipe, made=made).to_json() + "\n")

    def _text(self, name: str, bucket: Bucket, rows: np.ndarray, drop: np.ndarray) -> EncoderInputs | TextCond:
        """Encoder inputs, or the frozen encoder's embeddings; those of dropped prompts are few and made when needed."""
        if self.frozen_text is None:
            prompts = [UNCOND_PROMPT if d else bucket.prompts[i] for i, d in zip(rows, drop, strict=True)]
            return encoder_inputs(self.text, bucket, rows, prompts)
        conds = [self.frozen_text[name][i] for i in rows]
        for i in np.flatnonzero(drop):
            with torch.no_grad():
                inputs = encoder_inputs(self.text, bucket, rows[i : i + 1], [UNCOND_PROMPT])
                conds[i] = self.text.forward(inputs).to("cpu")
        return TextCond.stack(conds)

    def _ema_parts(self, ema: nn.Module) -> tuple[MMDiT, TextEncoder]:
        assert isinstance(ema, Student)
        text = self.text
        if ema.encoder is not None:
            model = copy.deepcopy(text.model)
            model.model.load_state_dict(ema.encoder.state_dict())
            text = TextEncoder(model.eval(), text.tokenizer, text.image_processor, text.positions)
        return ema.network, text


def make_inputs(bucket: Bucket, rows: np.ndarray, text: EncoderInputs | TextCond) -> Inputs:
    """The samples `rows` of a bucket in float32."""
    index = torch.from_numpy(rows)
    target = bucket.target[index].float()
    shape = LatentShape(1, target.shape[-2] // 2, target.shape[-1] // 2)
    return Inputs(pack_latents(target), shape, tuple(r[index].float() for r in bucket.references), text)


def sample_bucket(
    network: MMDiT, text: TextEncoder, bucket: Bucket, times: Sequence[float], guidance: float, seed: int
) -> Tensor:
    """Latents [B, C, 1, h, w] of all samples of a bucket, by the base sampler from seeded noise."""
    rows = np.arange(len(bucket))
    inputs = make_inputs(bucket, rows, text.forward(encoder_inputs(text, bucket, rows, bucket.prompts)))
    inputs = inputs.to(next(network.parameters()).device)
    cond, uncond = inputs.text, None
    assert isinstance(cond, TextCond)
    if guidance != 1:
        uncond = text.forward(encoder_inputs(text, bucket, rows, [UNCOND_PROMPT] * len(rows)))

    def velocity(x_t: Tensor, t: float) -> Tensor:
        return guided_velocity(network, inputs.pack(x_t), t, cond, uncond, guidance)

    noise = seeded_noise(inputs.x0.shape, seed)(0).to(inputs.x0)
    return unpack_latents(sample_euler(velocity, noise, times), inputs.target).cpu()


def _strip(pictures: tuple[np.ndarray, ...], side: int = 128) -> Image.Image:
    """All references of a sample in one square cell."""
    columns = 1 if len(pictures) == 1 else 2 if len(pictures) <= 4 else 3
    cell = side // columns
    strip = Image.new("RGB", (side, side), "white")
    for i, picture in enumerate(pictures):
        strip.paste(Image.fromarray(picture).resize((cell, cell)), (i % columns * cell, i // columns * cell))
    return strip
