"""Correspondence loss: after chosen blocks, each target token predicts the reference that it shows.

A pointer head is a LayerNorm and two linear maps to 64 values: queries of the target tokens against the mean key of
each reference's tokens. Heads are trained with the network, not exported, and not used for sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipic_core.conditioning.sequence import PackedLatents
from unipic_core.model.mmdit import MMDiT

from ..config.methods import Correspondence
from ..config.parse import ConfigError
from ..loop.metrics import Metrics
from .losses import full, weighted_mean

HEAD_WIDTH = 64
NOBODY = -1
"""Owner of a target token that is excluded from the loss."""

EARLY, FIRST = 0.8, 0.99
"""Smallest times counted by the metrics `early_*` and `first_*`: above EARLY the layout is decided; above FIRST the
noisy target shows nothing of it, so that the words alone tell which of two things goes where."""


@dataclass(frozen=True)
class Owners:
    """Reference shown by each target token, int64 [B, N_O], and by the background, int64 [B]; or NOBODY."""

    references: Tensor
    background: Tensor

    def to(self, device: torch.device | str) -> Owners:
        return Owners(self.references.to(device), self.background.to(device))

    @property
    def mask(self) -> Tensor:
        """Mask of a masked loss, float32 [B, N_O]: 0 for tokens that show only the background's reference."""
        only_background = (self.references == self.background[:, None]) & (self.background[:, None] != NOBODY)
        return (~only_background).float()

    def weights(self, background: float) -> Tensor:
        """Loss weights [B, N_O]: 1, `background` for background tokens, 0 for excluded tokens."""
        weight = torch.where(self.references == self.background[:, None], background, 1.0)
        return torch.where(self.references == NOBODY, torch.zeros_like(weight), weight)


class PointerHead(nn.Module):
    """Image tokens [B, S, width], the target's first -> logits [B, N_O, K] over the references."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, HEAD_WIDTH), nn.Linear(width, HEAD_WIDTH)

    def forward(self, tokens: Tensor, latents: PackedLatents) -> Tensor:
        tokens = self.norm(tokens)
        n = latents.num_target_tokens
        mean, exists = reference_means(latents)
        keys = self.key(mean.to(tokens) @ tokens[:, n:])
        logits = self.query(tokens[:, :n]) @ keys.mT / HEAD_WIDTH**0.5
        return full(logits).masked_fill(~exists[:, None], float("-inf"))


def reference_means(latents: PackedLatents) -> tuple[Tensor, Tensor]:
    """Return matrices [B, K, S - N_O] that average each reference's tokens, and [B, K] True for existing references."""
    tokens = latents.tokens
    most = max(len(shapes) - 1 for shapes in latents.shapes)
    mean = tokens.new_zeros(len(tokens), most, tokens.shape[1] - latents.num_target_tokens, dtype=torch.float32)
    exists = torch.zeros(len(tokens), most, dtype=torch.bool, device=tokens.device)
    for b, (_, *references) in enumerate(latents.shapes):
        start = 0
        for k, shape in enumerate(references):
            mean[b, k, start : start + shape.num_tokens] = 1 / shape.num_tokens
            exists[b, k] = True
            start += shape.num_tokens
    return mean, exists


def pointer_loss(logits: Tensor, owners: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy per sample, [B]: logits [B, N, K], owners [B, N], weights [B, N] (0: excluded)."""
    entropy = F.cross_entropy(logits.mT, owners.clamp(min=0), reduction="none")
    return weighted_mean(entropy, weights)


class CorrespondenceLoss(nn.Module):
    """Pointer heads of a network. Raises ConfigError for blocks that it does not have."""

    def __init__(self, options: Correspondence, network: MMDiT, seed: int) -> None:
        super().__init__()
        last = len(network.transformer_blocks) - 1
        if max(options.blocks) >= last:  # the last block outputs target tokens only
            raise ConfigError(f"correspondence.blocks must be below {last}, got {list(options.blocks)}")
        self.options, self.network = options, [network]  # in a list, so that its parameters are not registered here
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleDict({str(i): PointerHead(network.config.width) for i in options.blocks})

    @contextmanager
    def recording(self) -> Iterator[dict[str, list[Tensor]]]:
        """Record the image tokens after each chosen block during a forward pass."""
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.heads}

        def record(name: str) -> Any:
            return lambda block, args, output: None if output[0] is None else outputs[name].append(output[0])

        blocks = self.network[0].transformer_blocks
        hooks = [blocks[int(name)].register_forward_hook(record(name)) for name in self.heads]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()

    def forward(
        self, outputs: dict[str, list[Tensor]], latents: PackedLatents, owners: Owners, dropped: Tensor, t: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Weighted loss [B], and metrics: shares of the tokens that are items at early times (at the first times), and
        of those that the last head classifies correctly.

        dropped: bool [B], samples without their prompt, which are excluded. t: [B].
        """
        weights = owners.weights(self.options.background)
        weights = torch.where(dropped[:, None], torch.zeros_like(weights), weights)
        logits = [self.heads[name](in_sequence(parts), latents) for name, parts in outputs.items()]
        losses = torch.stack([pointer_loss(one, owners.references, weights) for one in logits]).mean(0)
        items = (weights > 0) & (owners.references != owners.background[:, None])
        correct = items & (logits[-1].argmax(-1) == owners.references)
        metrics = {"correspondence": float(losses.detach().mean())}
        for name, least in (("early", EARLY), ("first", FIRST)):
            counted = (t >= least)[:, None]
            metrics[f"{name}_things"] = float((items & counted).float().mean())
            metrics[f"{name}_things_right"] = float((correct & counted).float().mean())
        return self.options.weight * losses, metrics


def in_sequence(parts: Sequence[Tensor]) -> Tensor:
    """Join a block's outputs as [target | references]; causal attention forms compute the references first."""
    return torch.cat([parts[-1], *parts[:-1]], dim=1)
