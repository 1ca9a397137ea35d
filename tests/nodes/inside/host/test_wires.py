"""Every wire of every node: nothing where a value is required, and another kind of value, are one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_api.latest import io
from compose_tools import image
from unipic_pack.nodes.crop_and_stitch import UniPicCrop
from unipic_pack.nodes.extension import NODES
from unipic_pack.nodes.host.pictures.vae import load_vae
from unipic_pack.nodes.host.text.encoder import load_clip
from unipic_pack.unipic_core.errors import UniPicError

WIRES = ("IMAGE", "MASK", "MODEL", "CONDITIONING", "LATENT", "VAE", "CLIP", "UNIPIC_STITCH")
"""Types of wires; other inputs are widgets, or groups of wires that have tests of their own."""


@pytest.fixture(scope="module")
def given(nano: Path, nano_model: Any) -> dict[str, Any]:
    """A value for each type of wire."""
    picture, mask = image(), torch.ones(1, 50, 70)
    clip = load_clip(nano)
    return {
        "IMAGE": picture,
        "MASK": mask,
        "MODEL": nano_model,
        "CONDITIONING": [[torch.zeros(1, 4, 128), {}]],
        "LATENT": {"samples": torch.zeros(1, 16, 1, 4, 4)},
        "VAE": load_vae(nano),
        "CLIP": clip,
        "UNIPIC_STITCH": UniPicCrop.execute(picture, mask, 1.5, 64, 0, 0).args[0],
    }


def wires() -> list[Any]:
    """(node, its input) of each wire."""
    inputs = [(node, wire) for node in NODES for wire in node.GET_SCHEMA().inputs]
    return [pytest.param(n, w, id=f"{n.__name__}-{w.id}") for n, w in inputs if w.get_io_type() in WIRES]


def widget(one: io.WidgetInput) -> Any:
    """The value of a widget that nobody touched."""
    return one.options[0] if one.default is None and isinstance(one, io.Combo.Input) else one.default


@pytest.mark.parametrize(("node", "wire"), wires())
@torch.inference_mode()
def test_nothing_or_a_text_at_a_wire(node: Any, wire: Any, given: dict[str, Any]) -> None:
    others = node.GET_SCHEMA().inputs
    inputs = {one.id: given[one.get_io_type()] for one in others if one.get_io_type() in WIRES and not one.optional}
    inputs |= {one.id: widget(one) for one in others if isinstance(one, io.WidgetInput)}
    for value, kind in (("a text", "str"), (None, "nothing")):
        if value is None and wire.optional:
            continue
        with pytest.raises(UniPicError, match=rf"^{wire.id} must (be|come from) .*, got {kind}; connect "):
            node.execute(**{**inputs, wire.id: value})
