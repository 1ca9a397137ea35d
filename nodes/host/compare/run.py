"""Sampling of a comparison: each cell as Few-Step Sampler and VAE Decode would make it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any, Protocol

import comfy.model_management as management
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from PIL import Image
from torch import Tensor

from ....unipic_core.errors import UniPicError
from ....unipic_core.run.plan import Plan
from ..model.influences import INFLUENCES
from ..sampling.choices import choices
from ..sampling.influence_control import InfluenceControl
from ..sampling.run import prepared, sample
from ..sampling.schedules import sigmas_of, target_tokens
from .axes import Cell, order
from .keys import Digest, NoKey, model_key, vae_content
from .store import CellStore

Conditioning = list[Any]

COMPOSITION = "unipic_composition"
"""Key of a conditioning of Multi-Image Compose: its `Composition`."""


class Composition(Protocol):
    """Inputs of Multi-Image Compose."""

    def plan(self, reference_budget: int | None = None) -> Plan:
        """The checked plan of the run, or of one at another reference budget."""
        ...

    def resized(self, planned: Plan) -> list[Image.Image]:
        """The pictures at the plan's reference budget."""
        ...

    def conditionings(self, planned: Plan, resized: list[Image.Image]) -> tuple[Conditioning, Conditioning]:
        """Positive and negative with the resized pictures."""
        ...


@dataclass(frozen=True)
class Sockets:
    """Inputs that all cells share. with_lora: the MODEL with the chosen LoRA at a strength, as of Distill LoRA."""

    model: ModelPatcher
    positive: Conditioning
    negative: Conditioning
    latent: dict[str, Any]
    vae: VAE
    denoise: float
    with_lora: Callable[[float], ModelPatcher]


class Comparison:
    """Pictures of cells. Finished ones are stored, so that the next run with the same inputs reads them.

    cautions: gets a line where pictures cannot be stored.
    """

    def __init__(self, sockets: Sockets, store: CellStore, cautions: list[str]) -> None:
        x = prepared(sockets.model, sockets.latent)
        if len(x) != 1:
            raise UniPicError(
                f"Compare expects a latent of one picture, got {len(x)}; set batch_size to 1, and vary the seed instead"
            )
        self.sockets = sockets
        self.store = store
        self.cautions = cautions
        model = sockets.model
        self._model: tuple[float | None, ModelPatcher, str | None] = (None, model, self._key_of_model(model))
        self._texts: tuple[int | None, Conditioning, Conditioning] = (None, sockets.positive, sockets.negative)

    def pictures(self, cells: Sequence[Cell], report: Callable[[int, Cell, str], None]) -> list[Tensor]:
        """IMAGE [1, H, W, 3] of each cell. report: called before each with its number, the cell and its settings."""
        made: dict[int, Tensor] = {}
        for number, index in enumerate(order(cells), start=1):
            management.throw_exception_if_processing_interrupted()
            made[index] = self._picture(cells[index], partial(report, number, cells[index]))
        return [made[index] for index in range(len(cells))]

    def _picture(self, cell: Cell, report: Callable[[str], None]) -> Tensor:
        model, (positive, negative) = self._model_of(cell), self._texts_of(cell)
        latent, denoise = self.sockets.latent, self.sockets.denoise
        x = prepared(model, latent)
        chosen = choices(model, x, cell.widgets)
        times = sigmas_of(chosen.settings, chosen.shift, target_tokens(x), denoise)
        key = self._key(positive, negative, [cell.seed, chosen.settings, times])
        stored = None if key is None else self.store.load(key)
        report(f"{chosen.line}{'' if stored is None else ', from the disk'}")
        if stored is not None:
            return stored.to(management.intermediate_device())  # where the VAE leaves new ones
        samples = sample(model, positive, negative, latent, cell.seed, chosen.settings, times)
        picture = decoded(self.sockets.vae, samples["samples"])
        if key is not None:
            self.store.save(key, picture)
        return picture

    def _model_of(self, cell: Cell) -> ModelPatcher:
        """The MODEL with the cell's LoRA strength; the last one is kept with its key."""
        if self._model[0] != cell.lora:
            model = self.sockets.model if cell.lora is None else self.sockets.with_lora(cell.lora)
            self._model = (cell.lora, model, self._key_of_model(model))
        return self._model[1]

    def _texts_of(self, cell: Cell) -> tuple[Conditioning, Conditioning]:
        """The conditionings at the cell's reference budget; the last ones are kept."""
        if self._texts[0] != cell.budget:
            texts = (self.sockets.positive, self.sockets.negative)
            if cell.budget is not None:
                composition = composition_of(*texts)
                planned = composition.plan(cell.budget)
                texts = composition.conditionings(planned, composition.resized(planned))
            self._texts = (cell.budget, *texts)
        return self._texts[1], self._texts[2]

    def _key(self, positive: Conditioning, negative: Conditioning, settings: Sequence[object]) -> str | None:
        """Key of a cell of the present MODEL; None where an input has no content that can be compared."""
        if self._model[2] is None:
            return None
        texts = [[bare(cond) for cond in conds] for conds in (positive, negative)]
        try:
            digest = Digest().add(self._model[2]).add(texts).add(self.sockets.latent).add(list(settings))
            return digest.add(vae_content(self.sockets.vae)).hexdigest()
        except NoKey as reason:
            self.cautions.append(f"the pictures of this comparison are not stored, since they depend on {reason}")
            return None

    def _key_of_model(self, model: ModelPatcher) -> str | None:
        """Key of a MODEL; None, with a caution, where other nodes have put functions into it."""
        try:
            return model_key(model)
        except NoKey as reason:
            self.cautions.append(f"the pictures of this comparison are not stored, since the model has {reason}")
            return None


def composition_of(positive: Conditioning, negative: Conditioning) -> Composition:
    """The Composition that both conditionings come from. UniPicError for those of other nodes, or changed by others."""
    found = [cond[1].get(COMPOSITION) for cond in (*positive, *negative)]
    plain = {"reference_latents", "attention_mask", "pooled_output", "control", COMPOSITION, INFLUENCES}
    changed = any(
        set(cond[1]) - plain or not isinstance(cond[1].get("control"), (InfluenceControl, NoneType))
        for cond in (*positive, *negative)
    )
    if not found or found[0] is None or any(other is not found[0] for other in found) or changed:
        raise UniPicError(
            "the axis reference_budget encodes the pictures again, so positive and negative must come straight from "
            "one Multi-Image Compose; connect them without nodes between, or compare budgets in that node"
        )
    composition: Composition = found[0]
    return composition


def bare(cond: Sequence[Any]) -> list[Any]:
    """A conditioning without its Composition, whose results it holds."""
    text, extra = cond
    return [text, {key: value for key, value in extra.items() if key != COMPOSITION}]


def decoded(vae: VAE, samples: Tensor) -> Tensor:
    """IMAGE [B, H, W, 3] of a latent, as VAE Decode gives it."""
    images: Tensor = vae.decode(samples)
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images
