"""Conditionings for latents [B, C, 1, H, W]: areas, masks and references are adapted or refused.

ComfyUI's area, mask and training nodes were written for latents without a frame axis. A wrapper around a guider's whole
run changes that run's copies of the conditionings, so the nodes work as they are, with every sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....unipic_core.errors import UniPicError

KEY = "unipic_conditionings"

LEAST_AREA = 8
"""Least sides of the area around a mask, in latent pixels, as in ComfyUI."""


class ReferenceLatents(Sequence[Tensor]):
    """References of one conditioning; not a list, since TrainLoraNode walks lists down to single numbers."""

    def __init__(self, latents: Sequence[Tensor]) -> None:
        self.latents = tuple(latents)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        return self.latents[index]

    def __len__(self) -> int:
        return len(self.latents)


def adapt_conditionings(patcher: ModelPatcher) -> None:
    """Let a ModelPatcher and its clones adapt the conditionings of each run to its latents. Repeatable."""
    if KEY not in patcher.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _adapt_run)


def _adapt_run(executor: Any, noise: Tensor, latent: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wrapper of a guider's whole run. args: sampler, sigmas, denoise_mask, ... Raises UniPicError."""
    guider = executor.class_obj
    model = guider.model_patcher.model
    channels = guider.model_patcher.get_model_object("latent_format").latent_channels
    check_latent(latent, channels)
    mask = args[2] if len(args) > 2 else kwargs.get("denoise_mask")
    check_numbers("the latent's mask", mask)
    text = getattr(getattr(model.diffusion_model, "txt_in", None), "in_features", None)
    for conds in guider.conds.values():
        conds[:] = [adapted(cond, noise, channels, text) for cond in conds]
    return executor(noise, latent, *args, **kwargs)


def check_latent(latent: Tensor, channels: int) -> None:
    """UniPicError unless a latent is [batch, channels, 1, height, width] of finite numbers."""
    if latent.ndim != 5 or latent.shape[1] != channels or latent.shape[2] != 1 or 0 in latent.shape:
        raise UniPicError(
            f"the model expects a latent [batch, {channels}, 1, height, width], got {list(latent.shape)}; take it from "
            "Multi-Image Compose, or encode the picture with the VAE of Load UniPic; rotate pictures before encoding, "
            "since Rotate Latent mistakes the frame axis for a side"
        )
    check_numbers("the latent", latent)


def check_numbers(name: str, tensor: Tensor | None) -> None:
    """UniPicError for NaN and infinity."""
    if tensor is not None and not bool(torch.isfinite(tensor).all()):
        raise UniPicError(f"{name} holds NaN or infinity; check the node that it comes from")


def adapted(cond: dict[str, Any], noise: Tensor, channels: int, text_width: int | None = None) -> dict[str, Any]:
    """A copy of a conditioning for a run on noise [B, C, 1, H, W]. Raises UniPicError.

    text_width: the width that the network takes; None = unknown.
    """
    _check_text(cond.get("cross_attn"), text_width)
    cond = dict(cond)
    if cond.get("area") and cond["area"][0] == "percentage" and len(cond["area"]) == 5:
        _, height, width, y, x = cond["area"]
        cond["area"] = ("percentage", 1.0, height, width, 0.0, y, x)
    if cond.get("mask") is not None:
        cond |= _masked(cond["mask"], noise, bool(cond.get("set_area_to_bounds")))
    if cond.get("reference_latents") is not None:
        cond["reference_latents"] = _references(cond["reference_latents"], len(noise), channels)
    return cond


def _check_text(text: object, width: int | None) -> None:
    """UniPicError for text of another width, before the network is loaded, which can take minutes."""
    if not isinstance(text, Tensor) or text.ndim != 3 or (width is not None and text.shape[-1] != width):
        got = list(text.shape) if isinstance(text, Tensor) else type(text).__name__
        raise UniPicError(
            f"this model expects text of width {width or 'its encoder'}, [batch, tokens, width], got {got}; use the "
            "CLIP of the same Load UniPic"
        )
    check_numbers("the conditioning's text", text)


def _masked(mask: Tensor, noise: Tensor, to_bounds: bool) -> dict[str, Any]:
    """A MASK [H, W] or [N, H, W] as [N, 1, H', W'] of the latent's size; N: 1 or one for each picture.

    to_bounds: add the area around it, the option "mask bounds" of Conditioning (Set Mask).
    """
    height, width = noise.shape[-2:]
    masks = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if len(masks) not in (1, len(noise)):
        raise UniPicError(
            f"a conditioning must have one mask, or one for each of {len(noise)} pictures, got {len(masks)}; connect "
            "another mask"
        )
    check_numbers("a conditioning's mask", masks)
    if masks.shape[-2:] != (height, width):
        masks = comfy.utils.common_upscale(masks, width, height, "bilinear", "none")
    if not to_bounds:
        return {"mask": masks}
    rows, columns = torch.where(masks.abs().amax(dim=(0, 1)) > 0)
    if not len(rows):
        return {"mask": masks, "area": (1, LEAST_AREA, LEAST_AREA, 0, 0, 0), "set_area_to_bounds": False}
    top, left = int(rows.min()), int(columns.min())
    sides = (max(int(rows.max()) - top + 1, LEAST_AREA), max(int(columns.max()) - left + 1, LEAST_AREA))
    return {"mask": masks, "area": (1, *sides, 0, top, left), "set_area_to_bounds": False}


def _references(latents: Sequence[Tensor], pictures: int, channels: int) -> ReferenceLatents:
    """References of one sample each, or of one for each picture of the run.

    ComfyUI would cut a batch to its first samples; in a run of one picture each sample is a reference.
    """
    references: list[Tensor] = []
    for reference in latents:
        latent = reference[:, :, None] if reference.ndim == 4 else reference
        if latent.ndim != 5 or latent.shape[1] != channels or latent.shape[2] != 1:
            raise UniPicError(
                f"this model expects reference latents [1, {channels}, 1, height, width], got {list(reference.shape)}; "
                "use the VAE of the same Load UniPic, and encode pictures, not a video"
            )
        check_numbers("a reference latent", latent)
        if len(latent) not in (1, pictures) and pictures != 1:
            raise UniPicError(
                f"a reference latent must hold one picture, or one for each of {pictures}, got {len(latent)}; encode "
                "one picture, or set batch_size to 1"
            )
        references += latent.split(1) if pictures == 1 else [latent]
    return ReferenceLatents(references)
