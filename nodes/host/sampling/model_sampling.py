"""ComfyUI's ModelSampling nodes on a MODEL: their shift is used where it fits, other kinds of times are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import comfy.model_sampling

from ....unipic_core.errors import UniPicError
from ....unipic_core.run.plan import Settings
from ....unipic_core.sampling.schedules import Shift


def check_times(sampling: object, model: str) -> None:
    """UniPicError unless a MODEL's `model_sampling` is a flow's and passes sigma to the network as its time.

    model: the kind of MODEL, for the message.
    """
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise UniPicError(
            f"expected a flow model such as UniPic or Qwen-Image-Edit, got {model} with another kind of sampling; "
            "connect the MODEL of Load UniPic, and remove the ModelSampling node after it"
        )
    times = float(sampling.timestep(0.5)) / 0.5
    if not math.isclose(times, 1):
        raise UniPicError(
            f"this model expects times from 0 to 1, got times multiplied by {times:g}, as by ModelSamplingSD3; remove "
            "that node, or use ModelSamplingAuraFlow, which changes the shift alone"
        )


def shift_of(model: Any) -> float | None:
    """Shift k of t' = k t / (1 + (k - 1) t) from a ModelSampling node before this one; None without such a node."""
    sampling = model.object_patches.get("model_sampling")
    if isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
        return math.exp(sampling.shift)
    return float(sampling.shift) if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow) else None


def with_shift_of(model: object, settings: Settings, shift: Shift, chosen: bool = False) -> tuple[Settings, Shift, str]:
    """Settings and Shift with the shift of a ModelSampling node, and a line for the user, empty without such a node.

    The schedules "base" and "fixed_shift" use it at every size. Few-step weights ignore it, since they were distilled
    at the times of their schedule; so does a run whose shift was chosen in the sampling node itself. UniPicError for a
    shift that is not above 0.
    """
    k = shift_of(model)
    if k is None:
        return settings, shift, ""
    if not 0 < k < math.inf:
        raise UniPicError(f"the ModelSampling node's shift must be above 0, got {k:g}; set it to 3, or remove the node")
    if chosen:
        return settings, shift, f"the ModelSampling node's shift {k:g} is ignored: a shift was chosen in this node"
    if settings.schedule == "few_step":
        note = f"the ModelSampling node's shift {k:g} is ignored: few-step weights have a fixed schedule"
        return settings, shift, note
    if settings.schedule == "fixed_shift":
        return replace(settings, fixed_shift=k), shift, f"shift {k:g} of the ModelSampling node"
    return settings, replace(shift, base_mu=math.log(k), max_mu=math.log(k)), f"shift {k:g} of the ModelSampling node"
