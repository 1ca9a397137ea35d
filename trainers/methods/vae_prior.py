"""Prior of a small VAE: latents linear in the picture, with the release's statistics.

The network moves and resizes parts of its references in latent space. A shift of the picture acts linearly on linear
latents, unlike those of an unconstrained VAE, and their strong components are the coarse ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unipic_core.conditioning.sequence import VAE_SCALE
from unipic_core.model.vae import ImageVAE


class PrincipalComponents:
    """Strongest principal components of 8x8 patches, half whitened: a standard deviation s becomes sqrt(s / mean s).

    The mean square over all channels is 1, and coarse channels stay stronger, but less so than in the picture.
    """

    def __init__(self, pictures: Tensor, channels: int) -> None:
        """pictures: [N, 3, H, W] in [-1, 1], to compute the components from."""
        patches = F.unfold(pictures, VAE_SCALE, stride=VAE_SCALE).transpose(1, 2).flatten(0, 1).double()
        mean = patches.mean(0)
        variances, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        std = variances[-channels:].flip(0).clamp(min=1e-8).sqrt()
        basis = vectors[:, -channels:].flip(1).T
        basis = basis * basis.sum(1, keepdim=True).sign()  # the sign of an eigenvector is arbitrary
        kernel = basis / (std * std.mean()).sqrt()[:, None]
        self.kernel = kernel.float().reshape(channels, 3, VAE_SCALE, VAE_SCALE)
        self.bias = -(kernel @ mean).float()

    def __call__(self, pictures: Tensor) -> Tensor:
        """Project pictures [B, 3, H, W] to float32 [B, channels, H/8, W/8]."""
        kernel, bias = self.kernel.to(pictures.device), self.bias.to(pictures.device)
        return F.conv2d(pictures.float(), kernel, bias, stride=VAE_SCALE)


@torch.no_grad()
def fold_statistics(vae: ImageVAE, pictures: Tensor) -> None:
    """Rescale the latents, inside the VAE's 1x1 convolutions, to the means and deviations of its config.

    ComfyUI has the release's statistics built in, so a small VAE must have them too. Means are shifted per channel; the
    current scale is measured over all channels together, so that strong channels stay strong. pictures [N, 3, H, W]: to
    measure on. Decoded pictures do not change.
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
