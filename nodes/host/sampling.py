"""Between ComfyUI's sampling and the core's samplers, schedules and guidance.

ComfyUI's model is asked for x0 of latents [B, C, 1, H, W] at sigma; for flow models sigma is t in [0, 1].

Where noise comes from. The start is ComfyUI's `prepare_noise`: one generator for the whole batch, so picture i of a
batch comes again alone with `batch_index` i, not with a seed of its own. The noise added after step k to picture i is
draw k of ComfyUI's default noise sampler for one picture, seeded with seed + i * PICTURE_STRIDE: it depends on (seed,
step, picture) alone. For one picture that is what the stock `lcm` sampler draws; for more, `lcm` draws the whole batch
at once. Like every sampler of ComfyUI's it draws on the latent's device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from tqdm.auto import tqdm

from ...unipic_core.conditioning.sequence import PATCH, LatentShape, pack_latents, unpack_latents
from ...unipic_core.errors import UniPicError
from ...unipic_core.run.plan import Settings, resolve
from ...unipic_core.sampling import samplers
from ...unipic_core.sampling.flow import x0_to_velocity
from ...unipic_core.sampling.guidance import apply_cfg
from ...unipic_core.sampling.samplers import NoiseSource, NonFiniteLatent
from ...unipic_core.sampling.schedules import Shift
from .model_sampling import check_times
from .recipe_attachment import Facts

PICTURE_STRIDE = 1_000_003
"""Between the re-noising seeds of neighbours in a batch; large, so that they do not meet those of the next seeds."""

Callback = Callable[[dict[str, Any]], None]
"""What ComfyUI calls after each step, with x, i, sigma, sigma_hat and denoised."""

ADVICE = (
    "load the model as bf16 (never fp16), start ComfyUI without --use-sage-attention, and check that the weights were "
    "downloaded completely"
)


# --- schedules ---


def sigmas(facts: Facts, steps: int | None, num_target_tokens: int, denoise: float = 1.0) -> Tensor:
    """The times of a run as ComfyUI's SIGMAS: 1-D float32, ending in 0. steps: None = from the recipe."""
    return sigmas_of(resolve(facts.recipe, steps), facts.shift, num_target_tokens, denoise)


def sigmas_of(settings: Settings, shift: Shift, num_target_tokens: int, denoise: float = 1.0) -> Tensor:
    """As `sigmas`. denoise below 1: the last `steps` steps of a schedule of steps / denoise, as KSampler does it.

    denoise 0 gives no times at all, and sampling then returns the latent as it is.
    """
    if denoise <= 0:
        return torch.zeros(0)
    total = settings.steps if denoise > 0.9999 else max(int(settings.steps / denoise), settings.steps)
    times = replace(settings, steps=total).times(num_target_tokens, shift)
    return times[-(settings.steps + 1) :].float()


def target_tokens(latent: Tensor) -> int:
    """Tokens of a latent [..., H, W]; odd sizes are filled up to whole tokens, as ComfyUI's Qwen model does."""
    height, width = latent.shape[-2:]
    return math.ceil(height / PATCH) * math.ceil(width / PATCH)


# --- samplers ---


def ksampler(name: str, **options: object) -> comfy.samplers.KSAMPLER:
    """ComfyUI's SAMPLER for one of the core's samplers ("consistency", "euler").

    options of "consistency": `step_noise`, the noises to add instead of seeded ones, one [B, C, 1, H, W] per step but
    the last; `pictures`, the index of each latent of the batch, where it is not its place.
    """
    return comfy.samplers.KSAMPLER({"consistency": sample_consistency, "euler": sample_euler}[name], options)


def sample_consistency(
    model: object,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    step_noise: Sequence[Tensor] | None = None,
    pictures: Sequence[int] | None = None,
) -> Tensor:
    """Predict x0, re-noise to the next sigma; a sampler function of ComfyUI's around `samplers.renoise`."""
    seed = (extra_args or {}).get("seed") or 0
    noise = seeded_noise(x, seed, pictures) if step_noise is None else given_noise(x, step_noise)
    _check_falling(sigmas)
    with _run(model, sigmas, extra_args, callback, disable) as run:
        return samplers.renoise(run.predict, x, run.times, noise, run.report)


