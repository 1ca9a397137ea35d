"""Workflows for pictures of one's own: masks, a second pass, frames one by one, the released weights."""

from __future__ import annotations

from .graph import CONTROL, Group, Node, Workflow
from .kinds import KINDS
from .parts import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    MODEL,
    PICTURES,
    PROMPT,
    PURPLE,
    RESULT,
    SAMPLING,
    SEED,
    compose,
    decode,
    few_steps,
    load,
    sample_pictures,
    save,
)

MAN = (94, 76, 112, 180)
"""x, y, width and height in pixels of the man beside the barber pole, in their picture of 256 x 256."""

DIFFUSION_MODEL = "unipic3-dmd-fp8.safetensors"
TEXT_ENCODER = "qwen_2.5_vl_7b_fp8_scaled.safetensors"
VAE = "qwen_image_vae.safetensors"
"""Files of the released weights, as the notes say how to get them."""


def rectangle(w: Workflow, box: tuple[int, int, int, int], inside: int) -> list[Node]:
    """Nodes that make a mask of 256 x 256, the last of them the mask: `inside` a box, the opposite around it."""
    x, y, width, height = box
    around = w.add("SolidMask", values={"value": 1 - inside, "width": 256, "height": 256})
    part = w.add("SolidMask", values={"value": 1, "width": width, "height": height})
    area = {"x": x, "y": y, "operation": "add" if inside else "subtract"}
    mask = w.add("MaskComposite", {"destination": around["MASK"], "source": part["MASK"]}, area)
    return [around, part, mask]


def own_photographs() -> Workflow:
    """A thing out of one picture, by a mask, into another."""
    w = Workflow("11-own-photographs-with-masks", KINDS)
    model = load(w)
    photo, place = sample_pictures(w, ("scene-with-barber-pole", "beach"))
    masks = rectangle(w, MAN, inside=0)
    thing = w.add("UniPicReference", {"image": photo["image"], "mask": masks[-1]["MASK"]}, reference())
    prompt = "Place the man office worker from image 1 on the beach of image 2."
    around = w.add("UniPicReference", {"image": place["image"]}, reference())
    composed = compose(w, model, [], prompt, references=[thing["reference"], around["reference"]])
    sampled = few_steps(w, model["MODEL"], composed)
    decoded = decode(w, sampled["latent"], model)
    w.column(Group(MODEL, [model], BLUE), Group(PICTURES, [photo, place], GREEN))
    w.column(Group("3 Mask: white is left out", masks, GREY))
    w.column(Group("4 References", [thing, around], GREEN))
    w.column(Group("5 Prompt", [composed], BROWN))
    w.column(Group("6 Sampling", [sampled], PURPLE))
    w.column(Group("7 Result", [decoded, save(w, decoded["IMAGE"])], GREY))
    return w


def reference(x: int = 0, y: int = 0, width: int = 1000, height: int = 1000) -> dict[str, object]:
    """Settings of a Reference: its box on a grid of 1000, the others at their defaults."""
    place = {"x": x, "y": y, "width": width, "height": height}
    return {"weight": 1, "enabled": True, "strength": 1, "start": 0, "end": 1, **place}


def boxes() -> Workflow:
    """Where each picture goes, in numbers."""
    w = Workflow("13-boxes", KINDS)
    model = load(w)
    pictures = sample_pictures(w, ("panda", "carrot", "room"))
    places = (reference(40, 400, 440, 560), reference(520, 400, 440, 560), reference())
    references = [
        w.add("UniPicReference", {"image": picture["image"]}, place)
        for picture, place in zip(pictures, places, strict=True)
    ]
    prompt = "Put the panda from image 1 to the left of the carrot from image 2, in the room of image 3."
    composed = compose(w, model, [], prompt, references=[one["reference"] for one in references])
    sampled = few_steps(w, model["MODEL"], composed)
    decoded = decode(w, sampled["latent"], model)
    w.column(Group(MODEL, [model], BLUE), Group(PICTURES, pictures, GREEN))
    w.column(Group("3 Boxes", references, GREEN))
    w.column(Group("4 Prompt", [composed], BROWN))
    w.column(Group("5 Sampling", [sampled], PURPLE))
    w.column(Group("6 Result", [decoded, save(w, decoded["IMAGE"])], GREY))
    return w


def inpaint() -> Workflow:
    """A masked part of a large picture, edited at the model's size and pasted back."""
    w = Workflow("12-inpaint-crop-and-stitch", KINDS)
    model = load(w)
    [photo] = sample_pictures(w, ["scene-with-barber-pole"])
    masks = rectangle(w, MAN, inside=1)
    wires = {"image": photo["image"], "mask": masks[-1]["MASK"], "model": model["MODEL"]}
    crop = w.add("UniPicCrop", wires, {"context": 4, "budget": 0, "grow": 14, "edge": 12})
    composed = compose(w, model, [crop["image"]], "Remove the man office worker from image 1.")
    sampled = few_steps(w, model["MODEL"], composed)
    decoded = decode(w, sampled["latent"], model)
    stitched = w.add("UniPicStitch", {"stitch": crop["stitch"], "image": decoded["IMAGE"]})
    w.column(Group(MODEL, [model], BLUE), Group(PICTURES, [photo], GREEN))
    w.column(Group("3 Mask: white is painted anew", masks, GREY))
    w.column(Group("4 Crop", [crop], GREEN))
    w.column(Group("5 Prompt", [composed], BROWN))
    w.column(Group("6 Sampling", [sampled], PURPLE))
    w.column(Group("7 Result", [decoded, stitched, save(w, stitched["image"])], GREY))
    return w


