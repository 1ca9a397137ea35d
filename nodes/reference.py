"""UniPicReference: a picture with its mask, its weight and a switch, in one wire to Multi-Image Compose."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..unipic_core.conditioning.reference_sizes import WEIGHT_LIMITS
from . import CATEGORY
from .host.pictures.references import Reference, ReferenceSocket


class UniPicReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        least, most = WEIGHT_LIMITS
        return io.Schema(
            node_id="UniPicReference",
            display_name="Reference (UniPic)",
            category=CATEGORY,
            description="A reference picture with its mask, its weight and a switch in one wire to Multi-Image "
            "Compose, so that they stay together.",
            search_aliases=["unipic reference", "reference image", "image with mask", "image weight", "参考"],
            inputs=[
                io.Image.Input("image", tooltip="The picture. Of a batch or an animation, see batches in Compose."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What to leave out of the picture: Load Image's MASK, stretched to its size. Masked parts "
                    "become white.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=least,
                    max=most,
                    step=0.01,
                    tooltip="Multiplies the picture's share of the pixels that all references have together: 4 doubles "
                    "its sides beside a large one. It is no strength.",
                ),
                io.Boolean.Input(
                    "enabled",
                    default=True,
                    label_on="on",
                    label_off="off",
                    tooltip="Off: the picture is left out, and later ones get smaller numbers in the prompt; Compose "
                    "says which.",
                ),
            ],
            outputs=[ReferenceSocket.Output(display_name="reference", tooltip="For Multi-Image Compose.")],
        )

    @classmethod
    def execute(
        cls, image: Tensor, mask: Tensor | None = None, weight: float = 1.0, enabled: bool = True
    ) -> io.NodeOutput:
        return io.NodeOutput(Reference(image, mask, weight, enabled))
