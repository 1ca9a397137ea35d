"""The first workflows: the pack's four main nodes, and ComfyUI's own in their place."""

from __future__ import annotations

from .graph import CONTROL, Group, Workflow
from .kinds import KINDS
from .parts import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    GUIDANCE,
    LORA,
    MODEL,
    PICTURES,
    PROMPT,
    PURPLE,
    RESULT,
    SEED,
    arrange,
    compose,
    composition,
    decode,
    few_steps,
    load,
    sample_pictures,
    save,
)


def two_references() -> Workflow:
    return composition(
        "01-compose-two-references",
        ("panda", "beach"),
        "Show the panda from image 1 in the middle, on the beach of image 2.",
    )


def three_references() -> Workflow:
    return composition(
        "02-compose-three-references",
        ("office-worker", "horse", "beach"),
        "Put the horse face from image 2 to the right of the office worker from image 1, on the beach of image 3.",
    )


def six_references() -> Workflow:
    return composition(
        "03-compose-six-references",
        ("man-office-worker", "crown", "carrot", "guitar", "pizza", "field"),
        "Show the man office worker from image 1 wearing the crown from image 2, with the carrot from image 3 in "
        "front, the guitar from image 4 to the left and the pizza from image 5 to the right, in the field of image 6.",
    )


def single_edit() -> Workflow:
    return composition(
        "04-edit-one-picture",
        ("scene-with-barber-pole",),
        "Remove the man office worker from image 1.",
    )


def low_memory() -> Workflow:
    return composition(
        "07-low-memory-fp8",
        ("office-worker", "pizza", "room"),
        "Put the pizza from image 2 to the left of the office worker from image 1, in the room of image 3.",
        weight_dtype="fp8",
    )


def stock_ksampler() -> Workflow:
    w = Workflow("05-stock-ksampler", KINDS)
    model = load(w)
    pictures = sample_pictures(w, ("man-office-worker", "crown", "room"))
    prompt = "Let the man office worker from image 1 wear the crown from image 2, in the room of image 3."
    composed = compose(w, model, [picture["image"] for picture in pictures], prompt)
    conditioning = {"positive": composed["positive"], "negative": composed["negative"]}
    wires = {"model": model["MODEL"], **conditioning, "latent_image": composed["latent"]}
    numbers = {"seed": SEED, CONTROL: "fixed", "steps": 20, "cfg": GUIDANCE}
    sampled = w.add("KSampler", wires, {**numbers, "sampler_name": "euler", "scheduler": "simple", "denoise": 1})
    arrange(w, model, pictures, composed, sampled, sampled["LATENT"])
    return w


def stock_nodes() -> Workflow:
    """ComfyUI's advanced sampling; its parts come from the pack where they depend on the weights."""
    w = Workflow("06-stock-nodes", KINDS)
    model = load(w)
    pictures = sample_pictures(w, ("panda", "carrot", "room"))
    prompt = "Put the panda from image 1 to the left of the carrot from image 2, in the room of image 3."
    composed = compose(w, model, [picture["image"] for picture in pictures], prompt)
    noise = w.add("RandomNoise", values={"noise_seed": SEED, CONTROL: "fixed"})
    conditioning = {"positive": composed["positive"], "negative": composed["negative"]}
    guider = w.add("CFGGuider", {"model": model["MODEL"], **conditioning}, {"cfg": GUIDANCE})
    sampler = w.add("UniPicSamplerSelect", values={"sampler": "euler"})
    times = {"steps": 0, "denoise": 1, "schedule": "auto", "shift": 0}
    sigmas = w.add("UniPicSigmas", {"model": model["MODEL"], "latent": composed["latent"]}, times)
    choices = {"noise": noise["NOISE"], "guider": guider["GUIDER"], "sampler": sampler["sampler"]}
    wires = {**choices, "sigmas": sigmas["sigmas"], "latent_image": composed["latent"]}
    sampled = w.add("SamplerCustomAdvanced", wires)
    decoded = decode(w, sampled["output"], model)
    w.column(Group(MODEL, [model], BLUE), Group(PICTURES, pictures, GREEN))
    w.column(Group(PROMPT, [composed], BROWN))
    w.column(Group("4 Noise, guidance, schedule", [noise, guider, sampler, sigmas], PURPLE))
    w.column(Group("5 Sampling", [sampled], PURPLE))
    w.column(Group("6 Result", [decoded, save(w, decoded["IMAGE"])], GREY))
    return w


def base_beside_few_step() -> Workflow:
    w = Workflow("08-base-beside-few-step", KINDS)
    model = load(w)
    lora = w.add("DistillLoRA", {"model": model["MODEL"]}, {"lora": LORA, "strength": 1})
    pictures = sample_pictures(w, ("man-office-worker", "tent", "desert"))
    prompt = "Place the tent from image 2 right of the man office worker from image 1, in the desert of image 3."
    composed = compose(w, model, [picture["image"] for picture in pictures], prompt, batch_size=2)
    base = few_steps(w, model["MODEL"], composed, title="Model alone: many steps")
    few = few_steps(w, lora["model"], composed, title="With the LoRA: few steps")
    left, right = decode(w, base["latent"], model), decode(w, few["latent"], model)
    side = {"direction": "right", "match_image_size": True, "spacing_width": 4, "spacing_color": "white"}
    pair = w.add("ImageStitch", {"image1": left["IMAGE"], "image2": right["IMAGE"]}, side)
    w.column(Group(MODEL, [model, lora], BLUE), Group(PICTURES, pictures, GREEN))
    w.column(Group(PROMPT, [composed], BROWN))
    w.column(Group("4a Base", [base], PURPLE), Group("4b Few steps", [few], PURPLE))
    w.column(Group(RESULT, [left, right, pair, save(w, pair["IMAGE"])], GREY))
    return w
