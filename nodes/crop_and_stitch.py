"""UniPicCrop and UniPicStitch: in-paint a part of a picture of any size, and leave the rest untouched."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..unipic_core.conditioning.reference_sheet import hatched
from ..unipic_core.conditioning.reference_sizes import DEFAULT_BUDGET
from ..unipic_core.errors import UniPicError
from ..unipic_core.run.stitching import Stitch, crop_around, stitched
from ..unipic_core.weights.recipe import LIMITS
from . import CATEGORY
from .host.pictures.images import stretched, to_image, to_masks, to_pictures
from .host.pictures.previews import preview
from .host.recipe_attachment import attachment_of
from .host.wires import check_model, check_tensors, kind_of

StitchSocket = io.Custom("UNIPIC_STITCH")
"""Type of the wire from Crop to Stitch: one `Stitch`."""


class UniPicCrop(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniPicCrop",
            display_name="Crop to Mask (UniPic)",
            category=CATEGORY,
            description="Cuts the part around a mask out of a picture of any size, at the model's size. Stitch "
            "(UniPic) pastes the new part back.",
            search_aliases=[
                "unipic crop",
                "inpaint",
                "inpaint crop",
                "crop and stitch",
                "detailer",
                "局部重绘",
                "裁剪",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The picture, or a batch of one size, which gets one crop for all."),
                io.Mask.Input("mask", tooltip="The part to change, for example Load Image's MASK."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="From Load UniPic: its recipe sets the size of the crop where budget is 0.",
                ),
                io.Float.Input(
                    "context",
                    default=1.5,
                    min=1.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of the surroundings the model sees: sides of the crop, in sides of the mask.",
                ),
                io.Int.Input(
                    "budget",
                    default=0,
                    min=0,
                    max=LIMITS["output_budget"][1],
                    step=32,
                    tooltip="Size of the crop for the model in pixels, as the side of a square. 0 = as the model was "
                    f"trained; {DEFAULT_BUDGET} without a model.",
                ),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=0,
                    max=512,
                    tooltip="Pixels of the picture by which the mask is enlarged.",
                ),
                io.Int.Input(
                    "edge",
                    default=16,
                    min=0,
                    max=256,
                    tooltip="Width of the soft edge in pixels of the picture. It lies inside the mask, so that nothing "
                    "outside changes.",
                ),
            ],
            outputs=[
                StitchSocket.Output(display_name="stitch", tooltip="For Stitch (UniPic): the picture and the place."),
                io.Image.Output(display_name="image", tooltip="The crop, for Multi-Image Compose or VAE Encode."),
                io.Mask.Output(display_name="mask", tooltip="The mask of the crop, for Set Latent Noise Mask."),
                io.Int.Output(display_name="width", tooltip="Width of the crop, for Multi-Image Compose."),
                io.Int.Output(display_name="height", tooltip="Height of the crop, for Multi-Image Compose."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        mask: Tensor,
        context: float,
        budget: int,
        grow: int,
        edge: int,
        model: ModelPatcher | None = None,
    ) -> io.NodeOutput:
        check_tensors({"image": image, "mask": mask})
        if model is not None:
            check_model(model)
        pictures = _checked(image)
        if not budget:
            budget = (attachment_of(model).recipe.output_budget if model else None) or DEFAULT_BUDGET
        masks = stretched(mask.detach().float().cpu(), pictures)[..., 0]
        crop = crop_around(pictures, masks, budget, context, grow, edge)
        height, width = crop.image.shape[1:3]
        shown = hatched(to_pictures(crop.image[:1])[0], to_masks(crop.image[:1, ..., :3], crop.mask[:1])[0])
        return io.NodeOutput(crop.stitch, crop.image, crop.mask, width, height, ui=preview(to_image(shown)))


class UniPicStitch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniPicStitch",
            display_name="Stitch (UniPic)",
            category=CATEGORY,
            description="Pastes a new part into the picture that Crop to Mask (UniPic) cut it from, with a soft edge. "
            "Outside the mask the picture stays as it was, to the bit.",
            search_aliases=["unipic stitch", "inpaint stitch", "uncrop", "paste back", "贴回", "拼回"],
            inputs=[
                StitchSocket.Input("stitch", tooltip="From Crop to Mask (UniPic)."),
                io.Image.Input("image", tooltip="The new part, of any size. Several of them give several pictures."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The whole picture with the new part.")],
        )

    @classmethod
    def execute(cls, stitch: object, image: Tensor) -> io.NodeOutput:
        if not isinstance(stitch, Stitch):
            raise UniPicError(f"stitch must come from Crop to Mask (UniPic), got {kind_of(stitch)}; connect that node")
        check_tensors({"image": image})
        result = stitched(stitch, image)
        return io.NodeOutput(result, ui=preview(result[..., :3]))


def _checked(image: Tensor) -> Tensor:
    """An IMAGE as [B, H, W, 3 or 4]; UniPicError for another shape."""
    pictures = image[None] if image.ndim == 3 else image
    if pictures.ndim != 4 or pictures.shape[-1] not in (3, 4) or 0 in pictures.shape:
        raise UniPicError(
            f"an image must be [batch, height, width, 3 or 4], got {list(image.shape)}; connect another image"
        )
    return pictures
