"""UniPicPlanLayout: boxes for Multi-Image Compose, from the user's own language model or by rules."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..unipic_core.conditioning.boxes import parse_boxes
from ..unipic_core.conditioning.influence import Influence, Region
from ..unipic_core.conditioning.layout_rules import ruled_regions
from ..unipic_core.conditioning.reference_sheet import Seen, reference_sheet
from ..unipic_core.errors import UniPicError
from . import CATEGORY
from .host.layout_server import LayoutServer
from .host.messages import tell
from .host.pictures.images import to_image, to_pictures
from .host.pictures.previews import preview
from .host.pictures.references import IMAGES
from .host.wires import check_tensors

AUTO, SERVER, RULES = PLANNERS = ("auto", "server", "rules")
"""The server if there is one, and rules if it fails; the server alone; rules alone."""

_failures: Counter[str] = Counter()
"""Address of a server -> how often rules stood in for it since ComfyUI started."""


class UniPicPlanLayout(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniPicPlanLayout",
            display_name="Plan Layout (UniPic)",
            category=CATEGORY,
            description="Boxes for Multi-Image Compose from prompt and pictures: by your own language model, whose "
            "address is in the environment variable UNIPIC_LAYOUT_URL, or by rules from words such as left of.",
            search_aliases=["unipic layout", "layout", "boxes", "bounding boxes", "regions", "布局"],
            inputs=[
                io.String.Input("prompt", multiline=True, tooltip="The prompt of Multi-Image Compose."),
                io.Autogrow.Input(
                    "images",
                    template=io.Autogrow.TemplateNames(
                        io.Image.Input("image", tooltip="A picture, as at Multi-Image Compose."), list(IMAGES), min=1
                    ),
                    tooltip="The pictures of Multi-Image Compose, in the same order.",
                ),
                io.Combo.Input(
                    "planner",
                    options=list(PLANNERS),
                    default=AUTO,
                    tooltip="auto = your server if UNIPIC_LAYOUT_URL is set, and rules if it fails; server = your "
                    "server, or an error; rules = words of the prompt alone. Pictures are sent to your server only.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="boxes", tooltip="For boxes of Multi-Image Compose."),
                io.Image.Output(display_name="sheet", tooltip="The pictures, and their boxes in the new picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, planner: str | None = AUTO, **_: object) -> Any:
        """Number of failures of servers, so that the next run asks the server again."""
        return None if planner == RULES else _failures.total()

    @classmethod
    def execute(cls, prompt: str, images: Mapping[str, Tensor], planner: str = AUTO) -> io.NodeOutput:
        check_tensors({}, images)
        sockets = [images[name] for name in IMAGES if images.get(name) is not None]
        if not sockets:
            raise UniPicError(f"expected a picture at one of {IMAGES[0]} to {IMAGES[-1]}, got none; connect Load Image")
        pictures = [to_pictures(image[:1] if image.ndim == 4 else image)[0] for image in sockets]
        regions, line, failed = planned(prompt, pictures, planner)
        tell(cls, line, logging.INFO if regions and not failed else logging.WARNING)
        seen = [Seen(p, p.size, None, Influence(region=regions.get(i))) for i, p in enumerate(pictures, start=1)]
        sheet = to_image(reference_sheet(seen, pictures[0].size))
        return io.NodeOutput(written(regions), sheet, ui=preview(sheet))


def planned(prompt: str, pictures: list[Image.Image], planner: str) -> tuple[dict[int, Region], str, bool]:
    """Regions by the number of the picture, the line that says who planned them, and True where rules stand in for a
    server that failed. Raises UniPicError."""
    if planner not in PLANNERS:
        raise UniPicError(f"planner must be one of {', '.join(PLANNERS)}, got {planner!r}")
    server, why = None, ""
    try:
        server = None if planner == RULES else LayoutServer.from_environment()
        if server is not None:
            regions = parse_boxes(server.ask(prompt, pictures), len(pictures))
            return regions, f"planned by {server.model} on your server: {described(regions)}", False
    except UniPicError as error:
        if planner == SERVER:
            raise
        why = f", since {error}"
        if server is not None:  # a wrong address or key stays wrong in the next run
            _failures[server.url] += 1
    if planner == SERVER:
        raise UniPicError(
            "the planner server needs the address of your server in the environment variable UNIPIC_LAYOUT_URL; set it "
            "where ComfyUI starts, or choose rules"
        )
    regions = ruled_regions(prompt, len(pictures))
    return regions, f"planned by rules{why}: {described(regions)}", bool(why)


def described(regions: Mapping[int, Region]) -> str:
    """The boxes in words."""
    return "; ".join(f"image {n} at {region}" for n, region in sorted(regions.items())) or "no boxes"


def written(regions: Mapping[int, Region]) -> str:
    """The boxes as JSON for Multi-Image Compose; empty without any."""
    rows = [{"id": f"image_{n}", "bbox": _sides(region)} for n, region in sorted(regions.items())]
    return json.dumps(rows) if rows else ""


def _sides(region: Region) -> list[float]:
    """[top, left, bottom, right] in whole numbers, but for a box that these would leave without width or height."""
    exact: list[float] = [region.top, region.left, region.bottom, region.right]
    top, left, bottom, right = whole = [round(side) for side in exact]
    return [*whole] if top < bottom and left < right else exact
