"""Base of the methods that train the network: roles, cached batches, noise, previews and exports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unipic_core.conditioning.sequence import TextCond, unpack_latents
from unipic_core.model.vae import ImageVAE
from unipic_core.pipeline.text_encoder import TextEncoder
from unipic_core.run.plan import resolve
from unipic_core.sampling.guidance import guided_velocity
from unipic_core.sampling.samplers import sample_consistency, sample_euler, seeded_noise
from unipic_core.sampling.schedules import rounded_time
from unipic_core.weights.lora import save_adapter
from unipic_core.weights.recipe import RELEASED_BASE, Recipe, recipe_of
from unipic_core.weights.transformer import read_shift

from ..cache import Rows, cached_samples, load_image_vae, read_preview
from ..config.methods import MaskedLoss, OptimizerConfig, TrainingTimes
from ..config.run import EXPORT_KINDS, ConfigError, RunConfig, required
from ..data.batches import data_report, micro_batches_of_process
from ..data.picture_grid import picture_grid
from ..data.previews import PreviewRow, decode_latents, row_from_latents
from ..data.samples import Samples, evenly_spaced, held_out_rows, order_of
from ..data.text_embeddings import encode_mixed, encode_rows, text_fingerprint
from ..loop.export import Export, export_adapter, export_bytes, export_network
from ..loop.method import Batch, Method, Share
from ..loop.metrics import Metrics
from ..roles.load import load_roles
from ..roles.roles import AdapterRoles, FullRoles
from ..roles.types import EMA, STUDENT, NamedParameters, Roles, require_roles, roles_of
from .inputs import Draws, Inputs, make_inputs, padded_batch, select_text
from .losses import TimedVelocity, mask_weights
from .times import logit_normal_times, some_uniform

VALIDATION = 2**48
"""First micro step index of validation draws of time and noise; no run trains that many."""


class NetworkTraining(Method):
    """Training of the network; a subclass adds the loss."""

    recipe = RELEASED_BASE
    """Sampling recipe of the student, merged over the base's, which sets the picture sizes."""
    prefetch = 2
    live_text: TextEncoder | None = None
    prompt_dropout = 0.0
    masked_loss: MaskedLoss | None = None

    def __init__(self, config: RunConfig, roles: Roles | None = None) -> None:
        self.config = config
        self.network_config, self.data = required(config.network), required(config.data)
        self.preview_config, self.recipe_config = required(config.preview), required(config.recipe)
        trained, frozen = roles_of(config)
        self.roles = roles or load_roles(self.network_config, trained, frozen, config.seed, config.precision)
        require_roles(self.roles, trained, frozen)
        self.folder, self.base = (
            Path(self.network_config.model),
            Path(self.network_config.transformer or self.network_config.model),
        )
        self.shift = read_shift(self.folder)
        self.encoder = self.frozen_encoder()
        self.open_data()
        self.device, self.share = torch.device("cpu"), Share()
        self.sharded, self.shards_trained = self.network_config.shard, self.network_config.shards_trained

    def open_data(self) -> None:
        """Open the cached samples, and choose held-out rows, the order of training rows and the preview samples."""
        self.samples, config = Samples(cached_samples(self.data, self.encoder)), self.config
        validation = self.validation = required(config.validation)
        if self.masked_loss is not None and not self.samples.num_masked:
            raise ConfigError(
                f"{self.config.method}.mask needs rows with masks, got none in {self.data.parts[0].folder}; add masks "
                "to the data (docs/training.md) and run python -m trainers.cache, or remove it"
            )
        self.held_out = held_out_rows(self.samples, validation.share)
        self.train_rows = np.setdiff1d(np.arange(len(self.samples)), self.held_out)
        self.order = order_of(config, self.data, self.samples, self.train_rows)
        self.validation_samples = self.samples
        if validation.data is not None:
            self.validation_samples = Samples(cached_samples(validation.data, self.encoder))
            self.held_out = np.arange(len(self.validation_samples))
        if self.grid_is_cached:
            read_preview(self.data.parts[0], self.preview_config, self.encoder)  # fail now, not at the first grid

    def data_report(self) -> dict[str, float]:
        """Counts of rows, micro-batches and padding per epoch for RUN/data.json."""
        lengths, held_out = self.samples.lengths, len(self.held_out)
        report = data_report(self.order, lengths, self.config.max_tokens)
        counts = {"rows": len(self.train_rows) + held_out, "validation_rows": held_out}
        if self.masked_loss is not None:
            counts["rows_with_mask"] = self.samples.num_masked
        elif self.samples.num_masked:
            counts["unused_masks"] = self.samples.num_masked
        return {**report, **counts, "largest_tokens": int(lengths.total[self.train_rows].max())}

    @property
    def data_contents(self) -> str:
        """Digest of what all cached rows were made from."""
        return "-".join(one.contents for one in self.samples.sets)

    def frozen_encoder(self) -> str | None:
        """Fingerprint of the text encoder whose embeddings the cache must hold; None if it is trained."""
        return text_fingerprint(self.folder)

    # --- interface of the loop ---

    def place(self, device: torch.device, share: Share) -> None:
        self.device, self.share = device, share
        self.roles.place(device)
        if self.encoder is not None and self.config.encodes_live:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            self.live_text = TextEncoder.from_pretrained(self.folder, dtype, device)

    def updates(self, step: int) -> tuple[str, ...]:
        return (STUDENT,)

    def trained(self, part: str) -> NamedParameters:
        return self.roles.trained(part)

    def averaged(self) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self.roles.parameters_of(EMA), self.roles.parameters_of(STUDENT), strict=True)
        return [(average, parameter) for (_, average), (_, parameter) in pairs]

    def optimizer(self, part: str) -> OptimizerConfig:
        return self.config.optimizer

    def batch(self, index: int) -> Batch[Inputs]:
        rows = self.order[self.position(index)]
        return self.micro_batches(self.samples, rows, index, self.prompt_dropout)

    def validation_batches(self) -> Iterator[Batch[Inputs]]:
        """This process's share of the held-out rows, always with the same times and noise."""
        rows, size = evenly_spaced(self.held_out, self.validation.rows), self.config.batch_size
        for draw in range(self.validation.draws):
            for at in range(0, len(rows), size):
                yield self.micro_batches(self.validation_samples, rows[at : at + size], VALIDATION + draw)

    def micro_batches(
        self, samples: Samples, rows: np.ndarray, index: int, prompt_dropout: float = 0.0
    ) -> Batch[Inputs]:
        """This process's share of a batch, as micro-batches."""
        share, micro_batches = self.share, []
        rows_of_process = micro_batches_of_process(
            rows, samples.lengths, share.process, share.processes, self.config.max_tokens
        )
        for some, counts in rows_of_process:
            micro_batches.append(replace(self.micro_batch(samples, some, index, prompt_dropout), counts=counts))
        return Batch(tuple(micro_batches), index, f"rows {', '.join(map(str, rows))}")

    def position(self, index: int) -> int:
        """Position of a micro step in the order of rows, which skips micro steps that are not computed."""
        return index

    def student_update(self, index: int) -> int:
        """Number of the student's updates before the one of a micro step."""
        return index // (self.slots * self.config.accumulation)

    def micro_batch(self, samples: Samples, rows: Sequence[int], index: int, prompt_dropout: float = 0.0) -> Inputs:
        """Read these rows as one padded batch; each prompt is dropped with this probability."""
        draws = [np.random.default_rng([self.config.seed, index, 1, row]).random() for row in rows]
        dropped, name = np.array(draws) < prompt_dropout, f"rows {', '.join(map(str, rows))}"
        return replace(
            self.padded_inputs([self.with_text(samples.take(row)) for row in rows], dropped, index, name),
            rows=tuple(rows),
        )

    def with_text(self, rows: Rows) -> Rows:
        """The rows with text embeddings, computed now where the cache stores none (data.text_storage live)."""
        return rows if self.live_text is None or rows.cond is not None else encode_rows(self.live_text, rows)

    def with_prompts(self, batch: Inputs, pictures: Sequence[Sequence[Tensor]], prompts: Sequence[str]) -> Inputs:
        """The batch with embeddings computed now, by the frozen encoder. pictures: per sample uint8 [H, W, 3] each."""
        assert self.live_text is not None  # loaded by `place` where there is no cache
        cond, uncond = encode_mixed(self.live_text, pictures, prompts)
        return replace(batch, cond=cond, uncond=uncond)

    def without(self, batch: Inputs, rows: Sequence[int]) -> Inputs:
        """The micro-batch without these rows, on the CPU; a filler of zeros if none is left."""
        kept = [row for row in batch.rows if row not in rows]
        if not kept:
            return batch.filler()
        return replace(self.micro_batch(self.samples, kept, batch.index, self.prompt_dropout), counts=batch.counts)

    def without_prompt(self, index: int, count: int) -> np.ndarray:
        """Samples of a batch whose prompt is dropped, bool [count]."""
        return np.random.default_rng([self.config.seed, index, 1]).random(count) < self.prompt_dropout

    def loss(self, part: str, batch: Inputs) -> tuple[Tensor, Metrics]:
        raise NotImplementedError

    # --- for subclasses ---

    def weights_of(self, batch: Inputs) -> Tensor | None:
        """Weights [B, N] of the tokens in a masked loss; None: all are equal."""
        return None if self.masked_loss is None else mask_weights(batch.mask, self.masked_loss.outside)

    def inputs(self, rows: Rows, dropped: np.ndarray, index: int = 0, first: int = 0, name: str = "") -> Inputs:
        """Make a batch of rows of equal shapes. dropped: bool [n], samples without their prompt."""
        batch = make_inputs(rows, index, first, name)
        return replace(batch, cond=select_text(dropped, batch.uncond, batch.cond)) if dropped.any() else batch

    def padded_inputs(self, rows: Sequence[Rows], dropped: np.ndarray, index: int, name: str) -> Inputs:
        """Pad samples of different shapes, one in each of `rows`, into one batch."""
        return padded_batch([self.inputs(r, dropped[i : i + 1], index, name=name) for i, r in enumerate(rows)])

    def times(self, draws: Draws, times: TrainingTimes) -> Tensor:
        """Draw the training times of a batch, [B]."""
        t = logit_normal_times(draws.generators, draws.like.shape[1], times.mean, times.std, self.shift)
        if times.uniform_share:
            t = some_uniform(t, draws.generators, times.uniform_share, times.uniform_least)
        return t.clamp(times.least, times.most).to(draws.like.device)

    @property
    def activations(self) -> torch.dtype:
        """Dtype of the network's activations."""
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def role(self, role: str, batch: Inputs, text: TextCond | None = None) -> TimedVelocity:
        """Bind a role's network to a batch's references and text: (x_t, t) -> v."""
        text = batch.cond if text is None else text
        return lambda x_t, t: self.roles(role, batch.latents.with_target(x_t), t, text)

    def guided(self, role: str, batch: Inputs, x_t: Tensor, t: Tensor | float, scale: float) -> Tensor:
        """Guided velocity of a role, as its sampler computes it."""
        uncond = None if scale == 1 else batch.uncond
        latents = batch.latents.with_target(x_t)
        return guided_velocity(partial(self.roles, role), latents, t, batch.cond, uncond, scale)

    # --- samples and exports ---

    def sample_inputs(self, rows: Rows) -> Inputs:
        """Make a batch to sample from, with both guidance branches."""
        return self.inputs(self.with_text(rows), np.zeros(len(rows.prompts), dtype=bool))

    @property
    def student_recipe(self) -> Recipe:
        """Exported recipe: as the student was trained, with the settings that the config wants otherwise."""
        wanted = {k: v for k, v in vars(self.recipe_config).items() if v is not None}
        return replace(self.trained_recipe, **wanted)

    @property
    def trained_recipe(self) -> Recipe:
        """Recipe of the training: sampling settings and provenance; sizes stay the base's, except after stages."""
        provenance = {"method": self.config.method, "steps": self.config.steps, "seed": self.config.seed}
        attention_form = self.roles.config_of(STUDENT).attention_form
        budgets = (self.data.reference_budget, self.data.size) if self.config.stage else (None, None)
        made = replace(self.recipe, attention_form=attention_form, made=provenance)
        return replace(made, reference_budget=budgets[0], output_budget=budgets[1])

    @property
    def grid_is_cached(self) -> bool:
        """True if the grid shows samples encoded for it; False: held-out samples."""
        return bool(self.preview_config.own) or not self.validation.holds_out

    def preview_rows(self, vae: ImageVAE) -> list[PreviewRow]:
        """Read the samples of the grid; pictures of held-out samples are decoded from the cache."""
        if self.grid_is_cached:
            return read_preview(self.data.parts[0], self.preview_config, self.encoder)
        chosen = evenly_spaced(self.held_out, self.preview_config.samples)
        return [row_from_latents(vae, self.validation_samples.take(row)) for row in chosen.tolist()]

    def preview(self) -> Image.Image:
        """Draw the grid: references, truth if known, and samples of the EMA from fixed noise."""
        vae = load_image_vae(self.folder / "vae", device=self.device)
        columns = []
        for i, row in enumerate(self.preview_rows(vae)):
            inputs = self.sample_inputs(row.rows).to(self.device)
            x0 = unpack_latents(self.sample(EMA, inputs, seed=i), row.shape)
            columns.append((row.references, row.truth, decode_latents(vae, x0)))
        return picture_grid([list(cells) for cells in zip(*columns, strict=True)], ["references", "truth", "sample"])

    def sample(self, role: str, batch: Inputs, seed: int) -> Tensor:
        """Sample x0 [B, N, 4C] with the exported recipe, or the steps and guidance of the preview config."""
        preview, recipe = self.preview_config, recipe_of(self.base).merge(self.student_recipe)
        settings = resolve(recipe, preview.steps, preview.guidance)

        def velocity(x_t: Tensor, t: float) -> Tensor:
            fed = rounded_time(t, settings.time_rounding, self.activations)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                return self.guided(role, batch, x_t, fed, settings.guidance)

        noise, times = seeded_noise(batch.x0.shape, seed), settings.times(batch.x0.shape[1], self.shift).tolist()
        start = noise(-1).to(batch.x0)
        if settings.sampler == "euler":
            return sample_euler(velocity, start, times)
        return sample_consistency(velocity, start, times, noise)

    @property
    def export_name(self) -> str:
        """Base name of exported files. It includes a causal attention form, which loaders of weights cannot detect."""
        name = "unipic_distill" if self.config.method != "sft" else "unipic_sft"
        causal_form = self.student_recipe.causal_attention_form
        return f"{name}_{causal_form}" if causal_form else name

    @property
    def adapter_writer(self) -> Callable[[Path], None] | None:
        """Function that writes the EMA's adapter into a folder; None in full-parameter runs."""
        roles = self.roles
        if not isinstance(roles, AdapterRoles):
            return None

        def write(folder: Path) -> None:
            path = folder / f"{self.export_name}.safetensors"
            save_adapter(path, roles.adapter(EMA), recipe=self.student_recipe)

        return write

    def exports(self) -> list[Export]:
        """Exports of the EMA, and with "raw" of the student: LoRAs, then merged files, then folders."""
        formats, adapters = self.config.export, isinstance(self.roles, AdapterRoles)
        roles = ((EMA, ""), (STUDENT, "_raw")) if "raw" in formats else ((EMA, ""),)
        endings = {
            "lora": ".safetensors",
            "merged": "_merged.safetensors" if adapters else ".safetensors",
            "folder": "",
        }
        exports = []
        for kind in [k for k in EXPORT_KINDS if k in formats and (adapters or k != "lora")]:
            size = export_bytes(kind, self.roles.config_of(EMA), self.folder)
            for role, suffix in roles:
                name = self.export_name + suffix
                write = partial(self.export, kind=kind, role=role, name=name)
                exports.append(Export(name + endings[kind], size, write))
        return exports

    def export(self, folder: Path, kind: str, role: str, name: str) -> None:
        """Write one of `exports` with the weights of a role."""
        recipe = self.student_recipe
        if isinstance(self.roles, AdapterRoles):
            layers = self.roles.adapter(role)
            export_adapter(folder, self.base, layers, recipe, name, parts_from=self.folder, kinds=(kind,))
        elif isinstance(self.roles, FullRoles):
            network, state = self.roles.network(role), self.roles.state(role, gather_here=self.share.process == 0)
            if self.share.process == 0:
                export_network(folder, self.base, state, network.config, recipe, name, self.folder, kinds=(kind,))
