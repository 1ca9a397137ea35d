"""Method `sft` with `train_text_encoder`: network and text encoder are trained together, also from scratch."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unipic_core.conditioning.sequence import TextCond
from unipic_core.pipeline.text_encoder import EncoderInputs, TextEncoder

from ..cache import Rows
from ..config.run import RunConfig, required
from ..data.text_embeddings import UNCOND_PROMPT, encoder_inputs, mixed_encoder_inputs
from ..loop.method import Share
from ..loop.metrics import Metrics
from ..roles.types import EMA, NamedParameters, Roles
from .inputs import Inputs, make_inputs
from .sft import SFTTraining


@dataclass(frozen=True)
class UnencodedInputs(Inputs):
    """Inputs whose text is not encoded yet. uncond_inputs: of the unconditional branch, for sampling only."""

    encoder_inputs: EncoderInputs = field(default_factory=dict)
    uncond_inputs: EncoderInputs = field(default_factory=dict)

    def to(self, device: torch.device | str) -> UnencodedInputs:
        moved = super().to(device)
        assert isinstance(moved, UnencodedInputs)  # replace() keeps the class
        texts = (self.encoder_inputs, self.uncond_inputs)
        cond, uncond = ({k: v.to(device) for k, v in inputs.items()} for inputs in texts)
        return replace(moved, encoder_inputs=cond, uncond_inputs=uncond)


class SFTWithText(SFTTraining):
    """SFTTraining with the text encoder as a trained part of the student, with its own EMA."""

    def __init__(self, config: RunConfig, roles: Roles | None = None) -> None:
        folder = Path(required(config.network).model)
        self.text, self.text_ema = self._encoder(folder), self._encoder(folder)
        self.text.network.requires_grad_(True)
        self.text_ema.network.requires_grad_(False)
        super().__init__(config, roles)

    @staticmethod
    def _encoder(folder: Path) -> TextEncoder:
        text = TextEncoder.from_pretrained(folder, dtype=torch.float32)
        # for short padded sequences eager attention is faster than the fused kernel
        text.model.set_attn_implementation({"text_config": "eager"})
        return text

    def frozen_encoder(self) -> None:
        return None

    def place(self, device: torch.device, share: Share) -> None:
        super().place(device, share)
        self.text.to(device)
        self.text_ema.to(device)

    def trained(self, part: str) -> NamedParameters:
        return super().trained(part) + [(f"encoder.{n}", p) for n, p in self.text.network.named_parameters()]

    def averaged(self) -> list[tuple[Tensor, Tensor]]:
        encoder_pairs = zip(self.text_ema.network.parameters(), self.text.network.parameters(), strict=True)
        return super().averaged() + list(encoder_pairs)

    def inputs(self, rows: Rows, dropped: np.ndarray, index: int = 0, first: int = 0, name: str = "") -> Inputs:
        prompts = [UNCOND_PROMPT if d else p for d, p in zip(dropped, rows.prompts, strict=True)]
        no_text = TextCond(torch.zeros(len(prompts), 0, 0))
        batch = make_inputs(replace(rows, cond=no_text, uncond=no_text), index, first, name)
        return UnencodedInputs(**vars(batch), encoder_inputs=encoder_inputs(self.text, rows, prompts))

    def padded_inputs(self, rows: Sequence[Rows], dropped: np.ndarray, index: int, name: str) -> Inputs:
        prompts = [UNCOND_PROMPT if d else r.prompts[0] for d, r in zip(dropped, rows, strict=True)]
        pictures = [[v[0] for v in r.vision] for r in rows]
        return self.with_prompts(super().padded_inputs(rows, dropped, index, name), pictures, prompts)

    def with_prompts(self, batch: Inputs, pictures: Sequence[Sequence[Tensor]], prompts: Sequence[str]) -> Inputs:
        """The batch with what the encoder needs; the loss encodes it."""
        return UnencodedInputs(**vars(batch) | {"encoder_inputs": mixed_encoder_inputs(self.text, pictures, prompts)})

    def sample_inputs(self, rows: Rows) -> Inputs:
        batch = super().sample_inputs(rows)
        assert isinstance(batch, UnencodedInputs)  # from `inputs`
        return replace(batch, uncond_inputs=encoder_inputs(self.text, rows, [UNCOND_PROMPT] * len(rows.prompts)))

    def loss(self, part: str, batch: Inputs) -> tuple[Tensor, Metrics]:
        return super().loss(part, self._encode(self.text, batch))

    def sample(self, role: str, batch: Inputs, seed: int) -> Tensor:
        text = self.text_ema if role == EMA else self.text
        return super().sample(role, self._encode(text, batch), seed)

    @staticmethod
    def _encode(text: TextEncoder, batch: Inputs) -> Inputs:
        assert isinstance(batch, UnencodedInputs)  # from `inputs`
        encoded = replace(batch, cond=text.forward(batch.encoder_inputs))
        return replace(encoded, uncond=text.forward(batch.uncond_inputs)) if batch.uncond_inputs else encoded

    def export(self, folder: Path, kind: str, role: str, name: str) -> None:
        """Write the network's file or folder; the folder includes the trained encoder."""
        super().export(folder, kind, role, name)
        if kind != "folder":
            return
        text = copy.deepcopy(self.text_ema if role == EMA else self.text)
        text.model.config.unipic_positions = text.positions
        shutil.rmtree(folder / name / "text_encoder")
        text.model.bfloat16().save_pretrained(folder / name / "text_encoder")
