"""The pack's list of nodes for ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .compare import UniPicCompare
from .compose import MultiImageCompose
from .crop_and_stitch import UniPicCrop, UniPicStitch
from .load import LoadUniPic
from .lora import DistillLoRA
from .plan_layout import UniPicPlanLayout
from .reference import UniPicReference
from .sample import FewStepSampler, UniPicSamplerSelect, UniPicSigmas
from .sample_images import UniPicSampleImages

NODES: list[type[io.ComfyNode]] = [
    LoadUniPic,
    MultiImageCompose,
    UniPicReference,
    UniPicCrop,
    UniPicStitch,
    FewStepSampler,
    DistillLoRA,
    UniPicSampleImages,
    UniPicSigmas,
    UniPicSamplerSelect,
    UniPicCompare,
    UniPicPlanLayout,
]


class UniPicExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
