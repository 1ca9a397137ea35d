"""UniPicSampleImages: the pictures of the shipped workflows."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..unipic_core.conditioning.images import load_image
from ..unipic_core.errors import UniPicError
from . import CATEGORY
from .host.pictures.images import to_image
from .host.pictures.previews import preview

FOLDER = Path(__file__).resolve().parents[1] / "pictures"
"""Folder of the pictures."""


def example_names() -> list[str]:
    """Names of the pictures, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.png"))


class UniPicSampleImages(io.ComfyNode):
    """A picture from the pack as IMAGE: Load Image lists ComfyUI's input folder alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniPicSampleImages",
            display_name="Sample Images (UniPic)",
            category=CATEGORY,
            description="A picture that comes with the pack, to try a workflow before you load your own.",
            search_aliases=["example image", "sample picture", "unipic images"],
            inputs=[
                io.Combo.Input(
                    "picture",
                    options=example_names(),
                    default="astronaut",
                    tooltip="One of the pack's pictures, 256x256 pixels without transparency.",
                )
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture, 256x256 pixels.")],
        )

    @classmethod
    def execute(cls, picture: str) -> io.NodeOutput:
        if picture not in example_names():
            raise UniPicError(f"there is no sample picture {picture!r}; choose one of {', '.join(example_names())}")
        image = to_image(load_image(FOLDER / f"{picture}.png"))
        return io.NodeOutput(image, ui=preview(image))
