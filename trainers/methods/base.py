"""What the network's methods share: roles, cached batches, noise, previews and exports. A method adds its losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unipic_core.conditioning.sequence import TextCond, unpack_latents
from unipic_core.model.vae import ImageVAE
from unipic_core.run.plan import resolve
from unipic_core.sampling.guidance import guided_velocity
from unipic_core.sampling.samplers import sample_consistency, sample_euler, seeded_noise
from unipic_core.sampling.schedules import rounded_time
from unipic_core.weights.lora import save_lora
from unipic_core.weights.recipe import RELEASED_BASE, Recipe, recipe_of
from unipic_core.weights.transformer import read_shift

from ..cache import Rows, load_image_vae, read_cache, read_preview
from ..config.methods import OptimizerConfig, Times
from ..config.run import EXPORT_KINDS, RunConfig, given
from ..data.batches import RowOrder, data_report, shared_pieces
from ..data.picture_grid import picture_grid
from ..data.previews import PreviewRow, decoded, decoded_row
from ..data.samples import Samples, held_out_rows, spread
from ..data.text_embeddings import text_fingerprint
from ..loop.export import Export, export_adapter, export_bytes, export_network
from ..loop.method import Share
from ..loop.metrics import Metrics
from ..roles.load import load_roles
from ..roles.roles import AdapterRoles, FullRoles
from ..roles.types import EMA, STUDENT, Named, Roles, require, roles_of
from .inputs import Draws, Inputs, Pieces, choose, joined, make_inputs
from .losses import TimedVelocity
from .times import logit_normal_times, some_uniform

VALIDATION = 2**48
"""Micro steps from here on are draws of time and noise for held-out rows; no run trains so many."""


class NetworkTraining:
    """Base of the methods that train the network."""

    recipe = RELEASED_BASE
    """How the student wants to be sampled; what the base's recipe says of sizes stays."""
    loader_workers = 0
    slots = 1
    prompt_dropout = 0.0

    def __init__(self, config: RunConfig, roles: Roles | None = None) -> None:
        self.config = config
        self.network, self.data = given(config.network), given(config.data)
        self.preview_config = given(config.preview)
        trained, frozen = roles_of(config)
        self.roles = roles or load_roles(self.network, trained, frozen, config.seed)
        require(self.roles, trained, frozen)
        self.folder, self.base = Path(self.network.model), Path(self.network.transformer or self.network.model)
        self.shift = read_shift(self.folder)
        self.encoder = self.frozen_encoder()
        self.open_data()
        self.device, self.share = torch.device("cpu"), Share()
        self.sharded = self.network.shard

    def open_data(self) -> None:
        """The cached samples, those held out of training, the order of the others, and the samples of the grid."""
        self.samples, config = Samples(read_cache(self.data, self.encoder)), self.config
        validation = self.validation = given(config.validation)
        self.held_out = held_out_rows(self.samples, validation.share)
        self.train_rows = np.setdiff1d(np.arange(len(self.samples)), self.held_out)
        self.order = RowOrder(len(self.train_rows), config.batch_size, config.seed, config.accumulation)
        self.validation_samples = self.samples
        if validation.data is not None:
            self.validation_samples = Samples(read_cache(validation.data, self.encoder))
            self.held_out = np.arange(len(self.validation_samples))
        if self.grid_is_cached:
            read_preview(self.data, self.preview_config, self.encoder)  # now, in place of at the first grid

    def data_report(self) -> dict[str, float]:
        """Rows, micro-batches and padding of an epoch, for RUN/data.json."""
        lengths = self.samples.lengths.of(self.train_rows)
        return data_report(self.order, lengths, self.config.max_tokens, len(self.held_out))

    def frozen_encoder(self) -> str | None:
        """Fingerprint of the text encoder whose embeddings the cache must hold; None if it trains along."""
        return text_fingerprint(self.folder)

    # --- what the loop asks for ---

    def place(self, device: torch.device, share: Share) -> None:
        self.device, self.share = device, share
        self.roles.place(device)

    def updates(self, step: int) -> tuple[str, ...]:
        return (STUDENT,)

    def trained(self, part: str) -> Named:
        return self.roles.trained(part)

    def averaged(self) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self.roles.parameters_of(EMA), self.roles.parameters_of(STUDENT), strict=True)
        return [(average, own) for (_, average), (_, own) in pairs]

    def optimizer(self, part: str) -> OptimizerConfig:
        return self.config.optimizer

    def batch(self, index: int) -> Any:
        rows = self.train_rows[self.order[self.position(index)]]
        return self.pieces(self.samples, rows, index, self.prompt_dropout)

    def validation_batches(self) -> Iterator[Pieces]:
        """This process's share of the held-out rows, each with the same times and noise every time."""
        rows, size = spread(self.held_out, self.validation.rows), self.config.batch_size
        for draw in range(self.validation.draws):
            for at in range(0, len(rows), size):
                yield self.pieces(self.validation_samples, rows[at : at + size], VALIDATION + draw)

    def pieces(self, samples: Samples, rows: np.ndarray, index: int, prompt_dropout: float = 0.0) -> Pieces:
        """This process's share of a batch."""
        share, made = self.share, []
        shared = shared_pieces(rows, samples.lengths, share.process, share.processes, self.config.max_tokens)
        for own, counts in shared:
            made.append(replace(self.piece(samples, own, index, prompt_dropout), counts=counts))
        return Pieces(tuple(made), index, f"rows {', '.join(map(str, rows))}")

    def position(self, index: int) -> int:
        """The number of a micro step among those that are computed; others in their range leave no rows out."""
        return index

    def piece(self, samples: Samples, rows: Sequence[int], index: int, prompt_dropout: float = 0.0) -> Inputs:
        """These rows as one padded batch; each is without its prompt with this probability."""
        draws = [np.random.default_rng([self.config.seed, index, 1, row]).random() for row in rows]
        dropped, name = np.array(draws) < prompt_dropout, f"rows {', '.join(map(str, rows))}"
        return replace(self.mixed_inputs([samples.take(row) for row in rows], dropped, index, name), rows=tuple(rows))

    def without_prompt(self, index: int, count: int) -> np.ndarray:
        """bool [count]: the samples of a whole batch that train without their prompt."""
        return np.random.default_rng([self.config.seed, index, 1]).random(count) < self.prompt_dropout

    def loss(self, part: str, batch: Inputs) -> tuple[Tensor, Metrics]:
        raise NotImplementedError

    # --- for the methods ---

    def inputs(self, rows: Rows, dropped: np.ndarray, index: int = 0, first: int = 0, name: str = "") -> Inputs:
        """dropped [n] bool: the samples that train without their prompt."""
        batch = make_inputs(rows, index, first, name)
        return replace(batch, cond=choose(dropped, batch.uncond, batch.cond)) if dropped.any() else batch

    def mixed_inputs(self, rows: Sequence[Rows], dropped: np.ndarray, index: int, name: str) -> Inputs:
        """Samples of different shapes, one in each of `rows`, padded into one batch."""
        return joined([self.inputs(r, dropped[i : i + 1], index, name=name) for i, r in enumerate(rows)])

    def times(self, draws: Draws, times: Times) -> Tensor:
        """[B] training times of a batch."""
        t = logit_normal_times(draws.generators, draws.like.shape[1], times.mean, times.std, self.shift)
        if times.uniform_share:
            t = some_uniform(t, draws.generators, times.uniform_share, times.uniform_least)
        return t.clamp(times.least, times.most).to(draws.like.device)

    @property
    def activations(self) -> torch.dtype:
        """What the network computes in."""
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def role(self, role: str, batch: Inputs, text: TextCond | None = None) -> TimedVelocity:
        """A role's network with a batch's references and text: (x_t, t) -> v."""
        text = batch.cond if text is None else text
        return lambda x_t, t: self.roles(role, batch.latents.with_target(x_t), t, text)

    def guided(self, role: str, batch: Inputs, x_t: Tensor, t: Tensor | float, scale: float) -> Tensor:
        """A role's velocity with guidance, as its sampler applies it."""
        uncond = None if scale == 1 else batch.uncond
        latents = batch.latents.with_target(x_t)
        return guided_velocity(partial(self.roles, role), latents, t, batch.cond, uncond, scale)

    # --- what comes out ---

    def sample_inputs(self, rows: Rows) -> Inputs:
        """A batch to sample from, with both branches of the guidance."""
        return self.inputs(rows, np.zeros(len(rows.prompts), dtype=bool))

    @property
    def own_recipe(self) -> Recipe:
        """How the student is sampled, and how it was made; of sizes the base's recipe speaks."""
        made = {"method": self.config.method, "steps": self.config.steps, "seed": self.config.seed}
        form = self.roles.config_of(STUDENT).attention_form
        return replace(self.recipe, reference_budget=None, output_budget=None, attention_form=form, made=made)

    @property
    def grid_is_cached(self) -> bool:
        """Whether the grid shows samples that were encoded for it, in place of held-out ones."""
        return bool(self.preview_config.own) or not self.validation.holds_out

    def preview_rows(self, vae: ImageVAE) -> list[PreviewRow]:
        """The samples of the grid; pictures of held-out ones are decoded from the cache."""
        if self.grid_is_cached:
            return read_preview(self.data, self.preview_config, self.encoder)
        chosen = spread(self.held_out, self.preview_config.samples)
        return [decoded_row(vae, self.validation_samples.take(row)) for row in chosen.tolist()]

    def preview(self) -> Image.Image:
        """The references, the truth where there is one, and what the EMA makes of fixed noise."""
        vae = load_image_vae(self.folder / "vae", device=self.device)
        columns = []
        for i, row in enumerate(self.preview_rows(vae)):
            inputs = self.sample_inputs(row.rows).to(self.device)
            x0 = unpack_latents(self.sample(EMA, inputs, seed=i), row.shape)
            columns.append((row.references, row.truth, decoded(vae, x0)))
        return picture_grid([list(cells) for cells in zip(*columns, strict=True)], ["references", "truth", "sample"])

    def sample(self, role: str, batch: Inputs, seed: int) -> Tensor:
        """x0 [B, N, 4C] as a user would sample it."""
        wishes, recipe = self.preview_config, recipe_of(self.base).merge(self.own_recipe)
        settings = resolve(recipe, wishes.steps, wishes.guidance)

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
        """Of what is exported. It says a causal form: a loader that only adds weights cannot bring it."""
        name = "unipic_distill" if self.config.method != "sft" else "unipic_sft"
        form = self.own_recipe.causal_attention_form
        return f"{name}_{form}" if form else name

    def save_adapter(self, folder: Path) -> None:
        """The EMA's LoRA as one small file that everything opens, with each checkpoint; full runs have none."""
        if isinstance(self.roles, AdapterRoles):
            assert self.network.adapter is not None  # adapter roles come from an adapter section
            path, layers = folder / f"{self.export_name}.safetensors", self.roles.lora(EMA)
            save_lora(path, layers, alpha=self.network.adapter.alpha, recipe=self.own_recipe)

    def exports(self) -> list[Export]:
        """What `export` chooses, of the EMA and, with "raw", of the student too: LoRAs, then files, then folders."""
        chosen, adapters = self.config.export, isinstance(self.roles, AdapterRoles)
        roles = ((EMA, ""), (STUDENT, "_raw")) if "raw" in chosen else ((EMA, ""),)
        endings = {
            "lora": ".safetensors",
            "merged": "_merged.safetensors" if adapters else ".safetensors",
            "folder": "",
        }
        made = []
        for kind in [k for k in EXPORT_KINDS if k in chosen and (adapters or k != "lora")]:
            size = export_bytes(kind, self.roles.config_of(EMA), self.folder)
            for role, suffix in roles:
                name = self.export_name + suffix
                write = partial(self.export, kind=kind, role=role, name=name)
                made.append(Export(name + endings[kind], size, write))
        return made

    def export(self, folder: Path, kind: str, role: str, name: str) -> None:
        """One of `exports`, by a role's weights."""
        recipe = self.own_recipe
        if isinstance(self.roles, AdapterRoles):
            assert self.network.adapter is not None  # adapter roles come from an adapter section
            alpha, layers = self.network.adapter.alpha, self.roles.lora(role)
            export_adapter(folder, self.base, layers, alpha, recipe, name, parts_from=self.folder, kinds=(kind,))
        elif isinstance(self.roles, FullRoles):
            network, state = self.roles.network(role), self.roles.state(role, keep=self.share.process == 0)
            if self.share.process == 0:
                export_network(folder, self.base, state, network.config, recipe, name, self.folder, kinds=(kind,))
