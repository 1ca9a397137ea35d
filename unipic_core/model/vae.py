"""The Qwen-Image VAE for single pictures, as a 2-D network.

The VAE is a causal video model (Wan 2.1). A picture is one frame: every causal 3-D convolution is padded with zeros
before it, so only the last temporal slice of its kernel acts, and the temporal resamplers never run. The remaining 2-D
network gives the same numbers with about a third of the arithmetic. Parameter names are those of diffusers'
`AutoencoderKLQwenImage`; weights/vae.py reads and writes its files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvOperations, LayerClass

RELEASED_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
RELEASED_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE and the statistics for normalising its latents, named as in diffusers' config.json.

    The defaults are the release's.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = RELEASED_MEAN
    latents_std: tuple[float, ...] = RELEASED_STD

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> VAEConfig:
        values: dict[str, Any] = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a diffusers vae/config.json."""
        fixed = {"_class_name": "AutoencoderKLQwenImage", "attn_scales": [], "dropout": 0.0, "input_channels": 3}
        return {**fixed, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}


class ImageVAE(nn.Module):
    """Autoencoder: pictures [B, 3, H, W] in [-1, 1] <-> normalised latents [B, z, 1, H/8, W/8]."""

    def __init__(self, config: VAEConfig, *, operations: ConvOperations = nn, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        c = config
        conv = _conv_factory(operations, dtype)
        dims = [c.base_dim * m for m in (1, *c.dim_mult)]
        self.encoder = Encoder(dims, c.num_res_blocks, 2 * c.z_dim, conv)
        self.quant_conv = conv(2 * c.z_dim, 2 * c.z_dim, 1)
        self.post_quant_conv = conv(c.z_dim, c.z_dim, 1)
        self.decoder = Decoder([c.base_dim * m for m in (c.dim_mult[-1], *c.dim_mult[::-1])], c, conv)

    def forward(self, pictures: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        """Training pass: the decoded posterior sample, not clamped, and the posterior's mean and log variance.

        generators: one per picture, on the CPU.
        """
        mean, log_var = self.posterior(pictures)
        eps = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators]).to(mean)
        return self.decode_raw(mean + eps * (0.5 * log_var).exp()), mean, log_var

    def posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log variance [B, z, H/8, W/8], before normalisation."""
        mean, log_var = self.quant_conv(self.encoder(pictures)).chunk(2, dim=1)
        return mean, log_var.clamp(-30, 20)

    def encode(self, pictures: Tensor) -> Tensor:
        """Encode to the normalised posterior mode (z - latents_mean) / latents_std, always float32."""
        z = self.posterior(pictures.to(self.quant_conv.weight))[0].float()
        mean, std = self._statistics(z)
        # UniPic 3, eq. 5: the latent of the target or of a reference
        return ((z - mean) / std)[:, :, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents [B, z, 1, h, w] to pictures [B, 3, 8h, 8w] float32, clamped to [-1, 1]."""
        z = latents[:, :, 0].float()
        mean, std = self._statistics(z)
        z = (z * std + mean).to(self.quant_conv.weight)
        return self.decode_raw(z).float().clamp(-1, 1)

    def decode_raw(self, z: Tensor) -> Tensor:
        """Decode unnormalised latents [B, z, h, w] to pictures [B, 3, 8h, 8w], not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        stats = z.new_tensor([self.config.latents_mean, self.config.latents_std])[..., None, None]
        return stats[0], stats[1]


def channels_last(vae: ImageVAE) -> ImageVAE:
    """Convert the kernels to channels_last, the fastest memory format on CPUs; inputs should have it too."""
    for p in vae.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return vae


def _conv_factory(operations: ConvOperations, dtype: torch.dtype | None) -> Any:
    def conv(in_dim: int, out_dim: int, kernel: int, stride: int = 1) -> nn.Module:
        padding = kernel // 2 if stride == 1 else 0
        return operations.Conv2d(in_dim, out_dim, kernel, stride=stride, padding=padding, dtype=dtype)

    return conv


class ChannelNorm(nn.Module):
    """RMS norm over channels, x / |x| * sqrt(dim) * gamma; the norm is computed in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=1).to(x.dtype) * (x.shape[1] ** 0.5 * self.gamma)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, conv: LayerClass) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(in_dim), conv(in_dim, out_dim, 3)
        self.norm2, self.conv2 = ChannelNorm(out_dim), conv(out_dim, out_dim, 3)
        self.conv_shortcut = conv(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + self.conv_shortcut(x)


class AttentionBlock(nn.Module):
    """Single-head attention over the pixels of the lowest resolution."""

    def __init__(self, dim: int, conv: LayerClass) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.proj = ChannelNorm(dim), conv(dim, 3 * dim, 1), conv(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(b, 1, 3 * c, h * w).transpose(2, 3)
        out = F.scaled_dot_product_attention(*(p.contiguous() for p in qkv.chunk(3, dim=-1)))
        return x + self.proj(out.transpose(2, 3).reshape(b, c, h, w))


class MidBlock(nn.Module):
    def __init__(self, dim: int, conv: LayerClass) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(dim, conv)])
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim, conv), ResidualBlock(dim, dim, conv)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, dim: int, conv: LayerClass) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(dim, dim, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class Upsample(nn.Module):
    def __init__(self, dim: int, conv: LayerClass) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"), conv(dim, dim // 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class Encoder(nn.Module):
    def __init__(self, dims: list[int], num_res_blocks: int, out_dim: int, conv: LayerClass) -> None:
        super().__init__()
        self.conv_in = conv(3, dims[0], 3)
        blocks: list[nn.Module] = []
        for level, (dim, next_dim) in enumerate(pairwise(dims)):
            for block in range(num_res_blocks):
                blocks.append(ResidualBlock(next_dim if block else dim, next_dim, conv))
            if level < len(dims) - 2:
                blocks.append(Downsample(next_dim, conv))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(dims[-1], conv)
        self.norm_out, self.conv_out = ChannelNorm(dims[-1]), conv(dims[-1], out_dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class UpBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, upsample: bool, conv: LayerClass) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(out_dim if i else in_dim, out_dim, conv) for i in range(num_blocks))
        self.upsamplers = nn.ModuleList([Upsample(out_dim, conv)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Decoder(nn.Module):
    def __init__(self, dims: list[int], config: VAEConfig, conv: LayerClass) -> None:
        super().__init__()
        self.conv_in = conv(config.z_dim, dims[0], 3)
        self.mid_block = MidBlock(dims[0], conv)
        last = len(dims) - 2
        self.up_blocks = nn.ModuleList(
            UpBlock(dim if i == 0 else dim // 2, next_dim, config.num_res_blocks + 1, i < last, conv)
            for i, (dim, next_dim) in enumerate(pairwise(dims))
        )
        self.norm_out, self.conv_out = ChannelNorm(dims[-1]), conv(dims[-1], 3, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))