def sample_euler(
    model: object,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Euler's method; a sampler function of ComfyUI's around `samplers.sample_euler`.

    Rising sigmas invert: from a picture to the noise that makes it.
    """
    with _run(model, sigmas, extra_args, callback, disable) as run:
        return samplers.sample_euler(run.velocity, x, run.times, run.report)


def seeded_noise(x: Tensor, seed: int, pictures: Sequence[int] | None = None) -> NoiseSource:
    """Noise like x [B, ...] by the rule above. To be asked once per step, in order."""
    pictures = range(len(x)) if pictures is None else pictures
    seeds = [(seed + picture * PICTURE_STRIDE) % (2**64 - 1) for picture in pictures]  # one is added to it on the CPU
    draws = [comfy.k_diffusion.sampling.default_noise_sampler(x[:1], seed=s) for s in seeds]
    return lambda step: torch.cat([draw(None, None) for draw in draws])


def given_noise(x: Tensor, step_noise: Sequence[Tensor]) -> NoiseSource:
    """The given noises, each of x's shape. UniPicError for another shape or too few of them."""

    def noise(step: int) -> Tensor:
        if step >= len(step_noise) or step_noise[step].shape != x.shape:
            got = [list(n.shape) for n in step_noise]
            raise UniPicError(f"step_noise must hold a noise {list(x.shape)} for step {step + 1}, got {got}")
        return step_noise[step].to(x)

    return noise


@dataclass
class _Run:
    """One run of a sampler: asks ComfyUI's model, reports each step, stops when the user interrupts."""

    model: Any
    sigmas: Tensor
    extra_args: dict[str, Any]
    callback: Callback | None
    bar: Any
    x_t: Tensor | None = None

    @property
    def times(self) -> list[float]:
        return self.sigmas.tolist()

    def predict(self, x_t: Tensor, t: float) -> Tensor:
        """x0 [B, C, 1, H, W]."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.x_t = x_t
        return self.model(x_t, t * x_t.new_ones(len(x_t)), **self.extra_args)

    def velocity(self, x_t: Tensor, t: float) -> Tensor:
        return x0_to_velocity(x_t, self.predict(x_t, t), t)

    def report(self, step: int, t_next: float, x_t: Tensor, x0: Tensor) -> None:
        """ComfyUI wants the latent that the step began with."""
        self.bar.update()
        if self.callback is not None:
            sigma = self.sigmas[step]
            self.callback({"x": self.x_t, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})


@contextmanager
def _run(
    model: object, sigmas: Tensor, extra_args: dict[str, Any] | None, callback: Callback | None, disable: bool | None
) -> Iterator[_Run]:
    """A run with a progress bar on the console. UniPicError for sigmas of another kind of model, and for NaN."""
    in_range = (sigmas >= 0) & (sigmas <= 1)  # false for NaN; 0 is for the end alone
    if not bool(in_range.all() and (sigmas[:-1] > 0).all()):
        raise _wrong_sigmas(sigmas, "make them with UniPic Sigmas")
    if sigmas[-1] == 1:  # ComfyUI divides the result by 1 - the last sigma
        raise _wrong_sigmas(sigmas, "to invert a picture with euler, let them rise to 0.999")
    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:
        try:
            yield _Run(model, sigmas, extra_args or {}, callback, bar)
        except NonFiniteLatent as error:
            raise NonFiniteLatent(error.step, ADVICE) from None


def _check_falling(sigmas: Tensor) -> None:
    """UniPicError for sigmas that rise: the noise added after a step is that of a later, smaller time."""
    if bool((sigmas.diff() > 0).any()):
        raise _wrong_sigmas(
            sigmas, "make them with UniPic Sigmas, or choose euler, which can follow the flow backwards"
        )


def _wrong_sigmas(sigmas: Tensor, advice: str) -> UniPicError:
    got = ", ".join(f"{s:.4g}" for s in sigmas.tolist())
    return UniPicError(f"the sigmas should fall from at most 1 to 0, got {got}; {advice}")


# --- guidance ---


def with_guidance(model: ModelPatcher) -> Any:
    """A clone of the MODEL that guides as the release does; one that has a guidance of its own keeps it."""
    clone = model.clone()
    if "sampler_cfg_function" not in clone.model_options:
        clone.set_model_sampler_cfg_function(guide)
    return clone


def guide(args: dict[str, Any]) -> Tensor:
    """x - x0 of the guided velocity, from ComfyUI's x - x0 with and without the text: `apply_cfg` per packed token."""
    if math.isclose(args["cond_scale"], 1.0):  # then the unconditional pass may have been left out
        return args["cond"]
    sigma = args["sigma"].reshape(-1, *[1] * (args["cond"].ndim - 1))
    (cond, shape), (uncond, _) = _pack(args["cond"] / sigma), _pack(args["uncond"] / sigma)
    height, width = args["cond"].shape[-2:]
    v = unpack_latents(apply_cfg(cond, uncond, args["cond_scale"]), shape)[..., :height, :width]
    return v * sigma


def _pack(v: Tensor) -> tuple[Tensor, LatentShape]:
    """Tokens of a velocity [B, C, 1, H, W]; zeros fill up odd sizes, which leaves norms as they are."""
    height, width = v.shape[-2:]
    v = F.pad(v, (0, width % PATCH, 0, height % PATCH))
    return pack_latents(v), LatentShape.of_latents(v)


# --- a whole run ---


def prepared(model: ModelPatcher, latent: dict[str, Any]) -> Tensor:
    """The latent [B, C, 1, H, W] as the MODEL takes it. UniPicError for a model or a latent of another kind."""
    check_times(model.get_model_object("model_sampling"), type(model.model).__name__)
    scales = [latent.get(f"downscale_ratio_{way}") for way in ("spacial", "temporal")]
    x = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *scales)
    channels = model.get_model_object("latent_format").latent_channels
    if x.ndim != 5 or x.shape[1] != channels or x.shape[2] != 1:
        raise UniPicError(
            f"the model wants latents [batch, {channels}, 1, height, width], got {list(latent['samples'].shape)}; take "
            "them from Multi-Image Compose, or encode the picture with the VAE of Load UniPic"
        )
    return x


