"""ComfyUI's sampling nodes on a MODEL: times of another kind are refused, shifts are honoured or remarked on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import comfy.model_sampling

from ....unipic_core.errors import UniPicError
from ....unipic_core.run.plan import Settings
from ....unipic_core.sampling.schedules import Shift


def check_times(sampling: Any, model: str) -> None:
    """UniPicError unless a MODEL's `model_sampling` is that of a flow and hands sigma on as the network's time.

    model: the kind of MODEL, for the message.
    """
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise UniPicError(
            f"expected a flow model such as UniPic or Qwen-Image-Edit, got {model} sampled as another kind; connect "
            "the MODEL of Load UniPic, and remove a ModelSampling node for other models after it"
        )
    times = float(sampling.timestep(0.5)) / 0.5
    if not math.isclose(times, 1):
        raise UniPicError(
            f"this model takes times from 0 to 1, and a node before it multiplies them by {times:g}, as "
            "ModelSamplingSD3 does; remove it, or use ModelSamplingAuraFlow, which sets the shift alone"
        )


def shift_of(model: Any) -> float | None:
    """k of t' = k t / (1 + (k - 1) t) that a sampling node gave a MODEL; None where there is no such node."""
    sampling = model.object_patches.get("model_sampling")
    if isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
        return math.exp(sampling.shift)
    return float(sampling.shift) if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow) else None


def with_shift_of(model: Any, settings: Settings, shift: Shift, chosen: bool = False) -> tuple[Settings, Shift, str]:
    """Settings and Shift with the shift of a MODEL's sampling node, and what to tell the user; empty without a node.

    The schedules "base" and "fixed_shift" take it at every size. Few-step weights do not: they were distilled at the
    times of their own schedule; nor does a shift that was chosen in the node give way. UniPicError for a shift that is
    not above 0.
    """
    k = shift_of(model)
    if k is None:
        return settings, shift, ""
    if not 0 < k < math.inf:
        raise UniPicError(f"the sampling node's shift should be above 0, got {k:g}; 3 is usual, or remove the node")
    if chosen:
        return settings, shift, f"the sampling node's shift {k:g} is not used, since a shift was chosen here"
    if settings.schedule == "few_step":
        note = f"the sampling node's shift {k:g} is not used, since these weights were distilled at their own times"
        return settings, shift, note
    if settings.schedule == "fixed_shift":
        return replace(settings, fixed_shift=k), shift, f"shift {k:g} of the sampling node"
    return settings, replace(shift, base_mu=math.log(k), max_mu=math.log(k)), f"shift {k:g} of the sampling node"
