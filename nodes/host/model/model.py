"""ComfyUI's Qwen-Image model around `ComfyMMDiT`: its conditioning, its memory estimate and its config."""

from __future__ import annotations

import inspect
from math import prod
from typing import Any

import comfy.model_base
import comfy.model_management as management
import comfy.supported_models
import torch
from comfy.conds import CONDConstant
from torch import Tensor

from ....unipic_core.conditioning.sequence import PATCH
from ....unipic_core.model.config import kv_cache_bytes
from ..sampling.model_sampling import check_times
from .influences import INFLUENCES, timed_influences
from .kv_cache import OPTION_KEYS, REFERENCE_SETS
from .kv_memory import CACHED_TOKENS, SEPARATE, SHARED
from .latent_format import PictureLatents
from .mmdit import ComfyMMDiT


def check_takes_network(model: type) -> None:
    """ImportError for a model class of ComfyUI before 0.29, which builds its own network only."""
    parameters = inspect.signature(model).parameters
    if "unet_model" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ImportError(f"its class {model.__name__} takes no network of another kind")


check_takes_network(comfy.model_base.QwenImage)


class UniPicModel(comfy.model_base.QwenImage):
    """ComfyUI's Qwen-Image model around `ComfyMMDiT`: LoRA keys, conditioning and sampling are ComfyUI's own."""

    def __init__(self, model_config: object, device: torch.device | None = None) -> None:
        super().__init__(model_config, device=device, unet_model=ComfyMMDiT)

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: object = None,
        c_crossattn: object = None,
        control: object = None,
        transformer_options: dict[str, object] | None = None,
        **kwargs: object,
    ) -> Tensor:
        """The stock call, with OPTION_KEYS as arguments too: torch.compile would not notice a change of them, since
        ComfyUI's node leaves transformer_options out of the guards. UniPicError for times that are not sigma."""
        check_times(self.model_sampling, "UniPic")
        options = transformer_options or {}
        unipic_options = {key: options[key] for key in OPTION_KEYS if key in options}
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **unipic_options, **kwargs)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dtype == torch.bool:  # ComfyUI would cast it to a float that reads as a bias
            kwargs["attention_mask"] = mask.long()
        conds: dict[str, Any] = super().extra_conds(**kwargs)
        if influences := timed_influences(kwargs.get(INFLUENCES), self.model_sampling):
            conds[INFLUENCES] = CONDConstant(influences)
        return conds

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, Any]:
        """Shapes for the memory estimate: references by their area, since the stock one assumes 16 channels."""
        references = kwargs.get("reference_latents")
        shapes = dict(kwargs.get(CACHED_TOKENS, {}))
        if references is not None:
            area = sum(z[0, 0].numel() for z in references)
            shapes["ref_latents"] = [1, self.latent_format.latent_channels, area]
        if kwargs.get(INFLUENCES) and kwargs.get("cross_attn") is not None:
            shapes[INFLUENCES] = [1, kwargs["cross_attn"].shape[1]]
        return shapes

    def memory_required(self, input_shape: Any, cond_shapes: Any = None, **newer: Any) -> float:
        """The stock estimate plus the kv cache (the largest sets of references that it holds at once, and the tokens
        that each conditioning caches for itself) and the attention bias of references with a strength or a box.

        newer: arguments of ComfyUI after 0.33.
        """
        config, cond_shapes = self.diffusion_model.config, cond_shapes or {}
        shared, separate = ([shape[1] for shape in cond_shapes.get(name, ())] for name in (SHARED, SEPARATE))
        itemsize = management.dtype_size(self.get_dtype_inference())
        tokens = sum(sorted(shared)[-REFERENCE_SETS:]) + sum(separate)
        cache = kv_cache_bytes(tokens, config.num_layers, config.width, itemsize)
        images = prod(input_shape[2:]) + sum(shape[-1] for shape in cond_shapes.get("ref_latents", ()))
        sequence = images // PATCH**2 + max((shape[-1] for shape in cond_shapes.get(INFLUENCES, ())), default=0)
        mask = 2 * sequence**2 * itemsize if INFLUENCES in cond_shapes else 0
        return super().memory_required(input_shape, cond_shapes, **newer) + cache + mask


class UniPicConfig(comfy.supported_models.QwenImage):
    """The model config that ComfyUI's loaders would detect, from the network's config instead."""

    def __init__(self, options: dict[str, Any], latents: PictureLatents, mu: float) -> None:
        super().__init__(options)
        self.latent_format = latents
        self.sampling_settings["shift"] = mu

    def get_model(self, state_dict: object, prefix: str = "", device: torch.device | None = None) -> UniPicModel:
        return UniPicModel(self, device=device)
