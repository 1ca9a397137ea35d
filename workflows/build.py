"""Write the workflows beside this file, from their descriptions below: python -m workflows.build

The JSON files are what ComfyUI's template browser lists; edit here, not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from .graph import CONTROL, Group, Node, Workflow
from .kinds import KINDS, PREVIEW

FOLDER = Path(__file__).parent
NANO = "unipic-nano (bundled)"
LORA = "bundled: unipic-nano/unipic-nano-few-step_prefix_causal.safetensors"
"""The few-step LoRA of the last workflow."""

SEED = 2
STOCK_SEED = 178
"""Seed of the workflow with the stock prompt node, which the nano was not trained with: most other seeds smear."""
MODEL, PICTURES, PROMPT, SAMPLING, RESULT = "1 Model", "2 Pictures", "3 Prompt", "4 Sampling", "5 Result"
GREEN, BLUE, PURPLE, BROWN, GREY = "#8A8", "#3f789e", "#a1309b", "#b06634", "#88A"

OWN_PICTURES = (
    "**Your own pictures:** replace *Sample Images* by *Load Image*. "
    "Connecting a picture opens the next socket, up to six."
)
OWN_MODEL = (
    "**Your own model:** put `Skywork/Unipic3-DMD` or another released folder into `models/unipic/` and choose it in "
    "*Load UniPic*. Steps, guidance and sampler come from its recipe."
)


def _note(heading: str, *paragraphs: str) -> str:
    return "\n\n".join((f"## {heading}", *paragraphs))


def _load(w: Workflow, weight_dtype: str = "as stored") -> Node:
    choices = {"model": NANO, "text_encoder": "auto", "vae": "auto", "weight_dtype": weight_dtype}
    return w.add("LoadUniPic", values=choices)


def _pictures(w: Workflow, names: Sequence[str]) -> list[Node]:
    return [
        w.add("UniPicSampleImages", values={"picture": name}, title=f"Image {i + 1}") for i, name in enumerate(names)
    ]


def _compose(w: Workflow, model: Node, pictures: Sequence[Node], prompt: str, batch_size: int = 1) -> Node:
    images = {f"images.image_{i + 1}": picture["image"] for i, picture in enumerate(pictures)}
    texts = {"prompt": prompt, "negative_prompt": " "}
    others = {
        "width": 0,
        "height": 0,
        "batch_size": batch_size,
        "reference_budget": 0,
        "batches": "first",
        "share": "release",
        "size": "custom",
    }
    wires = {"clip": model["CLIP"], "vae": model["VAE"], **images}
    return w.add("MultiImageCompose", wires, {**texts, **others}, height=500 + 20 * len(pictures) + PREVIEW)


def _few_steps(w: Workflow, model: tuple[Node, str], composed: Node, title: str = "") -> Node:
    wires = {"model": model, **{name: composed[name] for name in ("positive", "negative", "latent")}}
    settings = {"seed": SEED, CONTROL: "fixed", "steps": 0, "cfg": 0, "sampler": "auto", "denoise": 1}
    return w.add(
        "FewStepSampler", wires, {**settings, "condition_cache": "auto", "schedule": "auto", "shift": 0}, title=title
    )


def _decode(w: Workflow, latent: tuple[Node, str], model: Node) -> Node:
    return w.add("VAEDecode", {"samples": latent, "vae": model["VAE"]})


def _save(w: Workflow, image: Node) -> Node:
    return w.add("SaveImage", {"images": image["IMAGE"]}, {"filename_prefix": f"unipic/{w.name}"})


def _composition(name: str, names: Sequence[str], prompt: str, note: str, weight_dtype: str = "as stored") -> Workflow:
    """Workflow of the pack's four main nodes, from pictures and a prompt to a saved picture."""
    w = Workflow(name, KINDS, note)
    model = _load(w, weight_dtype)
    pictures = _pictures(w, names)
    composed = _compose(w, model, pictures, prompt)
    sampled = _few_steps(w, model["MODEL"], composed)
    _arrange(w, model, pictures, composed, sampled, sampled["latent"])
    return w


def _arrange(
    w: Workflow, model: Node, pictures: list[Node], composed: Node, sampled: Node, latent: tuple[Node, str]
) -> None:
    """Decode and save, and lay the nodes out in four columns."""
    decoded = _decode(w, latent, model)
    w.column(Group(MODEL, [model], BLUE), Group(PICTURES, pictures, GREEN))
    w.column(Group(PROMPT, [composed], BROWN))
    w.column(Group(SAMPLING, [sampled], PURPLE))
    w.column(Group(RESULT, [decoded, _save(w, decoded)], GREY))


