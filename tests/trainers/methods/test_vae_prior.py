import pytest
import torch

from trainers.methods.vae_prior import PrincipalComponents, fold_statistics
from unipic_core.model.vae import ImageVAE, VAEConfig


@pytest.fixture
def pictures() -> torch.Tensor:
    """Smooth random pictures: coarse components are the strongest."""
    noise = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, size=(64, 64), mode="bicubic").clamp(-1, 1)


def test_components_are_linear_ordered_and_of_unit_power(pictures):
    components = PrincipalComponents(pictures, 16)
    z = components(pictures)
    assert z.shape == (24, 16, 8, 8)
    assert z.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert z.square().mean().item() == pytest.approx(1, abs=1e-3)
    std = z.std(dim=(0, 2, 3))
    assert (std[:-1] >= std[1:] - 1e-3).all()
    half = 0.3 * pictures[:2] + 0.7 * pictures[2:4]
    torch.testing.assert_close(components(half), 0.3 * z[:2] + 0.7 * z[2:4], atol=1e-4, rtol=0)
    shifted = components(pictures.roll((8, 16), dims=(2, 3)))  # whole patches
    torch.testing.assert_close(shifted, z.roll((1, 2), dims=(2, 3)), atol=1e-5, rtol=0)


def test_components_are_half_whitened(pictures):
    """The variance in the latents is the deviation in the picture, up to one factor."""
    patches = torch.nn.functional.unfold(pictures, 8, stride=8).transpose(1, 2).flatten(0, 1)
    std = torch.linalg.svdvals(patches - patches.mean(0))[:16] / len(patches) ** 0.5
    variance = PrincipalComponents(pictures, 16)(pictures).var(dim=(0, 2, 3))
    torch.testing.assert_close(variance, std / std.mean(), atol=1e-2, rtol=0)


def test_folded_statistics_change_latents_and_nothing_else(pictures):
    torch.manual_seed(0)
    vae = ImageVAE(VAEConfig(base_dim=4, num_res_blocks=1)).eval()
    with torch.no_grad():
        mean, log_var = vae.posterior(pictures)
        decoded = vae.decode_raw(mean)
        fold_statistics(vae, pictures)
        new_mean, new_log_var = vae.posterior(pictures)
        torch.testing.assert_close(vae.decode_raw(new_mean), decoded, atol=1e-4, rtol=1e-3)
        latents = vae.encode(pictures)
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-3
    assert latents.square().mean().item() == pytest.approx(1, abs=1e-3)
    relative = (log_var.exp() / mean.var(dim=(0, 2, 3))[:, None, None]).log()
    new_relative = (new_log_var.exp() / new_mean.var(dim=(0, 2, 3))[:, None, None]).log()
    torch.testing.assert_close(new_relative, relative, atol=1e-3, rtol=1e-3)
