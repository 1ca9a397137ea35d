"""One sampling run: a LATENT, its masks and its noise through ComfyUI's sampling."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....unipic_core.errors import UniPicError
from ....unipic_core.run.plan import Settings
from ..model.kv_cache import TIME_ROUNDING
from ..wires import check_conditioning, check_model, kind_of
from .conditionings import adapt_conditionings, check_latent
from .guidance import with_guidance
from .model_sampling import check_times
from .samplers import ksampler


def prepared(model: ModelPatcher, latent: dict[str, Any]) -> Tensor:
    """The latent as the MODEL takes it, [B, C, 1, H, W]. UniPicError for a model or a latent of another kind."""
    check_model(model)
    if not isinstance(latent, dict) or not isinstance(latent.get("samples"), Tensor):
        raise UniPicError(f"latent must be a LATENT, got {kind_of(latent)}; connect that of Multi-Image Compose")
    check_times(model.get_model_object("model_sampling"), type(model.model).__name__)
    scales = [latent.get(f"downscale_ratio_{way}") for way in ("spacial", "temporal")]
    x = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *scales)
    channels = model.get_model_object("latent_format").latent_channels
    check_latent(x, channels)
    return x


def picture_masks(mask: Tensor | None, pictures: int) -> Tensor | None:
    """A LATENT's mask [H, W], [B, H, W] or [B, 1, H, W] as [B, 1, 1, H, W]; B is 1 or the number of pictures.

    ComfyUI takes the masks of a batch for frames of one picture and averages them, unless they have five dimensions.
    UniPicError for another number of masks, and for NaN.
    """
    if mask is None:
        return None
    masks = mask if mask.ndim == 5 else mask.reshape(-1, 1, 1, *mask.shape[-2:])
    if len(masks) not in (1, pictures):
        raise UniPicError(
            f"the latent must have one mask, or one for each of its {pictures} pictures, got {len(masks)}; connect "
            "another mask"
        )
    if bool(masks.isnan().any()):
        raise UniPicError("the latent's mask must hold numbers from 0 to 1, got NaN; draw the mask again")
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
    """Run the settings' sampler over the sigmas, with the latent's mask and batch_index. Returns a LATENT."""
    x = prepared(model, latent)
    check_conditioning("positive", positive)
    check_conditioning("negative", negative)
    model = model.clone() if settings.guidance == 1 else with_guidance(model)
    adapt_conditionings(model)  # also a stock loader's MODEL
    model.model_options.setdefault("transformer_options", {})[TIME_ROUNDING] = settings.time_rounding
    pictures = latent.get("batch_index")
    options = {"pictures": pictures} if settings.sampler == "consistency" and pictures is not None else {}
    samples = comfy.sample.sample_custom(
        model,
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
    others = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio_")}
    return {**others, "samples": samples}
