"""UniPicReference: a picture with its mask, its weight and a switch, in one wire to Multi-Image Compose."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..unipic_core.conditioning.influence import GRID, MAX_STRENGTH, Influence, Region
from ..unipic_core.conditioning.reference_sheet import hatched
from ..unipic_core.conditioning.reference_sizes import WEIGHT_LIMITS
from ..unipic_core.errors import UniPicError
from . import CATEGORY
from .host.pictures.images import to_image, to_masks, to_pictures
from .host.pictures.previews import preview
from .host.pictures.references import Reference, ReferenceSocket
from .host.wires import check_tensors


class UniPicReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        least, most = WEIGHT_LIMITS
        return io.Schema(
            node_id="UniPicReference",
            display_name="Reference (UniPic)",
            category=CATEGORY,
            description="A reference picture with its mask, weight, on/off switch, strength and place, in one wire to "
            "Multi-Image Compose.",
            search_aliases=[
                "unipic reference",
                "reference image",
                "image with mask",
                "image weight",
                "strength",
                "box",
                "参考",
            ],
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
                *_influence_inputs(),
            ],
            outputs=[ReferenceSocket.Output(display_name="reference", tooltip="For Multi-Image Compose.")],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        mask: Tensor | None = None,
        weight: float = 1.0,
        enabled: bool = True,
        strength: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        x: int = 0,
        y: int = 0,
        width: int = GRID,
        height: int = GRID,
    ) -> io.NodeOutput:
        check_tensors({"image": image}, {"mask": mask})
        reference = Reference(image, mask, weight, enabled, Influence(strength, _box(x, y, width, height), start, end))
        return io.NodeOutput(reference, ui=preview(shown(image, mask)))


def _influence_inputs() -> list[Any]:
    """New inputs, which come last: saved workflows hold widgets by position."""

    def part(name: str, default: float, tooltip: str) -> io.Float.Input:
        return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, optional=True, tooltip=tooltip)

    def side(name: str, default: int, tooltip: str) -> io.Int.Input:
        return io.Int.Input(name, default=default, min=0, max=GRID, optional=True, tooltip=tooltip)

    return [
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=MAX_STRENGTH,
            step=0.05,
            optional=True,
            tooltip="How much the new picture attends to this one. 1 = as without this setting, 0.5 = half, 0 = not at "
            "all. The text encoder sees the picture in any case.",
        ),
        part("start", 0.0, "Part of the run in which strength and box count: 0 = from its first step."),
        part("end", 1.0, "Part of the run in which strength and box count: 1 = to its last step."),
        side("x", 0, f"Left side of the picture's box in the new picture, from 0 to {GRID} at any size."),
        side("y", 0, f"Upper side of the picture's box in the new picture, from 0 to {GRID} at any size."),
        side("width", GRID, f"Width of the box; {GRID} = the new picture's. This picture is not used outside it."),
        side(
            "height",
            GRID,
            f"Height of the box; {GRID} = the new picture's. This picture is not used outside it.",
        ),
    ]


def _box(x: int, y: int, width: int, height: int) -> Region | None:
    """Region of the widgets, cut off at the new picture's sides; None for the whole picture. UniPicError."""
    if (x, y, width, height) == (0, 0, GRID, GRID):
        return None
    if not (0 <= x < GRID and 0 <= y < GRID and width > 0 and height > 0):
        raise UniPicError(
            f"a reference's box needs x and y from 0 to {GRID - 1}, and width and height above 0, got x {x}, y {y}, "
            f"width {width}, height {height}"
        )
    return Region(x, y, min(x + width, GRID), min(y + height, GRID))


def shown(image: Tensor, mask: Tensor | None) -> Tensor:
    """The first picture as IMAGE, with its masked parts hatched."""
    if image.ndim == 4:
        image, mask = image[:1], mask[:1] if mask is not None and mask.ndim > 2 else mask
    [picture], [masked] = to_pictures(image, mask), to_masks(image, mask)
    return to_image(hatched(picture, masked))
