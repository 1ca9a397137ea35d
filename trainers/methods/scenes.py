"""Methods on endless scenes (`data.kind: scenes`), which have masks and no cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unipic_core.conditioning.sequence import (
    LatentShape,
    PackedLatents,
    TextCond,
    pack_latents,
    pack_with_references,
)
from unipic_core.model.vae import ImageVAE
from unipic_core.weights.recipe import Recipe

from ..cache import Rows
from ..data.encoding import encode_pictures
from ..data.endless.stream import SceneStream, SceneUse
from ..data.endless.token_sources import AMBIGUOUS
from ..data.previews import NANO_PREVIEWS, PreviewRow, reference_cell
from ..data.rows import Row
from ..data.sources import Compositions
from ..data.text_embeddings import UNCOND_PROMPT
from ..loop.method import Batch
from ..nano.emoji import Bank
from .base import NetworkTraining
from .correspondence import NOBODY, Owners
from .inputs import Inputs
from .token_pointer import ShownTokens, shown_tokens


def on_scenes(method: type[NetworkTraining]) -> type[NetworkTraining]:
    """Make the class of a method that trains on endless scenes."""
    return type(f"{method.__name__}OnScenes", (OnScenes, method), {})


class OnScenes(NetworkTraining):
    """A method's first base, which draws its data by worker processes; a batch can mix numbers of references."""

    def open_data(self) -> None:
        self.stream = SceneStream(self.data, self.config.batch_size, self.config.seed, self.folder / "vae")

    def close(self) -> None:
        self.stream.close()

    @property
    def data_contents(self) -> str:
        """No digest: a scene is a function of seed and index."""
        return ""

    def data_report(self) -> dict[str, float]:
        """No report: endless scenes have no epochs."""
        return {}

    def batch(self, index: int) -> Batch[Inputs]:
        batch = self.stream[self.position(index)]
        part = self.share.part(len(batch))
        uses, dropped = batch[part], self.without_prompt(index, len(batch))[part]
        name = f"scenes {', '.join(str(use.index) for use in uses)}"
        return Batch.of_one(self.scene_inputs(uses, dropped, index, part.start, name))

    def scene_inputs(self, uses: Sequence[SceneUse], dropped: np.ndarray, index: int, first: int, name: str) -> Inputs:
        targets = torch.stack([latents_of(use.encoded.target) for use in uses])
        shape, x0 = LatentShape.of_latents(targets), pack_latents(targets)
        references = [[latents_of(use.encoded.sources[s])[:, None] for s in use.places] for use in uses]
        pictures = [[torch.from_numpy(use.encoded.vision[s]) for s in use.places] for use in uses]
        prompts = [UNCOND_PROMPT if d else use.scene.instruction for d, use in zip(dropped, uses, strict=True)]
        no_text, owners = TextCond(torch.zeros(len(uses), 0, 0)), owners_of(uses)
        latents = pack_with_references(x0, shape, references)
        batch = Inputs(
            x0,
            latents,
            no_text,
            no_text,
            index,
            first,
            name,
            owners,
            torch.from_numpy(dropped),
            mask=owners.mask,
            shown=shown_of(uses, latents),
        )
        return self.with_prompts(batch, pictures, prompts)

    @property
    def trained_recipe(self) -> Recipe:
        """Recipe with the picture sizes of this training, which can be larger than the base's."""
        return replace(
            super().trained_recipe, reference_budget=self.data.reference_budget, output_budget=self.data.size
        )

    def preview_rows(self, vae: ImageVAE) -> list[PreviewRow]:
        """Preview samples of the composition set, half of training and half of held-out assets; encoded once."""
        if not hasattr(self, "_preview_rows"):
            bank, count = Bank.open(size=self.data.size), self.preview_config.samples
            self._preview_rows = [
                preview_row(scenes[i], encode_pictures(vae, [scenes[i].target, *scenes[i].references]))
                for k, (split, seed) in enumerate(NANO_PREVIEWS)
                for scenes in [Compositions(self.data, 0, (count + 1 - k) // 2, split, seed, bank)]
                for i in range(len(scenes))
            ]
        return self._preview_rows


def latents_of(stored: np.ndarray) -> Tensor:
    """Convert a worker's bfloat16 latents to float32."""
    return torch.from_numpy(stored).view(torch.bfloat16).float()


def owners_of(uses: Sequence[SceneUse]) -> Owners:
    """Convert owners from source order to the reference order of each use."""
    references, backgrounds = [], []
    for use in uses:
        place_of = torch.full((len(use.places) + 1,), NOBODY)  # the last: AMBIGUOUS
        place_of[torch.tensor(use.places)] = torch.arange(len(use.places))
        place_of[AMBIGUOUS] = NOBODY
        references.append(place_of[torch.from_numpy(use.encoded.owners).long()])
        background = len(use.scene.items)
        backgrounds.append(int(place_of[background]) if background in use.places and not use.scene.edit else NOBODY)
    return Owners(torch.stack(references), torch.tensor(backgrounds))


def shown_of(uses: Sequence[SceneUse], latents: PackedLatents) -> ShownTokens:
    """Convert places in sources to tokens of the references, in the reference order of each use."""
    samples = []
    for use, (_, *references) in zip(uses, latents.shapes, strict=True):
        sources = torch.from_numpy(use.encoded.token_sources)
        samples.append(shown_tokens(sources, use.places, references))
    indices, shares = zip(*samples, strict=True)
    return ShownTokens(torch.stack(indices), torch.stack(shares))


def preview_row(row: Row, latents: Sequence[Tensor]) -> PreviewRow:
    """Make a preview column from a row and its latents [C, h, w], target first."""
    target, *references = (one[None].float() for one in latents)
    vision = tuple(torch.from_numpy(np.array(one))[None] for one in row.vision)
    rows = Rows(target, tuple(references), vision, (row.prompt,))
    truth = Image.fromarray(row.target)
    return PreviewRow(rows, LatentShape.of_latents(target), reference_cell(list(row.vision), max(truth.size)), truth)
