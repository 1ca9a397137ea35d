"""The correspondence loss: after some blocks, each target token points to the reference that is drawn there.

A pointer head is a LayerNorm and two linear maps to 64 values: queries of the target tokens against the mean key of
each reference's tokens. Heads train with the network and are never exported: they shape its tokens, and are not used
for sampling.
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
from .losses import full

HEAD_WIDTH = 64
NOBODY = -1
"""Owner of a target token that is left out."""

EARLY = 0.8
"""Times from which the places of things are decided; the metrics count the tokens there."""


@dataclass(frozen=True)
class Owners:
    """references: int64 [B, N_O], the reference shown by each target token, or NOBODY; background: int64 [B], the
    reference that shows the background, or NOBODY."""

    references: Tensor
    background: Tensor

    def to(self, device: torch.device | str) -> Owners:
        return Owners(self.references.to(device), self.background.to(device))

    def weights(self, background: float) -> Tensor:
        """[B, N_O]: 1, `background` where the background is shown, 0 where a token is left out."""
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
        mean, there = reference_means(latents)
        keys = self.key(mean.to(tokens) @ tokens[:, n:])
        logits = self.query(tokens[:, :n]) @ keys.mT / HEAD_WIDTH**0.5
        return full(logits).masked_fill(~there[:, None], float("-inf"))


def reference_means(latents: PackedLatents) -> tuple[Tensor, Tensor]:
    """([B, K, S - N_O], [B, K]): the matrix that averages each reference's tokens, and which references there are."""
    tokens = latents.tokens
    most = max(len(shapes) - 1 for shapes in latents.shapes)
    mean = tokens.new_zeros(len(tokens), most, tokens.shape[1] - latents.num_target_tokens, dtype=torch.float32)
    there = torch.zeros(len(tokens), most, dtype=torch.bool, device=tokens.device)
    for b, (_, *references) in enumerate(latents.shapes):
        start = 0
        for k, shape in enumerate(references):
            mean[b, k, start : start + shape.num_tokens] = 1 / shape.num_tokens
            there[b, k] = True
            start += shape.num_tokens
    return mean, there


def pointer_loss(logits: Tensor, owners: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy per sample, [B]: logits [B, N, K], owners [B, N], weights [B, N] (0: left out)."""
    entropy = F.cross_entropy(logits.mT, owners.clamp(min=0), reduction="none")
    return (weights * entropy).sum(1) / weights.sum(1).clamp(min=1e-6)


class CorrespondenceLoss(nn.Module):
    """The pointer heads of a network. Raises ConfigError for a block that it does not have."""

    def __init__(self, options: Correspondence, network: MMDiT, seed: int) -> None:
        super().__init__()
        last = len(network.transformer_blocks) - 1
        if max(options.blocks) >= last:  # the last block computes the target's tokens alone
            raise ConfigError(f"correspondence.blocks must be below {last}, got {list(options.blocks)}")
        self.options, self.network = options, [network]  # in a list: its parameters are not the heads'
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleDict({str(i): PointerHead(network.config.width) for i in options.blocks})

    @contextmanager
    def watching(self) -> Iterator[dict[str, list[Tensor]]]:
        """Collect the image tokens that leave each watched block while the network runs."""
        seen: dict[str, list[Tensor]] = {name: [] for name in self.heads}

        def keep(name: str) -> Any:
            return lambda block, args, output: None if output[0] is None else seen[name].append(output[0])

        blocks = self.network[0].transformer_blocks
        hooks = [blocks[int(name)].register_forward_hook(keep(name)) for name in self.heads]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def forward(
        self, seen: dict[str, list[Tensor]], latents: PackedLatents, owners: Owners, dropped: Tensor, t: Tensor
    ) -> tuple[Tensor, Metrics]:
        """weight x loss [B], and the share of target tokens that were asked and that were right early in sampling.

        dropped: bool [B], samples without their prompt, which are left out. t: [B].
        """
        weights = owners.weights(self.options.background)
        weights = torch.where(dropped[:, None], torch.zeros_like(weights), weights)
        logits = [self.heads[name](in_sequence(parts), latents) for name, parts in seen.items()]
        losses = torch.stack([pointer_loss(one, owners.references, weights) for one in logits]).mean(0)
        things = (weights > 0) & (owners.references != owners.background[:, None]) & (t >= EARLY)[:, None]
        right = things & (logits[-1].argmax(-1) == owners.references)
        metrics = {
            "correspondence": float(losses.detach().mean()),
            "early_things": float(things.float().mean()),
            "early_things_right": float(right.float().mean()),
        }
        return self.options.weight * losses, metrics


def in_sequence(parts: Sequence[Tensor]) -> Tensor:
    """[target | references] of what left a block: at once, or in the causal forms the references before the target."""
    return torch.cat([parts[-1], *parts[:-1]], dim=1)
