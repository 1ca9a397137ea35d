"""Parts that the workflows share: the main nodes with their settings, and the layout of a composition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .graph import CONTROL, Group, Node, Workflow
from .kinds import KINDS, PREVIEW

Wire = tuple[Node, str]
"""A node and the name of one of its outputs."""


class Parts(Protocol):
    """Whatever gives the wires MODEL, CLIP and VAE: Load UniPic, or three loaders."""

    def __getitem__(self, output: str, /) -> Wire: ...


NANO = "unipic-nano (bundled)"
LORA = "bundled: unipic-nano/unipic-nano-few-step.safetensors"
"""The few-step LoRA of workflow 08."""

SEED = 2
GUIDANCE = 1.5
"""Guidance of the bundled model's recipe, where a node of ComfyUI asks for it."""
MODEL, PICTURES, PROMPT, SAMPLING, RESULT = "1 Model", "2 Pictures", "3 Prompt", "4 Sampling", "5 Result"
GREEN, BLUE, PURPLE, BROWN, GREY = "#8A8", "#3f789e", "#a1309b", "#b06634", "#88A"


def load(w: Workflow, weight_dtype: str = "as stored") -> Node:
    choices = {"model": NANO, "text_encoder": "auto", "vae": "auto", "weight_dtype": weight_dtype}
    return w.add("LoadUniPic", values=choices)


def sample_pictures(w: Workflow, names: Sequence[str]) -> list[Node]:
    return [
        w.add("UniPicSampleImages", values={"picture": name}, title=f"Image {i + 1}") for i, name in enumerate(names)
    ]


def compose(
    w: Workflow,
    model: Parts,
    pictures: Sequence[Wire],
    prompt: str,
    batch_size: int = 1,
    references: Sequence[Wire] = (),
) -> Node:
    images = {f"images.image_{i + 1}": picture for i, picture in enumerate(pictures)}
    images |= {f"references.reference_{i + 1}": wire for i, wire in enumerate(references)}
    texts = {"prompt": prompt, "negative_prompt": " "}
    others = {
        "width": 0,
        "height": 0,
        "batch_size": batch_size,
        "reference_budget": 0,
        "batches": "first",
        "share": "release",
        "size": "custom",
        "boxes": "",
    }
    wires = {"clip": model["CLIP"], "vae": model["VAE"], **images}
    return w.add("MultiImageCompose", wires, {**texts, **others}, height=600 + 20 * len(images) + PREVIEW)


def few_steps(
    w: Workflow, model: Wire, composed: Node, title: str = "", latent: Wire | None = None, denoise: float = 1
) -> Node:
    """latent: where sampling begins, in place of the composition's empty one."""
    wires = {"model": model, **{name: composed[name] for name in ("positive", "negative")}}
    wires["latent"] = latent or composed["latent"]
    settings = {"seed": SEED, CONTROL: "fixed", "steps": 0, "cfg": 0, "sampler": "auto", "denoise": denoise}
    return w.add(
        "FewStepSampler",
        wires,
        {**settings, "condition_cache": "auto", "schedule": "auto", "shift": 0, "cache_dtype": "auto"},
        title=title,
    )


def decode(w: Workflow, latent: Wire, model: Parts) -> Node:
    return w.add("VAEDecode", {"samples": latent, "vae": model["VAE"]})


def save(w: Workflow, image: Wire) -> Node:
    return w.add("SaveImage", {"images": image}, {"filename_prefix": f"unipic/{w.name}"})


def composition(name: str, names: Sequence[str], prompt: str, weight_dtype: str = "as stored") -> Workflow:
    """Workflow of the pack's four main nodes, from pictures and a prompt to a saved picture."""
    w = Workflow(name, KINDS)
    model = load(w, weight_dtype)
    pictures = sample_pictures(w, names)
    composed = compose(w, model, [picture["image"] for picture in pictures], prompt)
    sampled = few_steps(w, model["MODEL"], composed)
    arrange(w, model, pictures, composed, sampled, sampled["latent"])
    return w


def arrange(w: Workflow, model: Node, pictures: list[Node], composed: Node, sampled: Node, latent: Wire) -> None:
    """Decode and save, and lay the nodes out in four columns."""
    decoded = decode(w, latent, model)
    w.column(Group(MODEL, [model], BLUE), Group(PICTURES, pictures[:3], GREEN))
    if pictures[3:]:
        w.column(Group(PICTURES, pictures[3:], GREEN))
    w.column(Group(PROMPT, [composed], BROWN))
    w.column(Group(SAMPLING, [sampled], PURPLE))
    w.column(Group(RESULT, [decoded, save(w, decoded["IMAGE"])], GREY))