def second_pass() -> Workflow:
    """The result enlarged, and sampled once more at a low denoise."""
    w = Workflow("14-second-pass", KINDS)
    model = load(w)
    pictures = sample_pictures(w, ("man-office-worker", "tent", "desert"))
    prompt = "Place the tent from image 2 right of the man office worker from image 1, in the desert of image 3."
    composed = compose(w, model, [picture["image"] for picture in pictures], prompt)
    first = few_steps(w, model["MODEL"], composed, title="First pass")
    small = decode(w, first["latent"], model)
    large = w.add("ImageScaleBy", {"image": small["IMAGE"]}, {"upscale_method": "lanczos", "scale_by": 1.5})
    latent = w.add("VAEEncode", {"pixels": large["IMAGE"], "vae": model["VAE"]})
    second = few_steps(w, model["MODEL"], composed, "Second pass", latent["LATENT"], denoise=0.3)
    decoded = decode(w, second["latent"], model)
    w.column(Group(MODEL, [model], BLUE), Group(PICTURES, pictures, GREEN))
    w.column(Group(PROMPT, [composed], BROWN))
    w.column(Group(SAMPLING, [first], PURPLE))
    w.column(Group("5 Larger", [small, large, latent], GREY))
    w.column(Group("6 Second pass", [second], PURPLE))
    w.column(Group("7 Result", [decoded, save(w, decoded["IMAGE"])], GREY))
    return w


def grid() -> Workflow:
    """Seeds from left to right, guidance from top to bottom."""
    w = Workflow("15-variations-grid", KINDS)
    model = load(w)
    pictures = sample_pictures(w, ("office-worker", "pizza", "room"))
    prompt = "Put the pizza from image 2 to the left of the office worker from image 1, in the room of image 3."
    composed = compose(w, model, [picture["image"] for picture in pictures], prompt)
    wires = {"model": model["MODEL"], "vae": model["VAE"]}
    wires |= {name: composed[name] for name in ("positive", "negative", "latent")}
    axes = {"x_axis": "seed", "x_values": "1, 2, 3, 4", "y_axis": "guidance", "y_values": "1, 3"}
    settings = {"seed": SEED, CONTROL: "fixed", "steps": 0, "cfg": 0, "sampler": "auto", "denoise": 1, **axes}
    others = {"lora": "none", "schedule": "auto", "shift": 0, "condition_cache": "auto", "cache_dtype": "auto"}
    made = w.add("UniPicCompare", wires, {**settings, **others})
    w.column(Group(MODEL, [model], BLUE), Group(PICTURES, pictures, GREEN))
    w.column(Group(PROMPT, [composed], BROWN))
    w.column(Group("4 Grid", [made], PURPLE))
    w.column(Group(RESULT, [save(w, made["grid"])], GREY))
    return w


def frames() -> Workflow:
    """One edit, applied to every picture of a batch by itself."""
    w = Workflow("16-frames-one-by-one", KINDS)
    model = load(w)
    [scene] = sample_pictures(w, ["scene-with-barber-pole"])
    mirrored = w.add("ImageFlip", {"image": scene["image"]}, {"flip_method": "y-axis: horizontally"})
    batch = w.add("BatchImagesNode", {"images.image0": scene["image"], "images.image1": mirrored["IMAGE"]})
    single = w.add("RebatchImages", {"images": batch["IMAGE"]}, {"batch_size": 1}, title="One frame after the other")
    composed = compose(w, model, [single["IMAGE"]], "Remove the man office worker from image 1.")
    sampled = few_steps(w, model["MODEL"], composed)
    decoded = decode(w, sampled["latent"], model)
    together = w.add("RebatchImages", {"images": decoded["IMAGE"]}, {"batch_size": 4096}, title="All frames again")
    w.column(Group(MODEL, [model], BLUE), Group("2 Frames", [scene, mirrored, batch, single], GREEN))
    w.column(Group(PROMPT, [composed], BROWN))
    w.column(Group(SAMPLING, [sampled], PURPLE))
    w.column(Group(RESULT, [decoded, together, save(w, together["IMAGE"])], GREY))
    return w


def released_weights() -> Workflow:
    """The release on a card of 24 GB, by ComfyUI's loaders."""
    w = Workflow("17-released-weights-24gb", KINDS)
    w.runs_here = False
    network = w.add("UNETLoader", values={"unet_name": DIFFUSION_MODEL, "weight_dtype": "default"})
    encoder = w.add("CLIPLoader", values={"clip_name": TEXT_ENCODER, "type": "qwen_image", "device": "default"})
    vae = w.add("VAELoader", values={"vae_name": VAE})
    pictures = sample_pictures(w, ("astronaut", "guitar", "beach"))
    prompt = "The astronaut from image 1 plays the guitar from image 2, sitting on the beach of image 3 at sunset."
    model = {"MODEL": network["MODEL"], "CLIP": encoder["CLIP"], "VAE": vae["VAE"]}
    composed = compose(w, model, [picture["image"] for picture in pictures], prompt)
    sampled = few_steps(w, model["MODEL"], composed)
    decoded = decode(w, sampled["latent"], model)
    w.column(Group(MODEL, [network, encoder, vae], BLUE), Group(PICTURES, pictures, GREEN))
    w.column(Group(PROMPT, [composed], BROWN))
    w.column(Group(SAMPLING, [sampled], PURPLE))
    w.column(Group(RESULT, [decoded, save(w, decoded["IMAGE"])], GREY))
    return w
