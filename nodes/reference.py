"""UniPicReference: a picture with its mask, its weight and a switch, in one wire to Multi-Image Compose."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..unipic_core.conditioning.reference_sheet import hatched
from ..unipic_core.conditioning.reference_sizes import WEIGHT_LIMITS
from . import CATEGORY
from .host.pictures.images import to_image, to_masks, to_pictures
from .host.pictures.previews import preview
from .host.pictures.references import Reference, ReferenceSocket, check_tensors


class UniPicReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        least, most = WEIGHT_LIMITS
        return io.Schema(
            node_id="UniPicReference",
            display_name="Reference (UniPic)",
            category=CATEGORY,
            description="A reference picture with its mask, weight and on/off switch, in one wire to Multi-Image "
            "Compose.",
            search_aliases=["unipic reference", "reference image", "image with mask", "image weight", "参考"],
            inputs=[
                io.Image.Input("image", tooltip="The picture. For a batch or an animation see batches in Compose."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Parts to leave out, for example Load Image's MASK. They become white.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=least,
                    max=most,
                    step=0.01,
                    tooltip="More or fewer of the pixels that all references share. 4 = twice the width and height "
                    "beside a large picture. It does not make the model follow the picture more.",
                ),
                io.Boolean.Input(
                    "enabled",
                    default=True,
                    label_on="on",
                    label_off="off",
                    tooltip="Off = leave the picture out. Later pictures are renumbered; Multi-Image Compose shows "
                    "how.",
                ),
            ],
            outputs=[ReferenceSocket.Output(display_name="reference", tooltip="For Multi-Image Compose.")],
        )

    @classmethod
    def execute(
        cls, image: Tensor, mask: Tensor | None = None, weight: float = 1.0, enabled: bool = True
    ) -> io.NodeOutput:
        check_tensors({"image": image, "mask": mask})
        return io.NodeOutput(Reference(image, mask, weight, enabled), ui=preview(shown(image, mask)))


def shown(image: Tensor, mask: Tensor | None) -> Tensor:
    """The first picture as IMAGE, with its masked parts hatched."""
    if image.ndim == 4:
        image, mask = image[:1], mask[:1] if mask is not None and mask.ndim > 2 else mask
    [picture], [masked] = to_pictures(image, mask), to_masks(image, mask)
    return to_image(hatched(picture, masked))
