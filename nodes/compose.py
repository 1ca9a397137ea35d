"""MultiImageCompose: the conditioning that UniPic 3 was trained on, from up to six pictures and a prompt."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..unipic_core.conditioning.images import ASPECTS
from ..unipic_core.conditioning.influence import Influence
from ..unipic_core.conditioning.picture_numbers import number_cautions
from ..unipic_core.conditioning.reference_sheet import Seen, reference_sheet
from ..unipic_core.conditioning.reference_sizes import (
    MAX_REFERENCES,
    RELEASE,
    SHARES,
    described_sizes,
    small_references,
)
from ..unipic_core.conditioning.sequence import VAE_SCALE
from ..unipic_core.errors import UniPicError
from ..unipic_core.run.plan import Plan, Request
from ..unipic_core.weights.recipe import LIMITS
from . import CATEGORY
from .host.composition import Composition
from .host.messages import tell
from .host.pictures.images import to_image
from .host.pictures.previews import preview
from .host.pictures.references import (
    BATCHES,
    FIRST,
    IMAGES,
    MASKS,
    REFERENCES,
    ReferenceSocket,
    Socket,
    cautions,
    connected,
    reference_influences,
    reference_weights,
)
from .host.recipe_attachment import attachment_of
from .host.text.encoder import enlarged_references
from .host.wires import check_model, check_part

NO_IMAGES = "no images are connected: the model was tuned to compose pictures, not to make them from text alone"

CUSTOM, FIRST_PICTURE = "custom", "first picture"
SIZES = (CUSTOM, FIRST_PICTURE, *ASPECTS)
"""Sizes of the new picture: of the widgets width and height, the first picture's aspect, or an aspect."""

ALIASES = [
    *("unipic", "multi image edit", "text encode qwen image edit", "reference images", "compose", "nano banana"),
    *("combine images", "merge", "fusion", "参考", "组合", "合成", "多图"),
]


