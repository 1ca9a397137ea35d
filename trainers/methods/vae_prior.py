"""Where a small VAE's latents should lie: linear in the picture, and with the release's statistics.

A network that moves and resizes what it sees in its references works on latents. In the latents of an unguided VAE a
shift of the picture is a tangle; in linear ones it is linear, and strong components are the coarse ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unipic_core.conditioning.sequence import VAE_SCALE
from unipic_core.model.vae import ImageVAE


class PrincipalComponents:
    """The strongest principal components of 8x8 patches, half whitened: a deviation s becomes sqrt(s / mean s).

    So the mean square over all channels is 1, and coarse ones are the stronger, but less than in the picture.
    """

    def __init__(self, pictures: Tensor, channels: int) -> None:
        """pictures: [N, 3, H, W] in [-1, 1], to measure the components on."""
        patches = F.unfold(pictures, VAE_SCALE, stride=VAE_SCALE).transpose(1, 2).flatten(0, 1).double()
        mean = patches.mean(0)
        variances, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        std = variances[-channels:].flip(0).clamp(min=1e-8).sqrt()
        basis = vectors[:, -channels:].flip(1).T
        basis = basis * basis.sum(1, keepdim=True).sign()  # eigenvectors have no sign of their own
        kernel = basis / (std * std.mean()).sqrt()[:, None]
        self.kernel = kernel.float().reshape(channels, 3, VAE_SCALE, VAE_SCALE)
        self.bias = -(kernel @ mean).float()

    def __call__(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, channels, H/8, W/8] float32."""
        kernel, bias = self.kernel.to(pictures.device), self.bias.to(pictures.device)
        return F.conv2d(pictures.float(), kernel, bias, stride=VAE_SCALE)


@torch.no_grad()
def fold_statistics(vae: ImageVAE, pictures: Tensor) -> None:
    """Rescale the latents, inside the VAE's own 1x1 convolutions, to the means and deviations of its config.

    So a small VAE has the release's statistics, which ComfyUI has built in. Means are moved channel by channel; the
    scale before the config's is one for all channels, so that strong ones stay strong. pictures [N, 3, H, W]: to
    measure on. What is decoded stays the same.
    """
    z = torch.cat([vae.posterior(chunk)[0] for chunk in pictures.split(32)])
    mean = z.mean(dim=(0, 2, 3))
    one_scale = (z - mean[:, None, None]).square().mean().sqrt()
    new_mean, new_std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    factor = new_std / one_scale  # new z = factor (z - mean) + new_mean
    moved = new_mean - factor * mean
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = vae.config.z_dim
    quant.weight[:channels] *= factor[:, None, None, None]
    quant.bias[:channels] = factor * quant.bias[:channels] + moved
    quant.bias[channels:] += 2 * factor.log()  # the log variances
    post.bias -= post.weight[:, :, 0, 0] @ (moved / factor)
    post.weight /= factor[None, :, None, None]