def picture_masks(mask: Tensor | None, pictures: int) -> Tensor | None:
    """A LATENT's mask [H, W], [B, H, W] or [B, 1, H, W] as [B, 1, 1, H, W]; B is 1 or the number of pictures.

    ComfyUI reads the masks of a batch as the frames of one picture and averages them, unless they have five dimensions.
    UniPicError for another number of masks, and for NaN.
    """
    if mask is None:
        return None
    masks = mask if mask.ndim == 5 else mask.reshape(-1, 1, 1, *mask.shape[-2:])
    if len(masks) not in (1, pictures):
        raise UniPicError(f"the latent has {len(masks)} masks for {pictures} pictures; give it one, or one for each")
    if bool(masks.isnan().any()):
        raise UniPicError("the latent's mask should hold numbers from 0 to 1 and holds NaN; make it again")
    return masks


def sample(
    model: ModelPatcher,
    positive: object,
    negative: object,
    latent: dict[str, Any],
    seed: int,
    settings: Settings,
    sigmas: Tensor,
) -> dict[str, Any]:
    """Run settings' sampler over the sigmas; the latent's mask and batch_index are respected. Returns a LATENT."""
    x = prepared(model, latent)
    pictures = latent.get("batch_index")
    options = {"pictures": pictures} if settings.sampler == "consistency" and pictures is not None else {}
    samples = comfy.sample.sample_custom(
        model if settings.guidance == 1 else with_guidance(model),
        comfy.sample.prepare_noise(x, seed, pictures),
        settings.guidance,
        ksampler(settings.sampler, **options),
        sigmas,
        positive,
        negative,
        x,
        noise_mask=picture_masks(latent.get("noise_mask"), len(x)),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    kept = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio_")}
    return {**kept, "samples": samples}
