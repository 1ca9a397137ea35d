"""Token pointer loss: in chosen blocks some head attends from a target token to the reference token that it shows.

It needs the place that each target token shows, which the geometry of a drawn scene gives. It trains the network's
attention itself, without parameters of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unipic_core.conditioning.sequence import LatentShape, PackedLatents
from unipic_core.model.config import FULL
from unipic_core.model.mmdit import MMDiT

from ..config.methods import Correspondence
from ..config.parse import ConfigError
from ..loop.metrics import Metrics
from .correspondence import Owners
from .losses import full, weighted_mean

Recorded = dict[int, tuple[Tensor, Tensor]]
"""Block -> queries and keys over [text | target | references], each [B, H, L + S, D], normalised and rotated."""

NEAREST = 4
"""Reference tokens around a place."""


@dataclass(frozen=True)
class ShownTokens:
    """Reference tokens nearest to what each target token shows.

    indices: int64 [B, N_O, 4], from the first reference token. shares: float32 [B, N_O, 4], bilinear weights of the
    four, which sum to 1; all 0 for a target token whose source is not certain.
    """

    indices: Tensor
    shares: Tensor

    def to(self, device: torch.device | str) -> ShownTokens:
        return ShownTokens(self.indices.to(device), self.shares.to(device))

    def weights(self, owners: Owners, background: float, dropped: Tensor) -> Tensor:
        """Loss weights [B, N_O]: 1, `background` for background tokens, 0 without a source and for dropped prompts."""
        weight = torch.where(owners.mask == 0, background, 1.0) * (self.shares.sum(-1) > 0)
        return weight.masked_fill(dropped[:, None], 0.0)


def shown_tokens(sources: Tensor, places: Sequence[int], references: Sequence[LatentShape]) -> tuple[Tensor, Tensor]:
    """Return indices and shares, each [N, 4], of one sample's `ShownTokens`.

    sources [N, 3]: source, and x and y as shares of the width and height of its picture; places: source of each
    reference.
    """
    indices, shares = torch.zeros(len(sources), NEAREST, dtype=torch.int64), torch.zeros(len(sources), NEAREST)
    start = 0
    for source, shape in zip(places, references, strict=True):
        mine = sources[:, 0] == source
        nearest, share = nearest_tokens(sources[mine, 1:], shape)
        indices[mine], shares[mine] = start + nearest, share
        start += shape.num_tokens
    return indices, shares


def nearest_tokens(places: Tensor, shape: LatentShape) -> tuple[Tensor, Tensor]:
    """The four tokens around places [N, 2] (x, y from 0 to 1) of a picture, and their bilinear weights; each [N, 4]."""
    last = torch.tensor([shape.width - 1, shape.height - 1])
    at = torch.minimum((places * (last + 1) - 0.5).clamp(min=0), last)
    low = at.floor()
    high, part = torch.minimum(low + 1, last), at - low
    corners = [(low, 1 - part), (high, part)]
    indices = [y[:, 1] * shape.width + x[:, 0] for y, _ in corners for x, _ in corners]
    shares = [y[:, 1] * x[:, 0] for _, y in corners for _, x in corners]
    return torch.stack(indices, dim=1).long(), torch.stack(shares, dim=1)


def token_pointer_loss(
    q: Tensor, k: Tensor, exists: Tensor, shown: ShownTokens, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted mean per sample [B] of -log mean_h sum_j s_j A_h(j), and A [B, H, N, M] without gradient.

    q [B, H, N, D]: of the target tokens; k [B, H, M, D]: of the reference tokens; exists: bool [B, M], False for
    padding; weights [B, N] (0: excluded). s: shares of the four reference tokens j that a target token shows. One head
    that finds them is enough: the gradient of the mean goes to the heads that already find them best.
    """
    with torch.autocast(q.device.type, enabled=False):
        # A_h = softmax over the reference tokens of q_h k_h^T / sqrt(D)
        scores = full(q) @ full(k).mT / math.sqrt(q.shape[-1])
        log_a = scores.masked_fill(~exists[:, None, None], float("-inf")).log_softmax(-1)
        # L = -log(1/H sum_h sum_j s_j A_h(j)), in logarithms
        nearest = log_a.gather(-1, shown.indices[:, None].expand(-1, q.shape[1], -1, -1))
        counted = weights > 0
        log_shares = torch.where(counted[..., None], shown.shares, 1.0).log()
        log_p = (nearest + log_shares[:, None]).transpose(1, 2).flatten(2).logsumexp(-1) - math.log(q.shape[1])
        return weighted_mean(torch.where(counted, -log_p, 0.0), weights), log_a.detach().exp()