def two_references() -> Workflow:
    return _composition(
        "01-compose-two-references",
        ("panda", "beach"),
        "Show the panda from image 1 in the middle, on the beach of image 2.",
        _note(
            "Compose two pictures",
            "Press *Run*: the workflow runs as it is, with the small bundled model.",
            "In the prompt the pictures are *image 1*, *image 2*, in the order of the sockets.",
            OWN_PICTURES,
            OWN_MODEL,
        ),
    )


def three_references() -> Workflow:
    return _composition(
        "02-compose-three-references",
        ("office-worker", "horse", "beach"),
        "Put the horse face from image 2 to the right of the office worker from image 1, on the beach of image 3.",
        _note(
            "Compose three pictures",
            "A person, a thing and a place. All pictures share one budget of pixels, so three take as long as one.",
            "`width` and `height` at 0: the new picture has the first picture's shape.",
            OWN_PICTURES,
            OWN_MODEL,
        ),
    )


def six_references() -> Workflow:
    return _composition(
        "03-compose-six-references",
        ("man-office-worker", "crown", "carrot", "carrot", "carrot", "field"),
        "Show the man office worker from image 1 wearing the crown from image 2, with the carrot from image 3 in "
        "front, the carrot from image 4 to the left and the carrot from image 5 to the right, in the field of image 6.",
        _note(
            "Compose six pictures",
            "Six pictures at most. They share one budget of pixels, so the model sees each smaller than it would see "
            "it alone. A higher `reference_budget` gives more detail, and takes more time and memory.",
            "Say in the prompt where everything goes: who wears what, what is left and right, which picture is the "
            "place.",
            "Of six pictures the bundled nano gets the person, the hat and the place right, and smears the rest. It "
            "mixes things up, which three equal carrots hide, and a higher budget makes that worse. Use the released "
            "weights for six pictures.",
            OWN_MODEL,
        ),
    )


def single_edit() -> Workflow:
    return _composition(
        "04-edit-one-picture",
        ("scene-with-pushpin",),
        "Remove the round pushpin from image 1.",
        _note(
            "Edit one picture",
            "One picture and an instruction: *make it blue*, *remove the hat*, *show it in the snow*. The bundled "
            "nano removes and moves things; new colours and backgrounds need the released weights.",
            "The new picture has the shape of image 1. To keep its size too, set `width` and `height` (multiples of "
            "16).",
            OWN_PICTURES,
            OWN_MODEL,
        ),
    )


def low_memory() -> Workflow:
    return _composition(
        "07-low-memory-fp8",
        ("office-worker", "pizza", "room"),
        "Put the pizza from image 2 to the left of the office worker from image 1, in the room of image 3.",
        _note(
            "Low memory",
            "`weight_dtype` is *fp8*: the model takes half the memory of bf16 (20 GB for the released weights) and "
            "is a little less exact. ComfyUI moves parts between main and graphics memory by itself, so smaller "
            "cards work too, more slowly.",
            "To save more: the text encoder `qwen_2.5_vl_7b_fp8_scaled`, *VAE Decode (Tiled)* in place of *VAE "
            "Decode*, a smaller `width` and `height`, a smaller `reference_budget`.",
        ),
        weight_dtype="fp8",
    )


def stock_ksampler() -> Workflow:
    note = _note(
        "ComfyUI's own KSampler",
        "*Multi-Image Compose* gives ordinary conditioning, so every ComfyUI sampler takes it, also with a "
        "Qwen-Image-Edit model from *Load Diffusion Model*.",
        "Set steps and cfg by hand: 50 and 4 for the base weights, 8 and 1 for few-step weights, 20 and 1 for the "
        "bundled model. *Few-Step Sampler* takes them from the recipe, guides per token as the release does, and adds "
        "the noise that few-step weights need.",
    )
    w = Workflow("05-stock-ksampler", KINDS, note)
    model = _load(w)
    pictures = _pictures(w, ("man-office-worker", "crown", "room"))
    prompt = "Let the man office worker from image 1 wear the crown from image 2, in the room of image 3."
    composed = _compose(w, model, pictures, prompt)
    conditioning = {"positive": composed["positive"], "negative": composed["negative"]}
    wires = {"model": model["MODEL"], **conditioning, "latent_image": composed["latent"]}
    numbers = {"seed": SEED, CONTROL: "fixed", "steps": 20, "cfg": 1}
    sampled = w.add("KSampler", wires, {**numbers, "sampler_name": "euler", "scheduler": "simple", "denoise": 1})
    _arrange(w, model, pictures, composed, sampled, sampled["LATENT"])
    return w


