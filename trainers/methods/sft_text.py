"""Method `sft` with `train_text_encoder`: the text encoder trains along, as a small one does from nothing."""

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
from ..config.run import RunConfig, given
from ..data.text_embeddings import UNCOND_PROMPT, encoder_inputs, mixed_encoder_inputs
from ..loop.method import Share
from ..loop.metrics import Metrics
from ..roles.types import EMA, Named, Roles
from .inputs import Inputs, make_inputs
from .sft import SFTTraining


@dataclass(frozen=True)
class LiveInputs(Inputs):
    """A batch whose text is still to be encoded. nothing: the unconditional branch's, which samples alone need."""

    words: EncoderInputs = field(default_factory=dict)
    nothing: EncoderInputs = field(default_factory=dict)

    def to(self, device: torch.device | str) -> LiveInputs:
        moved = super().to(device)
        assert isinstance(moved, LiveInputs)  # replace() keeps the class
        words, nothing = ({k: v.to(device) for k, v in one.items()} for one in (self.words, self.nothing))
        return replace(moved, words=words, nothing=nothing)


class SFTWithText(SFTTraining):
    """As SFTTraining, with the encoder's parameters in the student and their EMA beside the network's."""

    def __init__(self, config: RunConfig, roles: Roles | None = None) -> None:
        folder = Path(given(config.network).model)
        self.text, self.text_ema = self._encoder(folder), self._encoder(folder)
        self.text.network.requires_grad_(True)
        self.text_ema.network.requires_grad_(False)
        super().__init__(config, roles)

    @staticmethod
    def _encoder(folder: Path) -> TextEncoder:
        text = TextEncoder.from_pretrained(folder, dtype=torch.float32)
        # padded and short sequences: faster than the fused kernel
        text.model.set_attn_implementation({"text_config": "eager"})
        return text

    def frozen_encoder(self) -> None:
        return None

    def place(self, device: torch.device, share: Share) -> None:
        super().place(device, share)
        self.text.to(device)
        self.text_ema.to(device)

    def trained(self, part: str) -> Named:
        return super().trained(part) + [(f"encoder.{n}", p) for n, p in self.text.network.named_parameters()]

    def averaged(self) -> list[tuple[Tensor, Tensor]]:
        own = zip(self.text_ema.network.parameters(), self.text.network.parameters(), strict=True)
        return super().averaged() + list(own)

    def inputs(self, rows: Rows, dropped: np.ndarray, index: int = 0, first: int = 0, name: str = "") -> Inputs:
        prompts = [UNCOND_PROMPT if d else p for d, p in zip(dropped, rows.prompts, strict=True)]
        nothing = TextCond(torch.zeros(len(prompts), 0, 0))
        batch = make_inputs(replace(rows, cond=nothing, uncond=nothing), index, first, name)
        return LiveInputs(**vars(batch), words=encoder_inputs(self.text, rows, prompts))

    def mixed_inputs(self, rows: Sequence[Rows], dropped: np.ndarray, index: int, name: str) -> Inputs:
        made = super().mixed_inputs(rows, dropped, index, name)
        assert isinstance(made, LiveInputs)  # made by `inputs`
        prompts = [UNCOND_PROMPT if d else r.prompts[0] for d, r in zip(dropped, rows, strict=True)]
        return replace(made, words=mixed_encoder_inputs(self.text, [[v[0] for v in r.vision] for r in rows], prompts))

    def sample_inputs(self, rows: Rows) -> Inputs:
        batch = super().sample_inputs(rows)
        assert isinstance(batch, LiveInputs)  # made by `inputs`
        return replace(batch, nothing=encoder_inputs(self.text, rows, [UNCOND_PROMPT] * len(rows.prompts)))

    def loss(self, part: str, batch: Inputs) -> tuple[Tensor, Metrics]:
        return super().loss(part, self._encoded(self.text, batch))

    def sample(self, role: str, batch: Inputs, seed: int) -> Tensor:
        text = self.text_ema if role == EMA else self.text
        return super().sample(role, self._encoded(text, batch), seed)

    @staticmethod
    def _encoded(text: TextEncoder, batch: Inputs) -> Inputs:
        assert isinstance(batch, LiveInputs)  # made by `inputs`
        encoded = replace(batch, cond=text.forward(batch.words))
        return replace(encoded, uncond=text.forward(batch.nothing)) if batch.nothing else encoded

    def export(self, folder: Path, kind: str, role: str, name: str) -> None:
        """The network's file or folder; the folder has the encoder that belongs to it."""
        super().export(folder, kind, role, name)
        if kind != "folder":
            return
        text = copy.deepcopy(self.text_ema if role == EMA else self.text)
        text.model.config.unipic_positions = text.positions
        shutil.rmtree(folder / name / "text_encoder")
        text.model.bfloat16().save_pretrained(folder / name / "text_encoder")