class TokenPointer:
    """Token pointer loss of a network's blocks. Raises ConfigError for blocks or attention forms without it."""

    def __init__(self, options: Correspondence, network: MMDiT, attention_form: str) -> None:
        last = len(network.transformer_blocks) - 1
        if max(options.token_blocks) >= last:  # the last block computes queries of target tokens only
            raise ConfigError(f"correspondence.token_blocks must be below {last}, got {list(options.token_blocks)}")
        if attention_form != FULL:
            raise ConfigError(
                f"correspondence.token_weight needs attention_form {FULL}, got {attention_form}; set token_weight to 0"
            )
        self.options, self.network = options, network

    @contextmanager
    def recording(self) -> Iterator[Recorded]:
        """Record queries and keys of the chosen blocks during a forward pass."""
        recorded: Recorded = {}

        def record(block: int) -> Any:
            def with_recorder(layer: object, args: tuple[Any, ...]) -> tuple[Any, ...]:
                img, txt, state = args

                def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
                    recorded[block] = q, k
                    attended: Tensor = state.attention(q, k, v, mask)
                    return attended

                return img, txt, replace(state, attention=attention)

            return with_recorder

        blocks: Any = self.network.transformer_blocks
        hooks = [blocks[i].attn.register_forward_pre_hook(record(i)) for i in self.options.token_blocks]
        try:
            yield recorded
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(
        self, recorded: Recorded, latents: PackedLatents, shown: ShownTokens, weights: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Weighted loss [B], and metrics: `token_pointer`, the mean loss of a block; `token_pointer_right`, the
        weighted share of tokens whose best head of the last block attends most to one of the four nearest tokens."""
        n, images = latents.num_target_tokens, latents.tokens.shape[1]
        exists = latents.tokens.new_ones(len(latents.tokens), images - n, dtype=torch.bool)
        if latents.mask is not None:
            exists = latents.mask[:, n:]
        losses = []
        for q, k in (recorded[i] for i in self.options.token_blocks):
            words = q.shape[2] - images
            of_target, of_references = q[:, :, words : words + n], k[:, :, words + n :]
            loss, attention = token_pointer_loss(of_target, of_references, exists, shown, weights)
            losses.append(loss)
        mean = torch.stack(losses).mean(0)
        right = weighted_share(found(attention, shown), weights)
        return self.options.token_weight * mean, {
            "token_pointer": float(mean.detach().mean()),
            "token_pointer_right": right,
        }


def found(attention: Tensor, shown: ShownTokens) -> Tensor:
    """Target tokens whose best head attends most to one of the four tokens; bool [B, N]. attention: [B, H, N, M]."""
    indices = shown.indices[:, None].expand(-1, attention.shape[1], -1, -1)
    best = (attention.gather(-1, indices) * shown.shares[:, None]).sum(-1).argmax(1)
    most = attention.argmax(-1).gather(1, best[:, None])[:, 0]
    return ((shown.indices == most[..., None]) & (shown.shares > 0)).any(-1)


def weighted_share(right: Tensor, weights: Tensor) -> float:
    """Weighted share of True over all tokens of a batch; 0 without any weight."""
    return float((weights * right).sum() / weights.sum().clamp(min=1e-6))