class MultiImageCompose(io.ComfyNode):
    """Positive and negative conditioning, and an empty latent, from pictures and a prompt.

    The negative is always encoded, since only the sampler knows the guidance. It costs one pass of the language model
    for each set of pictures: it is cached, so a new prompt does not encode it again, and the vision tower runs once per
    picture for all texts.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiImageCompose",
            display_name="Multi-Image Compose (UniPic)",
            category=CATEGORY,
            description="Composes one to six pictures into a new one by a prompt, with the sizes and the template of "
            "UniPic 3.",
            search_aliases=ALIASES,
            inputs=_inputs(),
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="Conditioning: prompt and pictures."),
                io.Conditioning.Output(display_name="negative", tooltip="Conditioning: negative prompt and pictures."),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of the output's size."),
                io.Image.Output(
                    display_name="sheet",
                    tooltip="The pictures as the model sees them, with number, sizes and masked parts, and a frame of "
                    "the new picture's size.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        clip: CLIP,
        vae: VAE,
        prompt: str,
        negative_prompt: str = " ",
        width: int = 0,
        height: int = 0,
        batch_size: int = 1,
        reference_budget: int = 0,
        images: Mapping[str, Tensor] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        batches: str = FIRST,
        share: str = RELEASE,
        references: Mapping[str, object] | None = None,
        size: str = CUSTOM,
        boxes: object = "",
        model: ModelPatcher | None = None,
        **others: object,
    ) -> io.NodeOutput:
        _check_sockets(others)
        _check_parts(clip, vae)
        if model is not None:
            check_model(model)
        sockets = connected(images or {}, masks or {}, references or {}, batches)
        pictures = [picture for socket in sockets for picture in socket.pictures]
        request = _with_size(
            Request(
                prompt=prompt,
                negative_prompt=negative_prompt,
                width=width or None,
                height=height or None,
                num_images=batch_size,
                reference_budget=reference_budget or None,
                share=share,
                reference_weights=reference_weights(sockets),
                influences=reference_influences(sockets, boxes),
            ),
            size,
        )
        recipe = attachment_of(clip.patcher if model is None else model).recipe
        composition = Composition(clip, vae, tuple(pictures), request, recipe)
        planned = composition.plan()
        _tell(cls, sockets, composition, planned)
        resized = composition.resized(planned)
        positive, negative = composition.conditionings(planned, resized)
        sheet = _sheet(sockets, resized, planned)
        return io.NodeOutput(positive, negative, _empty_latent(vae, planned), sheet, ui=preview(sheet))


def _inputs() -> list[Any]:
    side = {"default": 0, "min": 0, "max": LIMITS["output_budget"][1], "step": 16}
    return [
        io.Clip.Input("clip", tooltip="From Load UniPic, or Load CLIP with a Qwen2.5-VL 7B and type qwen_image."),
        io.Vae.Input("vae", tooltip="From Load UniPic, or Load VAE with a Qwen-Image VAE."),
        *_growing_inputs(),
        io.String.Input(
            "prompt",
            multiline=True,
            dynamic_prompts=True,
            tooltip="Instruction for the new picture. The inputs are image 1 to image 6, for example: put the guitar "
            "from image 2 in the hands of the astronaut from image 1.",
        ),
        io.String.Input(
            "negative_prompt",
            default=" ",
            tooltip="Content to avoid, if guidance is above 1. The default, one space, is the release's.",
        ),
        io.Int.Input("width", **side, tooltip="Width of the new picture in pixels. 0 = the first picture's aspect."),
        io.Int.Input("height", **side, tooltip="Height of the new picture in pixels. 0 = the first picture's aspect."),
        io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Number of pictures to make at once."),
        io.Int.Input(
            "reference_budget",
            default=0,
            min=0,
            max=LIMITS["reference_budget"][1],
            step=32,
            tooltip="Pixels that all references share, as the side of a square. More = more detail, time and memory; "
            "0 = as the model was trained.",
        ),
        io.Combo.Input(
            "batches",
            options=list(BATCHES),
            default=FIRST,
            optional=True,
            tooltip="For a batch or an animation at one socket: first = use its first picture; all = use each as a "
            "reference with its own number.",
        ),
        io.Combo.Input(
            "share",
            options=list(SHARES),
            default=RELEASE,
            optional=True,
            tooltip="How the references share their pixels. release = one scale for all, as in the release, so a small "
            "picture beside a large one stays small; equal = equal areas.",
        ),
        io.Autogrow.Input(
            "references",
            template=io.Autogrow.TemplateNames(
                ReferenceSocket.Input("reference", tooltip="From Reference (UniPic): a picture with its mask."),
                names=list(REFERENCES),
                min=0,
            ),
            tooltip="Pictures from Reference (UniPic), with their masks, weights and switches. Their numbers in the "
            "prompt follow those of images.",
        ),
        io.Combo.Input(
            "size",
            options=list(SIZES),
            default=CUSTOM,
            optional=True,
            tooltip="Size of the new picture. custom = width and height; first picture = its aspect; 16:9 and others = "
            "this aspect, at the size that the weights were made for, or at one of width and height.",
        ),
        io.MultiType.Input(
            io.String.Input(
                "boxes",
                default="",
                multiline=True,
                optional=True,
                tooltip="Where pictures go, as JSON with boxes [top, left, bottom, right] from 0 to 1000, such as "
                '[{"id": "image_2", "bbox": [500, 100, 900, 400]}]; or connect elements of Create Bounding Boxes. '
                "Empty = anywhere. The text encoder never gets this text.",
            ),
            types=[io.Custom("ARRAY")],
        ),
        io.Model.Input(
            "model",
            optional=True,
            tooltip="From Load UniPic or Distill LoRA: its recipe sets the sizes of pictures and references. Without "
            "it those of the CLIP.",
        ),
    ]


def _growing_inputs() -> list[Any]:
    image = io.Image.Input("image", tooltip="A picture. For a batch or an animation see batches.")
    mask = io.Mask.Input("mask", tooltip="Parts to leave out, for example Load Image's MASK. They become white.")
    return [
        io.Autogrow.Input(
            "images",
            template=io.Autogrow.TemplateNames(image, names=list(IMAGES), min=0),
            tooltip="Up to six pictures, in the prompt image 1 to image 6, in this order.",
        ),
        io.Autogrow.Input(
            "masks",
            template=io.Autogrow.TemplateNames(mask, names=list(MASKS), min=0),
            tooltip="Optional. mask_1 belongs to image_1, and so on. Masked parts are left out and become white.",
        ),
    ]


def _check_sockets(others: Mapping[str, object]) -> None:
    """UniPicError for sockets that the schema does not have, as in graphs that are sent by the API."""
    if others:
        raise UniPicError(
            f"at most {MAX_REFERENCES} pictures can be composed, as images.image_1 to images.image_{MAX_REFERENCES} "
            f"with masks.mask_1 to masks.mask_{MAX_REFERENCES}, or references.reference_1 to "
            f"references.reference_{MAX_REFERENCES}; got {', '.join(sorted(others))}; leave it out"
        )


def _check_parts(clip: CLIP, vae: VAE) -> None:
    """UniPicError unless clip is a CLIP, and vae the VAE of Qwen-Image."""
    check_part("clip", clip, "tokenize")
    check_part("vae", vae, "latent_dim")
    if vae.latent_dim != 3 or vae.spacial_compression_encode() != VAE_SCALE:
        raise UniPicError(
            "vae must be the Qwen-Image VAE, got one with other latents; use the VAE of Load UniPic, or Load VAE with "
            "qwen_image_vae.safetensors"
        )


def _with_size(request: Request, size: str) -> Request:
    """The request with the widget `size`, one of SIZES. UniPicError for a choice that width and height contradict."""
    if size not in SIZES:
        raise UniPicError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if size == CUSTOM:
        return request
    if request.width and request.height:
        raise UniPicError(
            f"size is {size}, but width and height are {request.width}x{request.height}; choose custom, or set one of "
            "them to 0"
        )
    return request if size == FIRST_PICTURE else replace(request, aspect=size)


def _sheet(sockets: Sequence[Socket], resized: Sequence[Image.Image], planned: Plan) -> Tensor:
    """IMAGE of the references as the model sees them, and of the new picture's size."""
    given = [
        (picture.size, mask) for socket in sockets for picture, mask in zip(socket.pictures, socket.masks, strict=True)
    ]
    influences = planned.influences or [Influence()] * len(given)
    seen = [Seen(p, *before, influence) for p, before, influence in zip(resized, given, influences, strict=True)]
    return to_image(reference_sheet(seen, planned.size))


def _tell(node: type[io.ComfyNode], sockets: Sequence[Socket], composition: Composition, planned: Plan) -> None:
    """Show one line: warnings, then the size at which the model sees each reference, and the new picture's."""
    sizes = [picture.size for picture in composition.pictures]
    notes = [*cautions(sockets), *([] if sizes else [NO_IMAGES])]
    notes += small_references(sizes, planned.seen, planned.settings.reference_budget)
    notes += enlarged_references(composition.clip, planned.seen)
    notes += number_cautions(planned.request.prompt, len(sizes))
    seen = [described_sizes(sizes, planned.seen)] if sizes else []
    new = f"new picture {planned.size[0]}x{planned.size[1]}"
    tell(node, "; ".join([*notes, *seen, new]), logging.WARNING if notes else logging.INFO)


def _empty_latent(vae: VAE, planned: Plan) -> dict[str, Any]:
    width, height = planned.size
    samples = torch.zeros(
        (planned.num_images, vae.latent_channels, 1, height // VAE_SCALE, width // VAE_SCALE),
        device=comfy.model_management.intermediate_device(),
        dtype=comfy.model_management.intermediate_dtype(),
    )
    return {"samples": samples, "downscale_ratio_spacial": VAE_SCALE}
