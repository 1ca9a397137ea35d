"""ComfyUI's Qwen-Image model around `ComfyMMDiT`: its conditioning, its memory estimate and its config."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.model_management as management
import comfy.supported_models
import torch
from torch import Tensor

from ....unipic_core.model.config import condition_bytes
from ..sampling.model_sampling import check_times
from .kv_cache import EACH, HELD, ONCE, OWN_OPTIONS, REFERENCE_SETS
from .latent_format import PictureLatents
from .mmdit import ComfyMMDiT


class UniPicModel(comfy.model_base.QwenImage):
    """ComfyUI's Qwen-Image around our network; so LoRA keys, conditioning and sampling are ComfyUI's own."""

    def __init__(self, model_config: object, device: torch.device | None = None) -> None:
        super().__init__(model_config, device=device, unet_model=ComfyMMDiT)

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: object = None,
        c_crossattn: object = None,
        control: object = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> Tensor:
        """The stock call, with our own options as arguments too: what torch.compile made is not asked again when only
        transformer_options change, for ComfyUI's node leaves them out of the guards. UniPicError for times of another
        kind than the network's."""
        check_times(self.model_sampling, "UniPic")
        options = transformer_options or {}
        own = {key: options[key] for key in OWN_OPTIONS if key in options}
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **own, **kwargs)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dtype == torch.bool:  # ComfyUI would cast it to a float that reads as a bias
            kwargs["attention_mask"] = mask.long()
        return super().extra_conds(**kwargs)

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, Any]:
        """References count by their area; the stock estimate divides by the release's 16 channels."""
        references = kwargs.get("reference_latents")
        shapes = dict(kwargs.get(HELD, {}))
        if references is not None:
            area = sum(z[0, 0].numel() for z in references)
            shapes["ref_latents"] = [1, self.latent_format.latent_channels, area]
        return shapes

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """The stock estimate, and the keys and values that stay in memory while a run lasts: of the largest sets of
        references that may be kept together, and of each conditioning's own tokens."""
        config, cond_shapes = self.diffusion_model.config, cond_shapes or {}
        once, each = ([shape[1] for shape in cond_shapes.get(name, ())] for name in (ONCE, EACH))
        itemsize = management.dtype_size(self.get_dtype_inference())
        tokens = sum(sorted(once)[-REFERENCE_SETS:]) + sum(each)
        held = condition_bytes(tokens, config.num_layers, config.width, itemsize)
        return super().memory_required(input_shape, cond_shapes) + held


class UniPicConfig(comfy.supported_models.QwenImage):
    """What ComfyUI's loaders would have detected, made from the network's own config."""

    def __init__(self, options: dict[str, Any], latents: PictureLatents, mu: float) -> None:
        super().__init__(options)
        self.latent_format = latents
        self.sampling_settings["shift"] = mu

    def get_model(self, state_dict: object, prefix: str = "", device: torch.device | None = None) -> UniPicModel:
        return UniPicModel(self, device=device)
