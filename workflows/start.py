"""Subgraphs that stand for a whole workflow, and the workflows that begin with them or as an app."""

from __future__ import annotations

from collections.abc import Sequence

from .graph import Blueprint, Group, Workflow
from .kinds import KINDS
from .parts import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    MODEL,
    PROMPT,
    PURPLE,
    RESULT,
    SAMPLING,
    compose,
    composition,
    decode,
    few_steps,
    load,
    sample_pictures,
    save,
)

ALIASES = ("unipic", "nano banana", "qwen image edit", "参考", "图片编辑")
COMPOSE_ALIASES = ("combine images", "merge", "fusion", "multi image", "组合", "合成", "多图")


def blueprint(name: str, pictures: int, prompt: str, description: str, aliases: Sequence[str]) -> Blueprint:
    """From pictures to a picture in one node: prompt, size, seed, steps and model are its widgets."""
    inputs = [f"image {number}" for number in range(1, pictures + 1)]
    w = Blueprint(name, KINDS, dict.fromkeys(inputs, "IMAGE"), {"image": "IMAGE"}, description, [*ALIASES, *aliases])
    model = load(w)
    composed = compose(w, model, [w.inputs[one] for one in inputs], prompt)
    sampled = few_steps(w, model["MODEL"], composed)
    decoded = decode(w, sampled["latent"], model)
    w.outputs.wires["image"] = decoded["IMAGE"]
    w.widgets = [
        *((composed, widget) for widget in ("prompt", "width", "height")),
        *((sampled, widget) for widget in ("seed", "steps")),
        (model, "model"),
    ]
    w.column(Group(MODEL, [model], BLUE))
    w.column(Group(PROMPT, [composed], BROWN))
    w.column(Group(SAMPLING, [sampled], PURPLE))
    w.column(Group(RESULT, [decoded], GREY))
    return w


def compose_blueprint(prompt: str = "") -> Blueprint:
    about = "Compose up to six pictures by a prompt that calls them image 1, image 2, ..."
    return blueprint("UniPic Compose", 6, prompt, about, COMPOSE_ALIASES)


def edit_blueprint() -> Blueprint:
    about = "Change one picture by an instruction. The new picture has its shape."
    return blueprint("UniPic Edit", 1, "", about, ("inpaint", "edit", "编辑"))


def one_node() -> Workflow:
    w = Workflow("09-start-in-one-node", KINDS)
    pictures = sample_pictures(w, ("man-office-worker", "tent", "desert"))
    prompt = "Place the tent from image 2 right of the man office worker from image 1, in the desert of image 3."
    wires = {f"image {number}": picture["image"] for number, picture in enumerate(pictures, 1)}
    made = w.add_blueprint(compose_blueprint(prompt), wires, 420)
    w.column(Group("1 Pictures", pictures, GREEN))
    w.column(Group("2 Everything else", [made], BROWN))
    w.column(Group("3 Result", [save(w, made["image"])], GREY))
    return w


def app() -> Workflow:
    """Opens as an app: a person, a thing and a place to choose, the words, the seed."""
    prompt = "Place the tent from image 2 right of the man office worker from image 1, in the desert of image 3."
    w = composition("10-app-compose-three-pictures", ("man-office-worker", "tent", "desert"), prompt)
    shown = {"UniPicSampleImages": "picture", "MultiImageCompose": "prompt", "FewStepSampler": "seed"}
    widgets = [(node, shown[node.kind_name]) for node in w.nodes if node.kind_name in shown]
    for number, node in enumerate((node for node, widget in widgets if widget == "picture"), start=1):
        node.labels["picture"] = f"image {number}"  # else the app lists three widgets of one name
    w.app = (widgets, [node for node in w.nodes if node.kind_name == "SaveImage"])
    return w
