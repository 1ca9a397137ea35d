"""Instructions in words. Sources are named by the number of their reference, in many paraphrases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .backgrounds import CANONICAL, Background
from .catalogue import Asset
from .scene import Edit, Item

NOUNS = ("the {} from image {}", "the {} in image {}", "the {} of image {}", "the {} shown in image {}")
# {scene}: a noun phrase; {place}: "in the room of image 3"; {ground}: "the room of image 3".
FRAMES = (
    "Show {scene}, {place}.",
    "Draw {scene}, {place}.",
    "Make a picture of {scene}, {place}.",
    "{place}, show {scene}.",
    "Use {ground} as the background and show {scene}.",
    "With {ground} as the background, draw {scene}.",
    "Create an image of {scene}, set {place}.",
    "Compose {scene}, {place}.",
    "I want to see {scene}, {place}.",
    "{scene}, {place}.",
)
ORDER_FRAMES = (
    "{order}, {place}.",
    "{place}, {order}.",
    "Use {ground} as the background and {order}.",
    "{order}, with {ground} behind.",
)

# One object and a person. First the noun phrases, then the orders.
SCENES: dict[str, tuple[str, ...]] = {
    "hold": ("{p} holding {o}", "{p} with {o} in both hands", "{o} in the hands of {p}"),
    "wear": ("{p} wearing {o}", "{p} with {o} on the head", "{o} on the head of {p}"),
    "left": ("{p} with {o} on the left", "{o} to the left of {p}", "{o} standing left of {p}"),
    "right": ("{p} with {o} on the right", "{o} to the right of {p}", "{o} standing right of {p}"),
    "front": ("{p} with {o} in front", "{o} in front of {p}", "{p} behind {o}"),
    "behind-left": ("{p} with {o} behind on the left", "{o} behind {p} on the left"),
    "behind-right": ("{p} with {o} behind on the right", "{o} behind {p} on the right"),
}
ORDERS: dict[str, tuple[str, ...]] = {
    "hold": ("put {o} in the hands of {p}", "let {p} hold {o}", "give {o} to {p} to hold", "have {p} hold {o}"),
    "wear": ("put {o} on the head of {p}", "let {p} wear {o}", "have {p} wear {o}", "dress {p} with {o}"),
    "left": ("put {o} to the left of {p}", "place {o} left of {p}", "let {o} stand to the left of {p}"),
    "right": ("put {o} to the right of {p}", "place {o} right of {p}", "let {o} stand to the right of {p}"),
    "front": ("put {o} in front of {p}", "place {o} in front of {p}", "let {p} stand behind {o}"),
    "behind-left": ("put {o} behind {p}, on the left", "place {o} on the left behind {p}"),
    "behind-right": ("put {o} behind {p}, on the right", "place {o} on the right behind {p}"),
}
PAIR_SCENES: dict[str, tuple[str, ...]] = {
    "left": ("{o} to the left of {p}", "{p} with {o} on its left", "{o} on the left and {p} on the right"),
    "right": ("{o} to the right of {p}", "{p} with {o} on its right", "{p} on the left and {o} on the right"),
    "front": ("{o} in front of {p}", "{p} with {o} in front of it"),
    "behind": ("{o} behind {p}", "{p} with {o} behind it"),
    "top": ("{o} on top of {p}", "{p} with {o} on top of it"),
}
PAIR_ORDERS: dict[str, tuple[str, ...]] = {
    "left": ("put {o} to the left of {p}", "place {o} left of {p}", "place {p} right of {o}"),
    "right": ("put {o} to the right of {p}", "place {o} right of {p}", "place {p} left of {o}"),
    "front": ("put {o} in front of {p}", "place {o} in front of {p}"),
    "behind": ("put {o} behind {p}", "place {o} behind {p}"),
    "top": ("put {o} on top of {p}", "place {o} on {p}", "stack {o} on top of {p}"),
}
ALONE_SCENES: dict[str, tuple[str, ...]] = {
    "centre": ("{o}", "{o} in the middle", "{o} in the centre"),
    "left": ("{o} on the left", "{o} on the left side", "{o} at the left"),
    "right": ("{o} on the right", "{o} on the right side", "{o} at the right"),
}
ALONE_ORDERS: dict[str, tuple[str, ...]] = {
    "centre": ("put {o} in the middle", "place {o} in the centre", "let {o} stand in the middle"),
    "left": ("put {o} on the left", "place {o} at the left", "let {o} stand on the left"),
    "right": ("put {o} on the right", "place {o} at the right", "let {o} stand on the right"),
}
# Pieces of longer sentences.
DOING = {"wear": "wearing {}", "hold": "holding {}"}
STANDING = {
    "left": ("{} on the left", "{} to the left"),
    "right": ("{} on the right", "{} to the right"),
    "front": ("{} in front", "{} standing in front"),
    "back-left": ("{} at the back left", "{} behind on the left"),
    "back-right": ("{} at the back right", "{} behind on the right"),
    "front-left": ("{} at the front left", "{} in front on the left"),
    "front-centre": ("{} at the front in the middle", "{} in front in the middle"),
    "front-right": ("{} at the front right", "{} in front on the right"),
}

MOVES = (
    "Move {o} to the {side}.",
    "Put {o} on the {side}.",
    "Shift {o} to the {side} of the picture.",
    "Place {o} on the {side} instead.",
    "In image 1, move {o} to the {side}.",
    "{o} should be on the {side}.",
    "Change image 1 so that {o} is on the {side}.",
    "Let {o} stand on the {side}.",
)
REMOVALS = (
    "Remove {o}.",
    "Take {o} away.",
    "Delete {o} from the picture.",
    "Remove {o} from image 1.",
    "Show image 1 without {o}.",
    "Erase {o} and keep everything else.",
    "Let {o} disappear.",
    "{o} should be gone.",
)
RECOLOURINGS = (
    "Make {o} {colour}.",
    "Paint {o} {colour}.",
    "Change the colour of {o} to {colour}.",
    "Turn {o} {colour}.",
    "In image 1, make {o} {colour}.",
    "{o} should be {colour}.",
    "Colour {o} {colour}.",
    "Recolour {o} in {colour}.",
)
REPLACEMENTS = (
    "Change the background: {o} {place}.",
    "Show {o} {place}.",
    "Put {o} {place}.",
    "Replace the background of image 1: show {o} {place}.",
    "Move the scene: {o} should be {place}.",
    "The same picture, but {place}.",
    "Keep {o} and change the background: {place}.",
    "Let image 1 take place {place}.",
)


def pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def sentence(text: str) -> str:
    """With a capital at the beginning."""
    return text[0].upper() + text[1:]


def noun(asset: Asset, generic: bool) -> str:
    return asset.kind if generic else asset.name


def join(parts: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def numbered_names(items: Sequence[Item], order: Sequence[int], generic: bool, rng: np.random.Generator) -> list[str]:
    """Each item by a noun and the number of its reference, counted from 1."""
    return [
        pick(NOUNS, rng).format(noun(item.asset, generic), order.index(source) + 1) for source, item in enumerate(items)
    ]


def numbered_place(background: Background, number: int, generic: bool, rng: np.random.Generator) -> tuple[str, str]:
    """The background by a noun and the number of its reference: without and with its preposition."""
    ground = pick(NOUNS, rng).format("scene" if generic else background.place.name, number)
    return ground, f"{'in' if generic else background.place.preposition} {ground}"


def compose_instruction(
    task: str,
    items: Sequence[Item],
    background: Background,
    order: Sequence[int],
    generic: bool,
    rng: np.random.Generator,
) -> str:
    """One sentence in which every source carries the number of its reference, counted from 1."""
    names = numbered_names(items, order, generic, rng)
    ground, place = numbered_place(background, order.index(len(items)) + 1, generic, rng)
    ordering = len(items) <= 2 and rng.random() < 0.4
    if ordering:
        text = pick(ORDER_FRAMES, rng).format(order=_short(task, items, names, True, rng), place=place, ground=ground)
    else:
        scene = _short(task, items, names, False, rng) if len(items) <= 2 else _long(items, names, rng)
        text = pick(FRAMES, rng).format(scene=scene, place=place, ground=ground)
    return sentence(text)


def _short(task: str, items: Sequence[Item], names: Sequence[str], ordering: bool, rng: np.random.Generator) -> str:
    """One or two things: as a noun phrase, or as an order."""
    relation = items[-1].relation
    if len(items) == 1:
        return pick((ALONE_ORDERS if ordering else ALONE_SCENES)[relation], rng).format(o=names[0])
    scenes, orders = (PAIR_SCENES, PAIR_ORDERS) if task == "pair" else (SCENES, ORDERS)
    return pick((orders if ordering else scenes)[relation], rng).format(p=names[0], o=names[1])


def _long(items: Sequence[Item], names: Sequence[str], rng: np.random.Generator) -> str:
    """Three things or more: 'the cook wearing .. and holding .., with .. on the left'; the order within is shuffled."""
    relations = [item.relation for item in items]
    shuffled = [int(index) for index in rng.permutation(len(items))]
    standing = [pick(STANDING[relations[i]], rng).format(names[i]) for i in shuffled if relations[i] in STANDING]
    if items[0].asset.kind != "person":
        return join(standing)
    doing = [DOING[relations[i]].format(names[i]) for i in shuffled if relations[i] in DOING]
    text = f"{names[0]} {join(doing)}" if doing else names[0]
    if not standing:
        return text
    return f"{text}, with {join(standing)}" if doing else f"{text} with {join(standing)}"


def edit_instruction(items: Sequence[Item], edit: Edit, generic: bool, rng: np.random.Generator) -> str:
    """An edit of image 1. With a generic noun the words stay unambiguous: at most one person and one object."""
    if edit.kind == "replace_background":
        place = next(phrase for phrase, there in CANONICAL.items() if there == edit.background)
        everything = join([f"the {noun(item.asset, generic)}" for item in items])
        return sentence(pick(REPLACEMENTS, rng).format(o=everything, place=place))
    assert edit.item is not None  # every other edit is about one item
    thing = f"the {noun(items[edit.item].asset, generic)}"
    if edit.kind == "remove":
        return sentence(pick(REMOVALS, rng).format(o=thing))
    if edit.kind == "recolour":
        return sentence(pick(RECOLOURINGS, rng).format(o=thing, colour=edit.colour))
    assert edit.anchor is not None
    side = "left" if edit.anchor.x < 0.45 else "right" if edit.anchor.x > 0.55 else "middle"
    return sentence(pick(MOVES, rng).format(o=thing, side=side))
