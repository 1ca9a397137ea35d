"""Strengths, boxes and time ranges of references in ComfyUI's own Qwen-Image network, which has no input for them.

A conditioning brings them as a control, since ComfyUI calls a control with the model before each run and with the
options of each step, for every loader and every sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from comfy.controlnet import ControlBase
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....unipic_core.conditioning.influence import Influence
from ....unipic_core.conditioning.sequence import PATCH, LatentShape
from ....unipic_core.errors import UniPicError
from ....unipic_core.model.reference_bias import attention_bias
from ..model.influences import TimedInfluences, bias_at, timed_influences
from ..model.mmdit import ComfyMMDiT

OVERRIDE = "optimized_attention_override"
"""Key of transformer_options: a function in place of ComfyUI's attention."""

COMPILED = "torch.compile"
"""Key of the wrapper of ComfyUI's TorchCompileModel."""


@dataclass(eq=False)
class InfluenceControl(ControlBase):
    """One influence per reference of the conditioning. It adds no residuals; the network of Load UniPic takes the
    influences from the conditioning, so this leaves it alone.

    Raises UniPicError in runs of other networks, and of a compiled one, which would not notice a changed attention.
    """

    influences: tuple[Influence, ...]

    def __post_init__(self) -> None:
        super().__init__()
        self._timed: TimedInfluences = ()  # of the present run

    def pre_run(self, model: Any, percent_to_timestep_function: Callable[[float], float]) -> None:
        super().pre_run(model, percent_to_timestep_function)
        network = model.diffusion_model
        if not isinstance(network, (ComfyMMDiT, QwenImageTransformer2DModel)):
            raise UniPicError(
                "strengths, boxes and time ranges of references need a Qwen-Image network, got "
                f"{type(network).__name__}; load the model with Load UniPic, or set strength 1 and no box"
            )
        stock = not isinstance(network, ComfyMMDiT)
        self._timed = timed_influences(self.influences, model.model_sampling) if stock else ()

    def get_control(
        self,
        x_noisy: Tensor,
        t: Tensor,
        cond: Mapping[str, Any],
        batched_number: int,
        transformer_options: dict[str, Any],
    ) -> Any:
        """The residuals of another control. Sets the attention of this step in transformer_options."""
        shapes = tuple(_shape(latent) for latent in (x_noisy, *cond.get("ref_latents", ())))
        bias = bias_at(self._timed, shapes, t)
        if bias is not None:
            if COMPILED in transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
                raise UniPicError(
                    "strengths and boxes of references do not work with TorchCompileModel on ComfyUI's own network; "
                    "remove that node, or load the model with Load UniPic"
                )
            transformer_options[OVERRIDE] = biased_attention(bias, shapes, transformer_options.get(OVERRIDE))
        previous = self.previous_controlnet
        if previous is None:
            return None
        return previous.get_control(x_noisy, t, cond, batched_number, transformer_options)

    def deepclone_multigpu(self, load_device: torch.device, autoregister: bool = False) -> InfluenceControl:
        clone = InfluenceControl(self.influences)
        if autoregister:
            self.multigpu_clones[load_device] = clone
        return clone


def biased_attention(
    bias: Tensor, shapes: Sequence[LatentShape], inner: Callable[..., Tensor] | None
) -> Callable[..., Tensor]:
    """Override of ComfyUI's attention over [text | target | references] that adds log strengths to the scores.

    bias: [N_O, K] of K references; shapes: of the target and the references; inner: the override of another node.
    """
    target, *references = (shape.num_tokens for shape in shapes)

    @cache
    def scores(tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        words = tokens - target - sum(references)
        return attention_bias(bias.to(device, dtype), references, tokens, words, tokens, words + target)[None]

    def attention(
        function: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        added = scores(k.shape[2] if options.get("skip_reshape") else k.shape[1], q.device, q.dtype)
        mask = added if mask is None else mask + added
        if inner is not None:
            return inner(function, q, k, v, heads, mask, **options)
        return function(q, k, v, heads, mask, **options)

    return attention


def _shape(latent: Tensor) -> LatentShape:
    """Tokens of a latent [..., H, W], which the network pads to whole tokens."""
    height, width = (math.ceil(side / PATCH) for side in latent.shape[-2:])
    return LatentShape(1, height, width)