def stock_nodes() -> Workflow:
    note = _note(
        "ComfyUI's own nodes",
        "The model of *Load UniPic* with stock nodes for prompt and sampling. *UniPic Sigmas* gives the schedule of "
        "the weights. For few-step weights choose the sampler *consistency*, or the stock *lcm*.",
        "The size is set in *Upscale Image*: 160 here, 1024 for the released weights.",
        "The stock prompt node labels and resizes pictures in another way than in UniPic 3's training. With the "
        "bundled nano most seeds smear then, and this one was chosen. *Multi-Image Compose* prepares them as in "
        "training.",
    )
    w = Workflow("06-stock-nodes", KINDS, note)
    model = _load(w)
    [picture] = _pictures(w, ["scene-with-barber-pole"])
    size = {"upscale_method": "bicubic", "width": 160, "height": 160, "crop": "disabled"}
    scaled = w.add("ImageScale", {"image": picture["image"]}, size)
    latent = w.add("VAEEncode", {"pixels": scaled["IMAGE"], "vae": model["VAE"]})
    prompt = {"prompt": "Remove the barber pole."}
    text = w.add("TextEncodeQwenImageEditPlus", {"clip": model["CLIP"], "image1": scaled["IMAGE"]}, prompt)
    reference = w.add("ReferenceLatent", {"conditioning": text["CONDITIONING"], "latent": latent["LATENT"]})
    noise = w.add("RandomNoise", values={"noise_seed": STOCK_SEED, CONTROL: "fixed"})
    guider = w.add("BasicGuider", {"model": model["MODEL"], "conditioning": reference["CONDITIONING"]})
    sampler = w.add("UniPicSamplerSelect", values={"sampler": "euler"})
    times = {"steps": 0, "denoise": 1, "schedule": "auto", "shift": 0}
    sigmas = w.add("UniPicSigmas", {"model": model["MODEL"], "latent": latent["LATENT"]}, times)
    choices = {"noise": noise["NOISE"], "guider": guider["GUIDER"], "sampler": sampler["sampler"]}
    wires = {**choices, "sigmas": sigmas["sigmas"], "latent_image": latent["LATENT"]}
    sampled = w.add("SamplerCustomAdvanced", wires)
    decoded = _decode(w, sampled["output"], model)
    w.column(Group(MODEL, [model], BLUE), Group(PICTURES, [picture, scaled, latent], GREEN))
    w.column(Group(PROMPT, [text, reference], BROWN))
    w.column(Group("4 Noise, guidance, schedule", [noise, guider, sampler, sigmas], PURPLE))
    w.column(Group("5 Sampling", [sampled], PURPLE))
    w.column(Group("6 Result", [decoded, _save(w, decoded)], GREY))
    return w


def base_beside_few_step() -> Workflow:
    note = _note(
        "Base beside few steps",
        "The same pictures, prompt and seeds twice: on the left the model alone, on the right with a few-step LoRA. "
        "Both start from the same noise; each saved picture shows such a pair.",
        "*Few-Step Sampler* takes steps, guidance and sampler from the LoRA's recipe, so there is nothing to set. The "
        "line on each sampler shows them.",
        "This LoRA comes with the nano. **Your own:** put it into `models/loras/` and choose it in *Distill LoRA*.",
    )
    w = Workflow("08-base-beside-few-step", KINDS, note)
    model = _load(w)
    lora = w.add("DistillLoRA", {"model": model["MODEL"]}, {"lora": LORA, "strength": 1})
    pictures = _pictures(w, ("man-office-worker", "tent", "desert"))
    prompt = "Place the tent from image 2 right of the man office worker from image 1, in the desert of image 3."
    composed = _compose(w, model, pictures, prompt, batch_size=2)
    base = _few_steps(w, model["MODEL"], composed, title="Model alone: many steps")
    few = _few_steps(w, lora["model"], composed, title="With the LoRA: few steps")
    left, right = _decode(w, base["latent"], model), _decode(w, few["latent"], model)
    side = {"direction": "right", "match_image_size": True, "spacing_width": 4, "spacing_color": "white"}
    pair = w.add("ImageStitch", {"image1": left["IMAGE"], "image2": right["IMAGE"]}, side)
    w.column(Group(MODEL, [model, lora], BLUE), Group(PICTURES, pictures, GREEN))
    w.column(Group(PROMPT, [composed], BROWN))
    w.column(Group("4a Base", [base], PURPLE), Group("4b Few steps", [few], PURPLE))
    w.column(Group(RESULT, [left, right, pair, _save(w, pair)], GREY))
    return w


ALL: tuple[Callable[[], Workflow], ...] = (
    two_references,
    three_references,
    six_references,
    single_edit,
    stock_ksampler,
    stock_nodes,
    low_memory,
    base_beside_few_step,
)


def text_of(workflow: Workflow) -> str:
    """Text of a workflow's file."""
    return json.dumps(workflow.ui(), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    for make in ALL:
        workflow = make()
        (FOLDER / f"{workflow.name}.json").write_text(text_of(workflow), encoding="utf-8")


if __name__ == "__main__":
    main()
