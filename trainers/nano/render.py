"""Rendering of scenes: references, target, and the placement of each item in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from .backgrounds import Background, draw, soft_disc
from .catalogue import Asset
from .emoji import Bank
from .layout import lattice_step
from .scene import LIGHTS, Item, Look, Scene
from .scenes import COLOURS

Box = tuple[int, int, int, int]  # left, top, right, bottom
Rectangle = tuple[float, float, float, float]  # left, top, width, height
Matrix = np.ndarray  # float64 [3, 3], applied to (r, g, b)

HIDDEN_SALT = 7919
HIDDEN_SCALE, HIDDEN_FLIP, HIDDEN_OFFSET = 0.02, 0.05, 1.0  # relative, share, pixels of a picture of 128
LUMA = np.array([0.299, 0.587, 0.114])
# Rotation of the hue: the YIQ axes, in which it is a rotation of (i, q).
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
FROM_YIQ = np.linalg.inv(TO_YIQ)
# Hats: width relative to the head, and how far down the head they reach, as a share of the head's width.
HAT_FIT: dict[str, tuple[float, float]] = {
    "1f451": (0.95, 0.16),
    "1f452": (1.5, 0.3),
    "1f3a9": (1.3, 0.22),
    "1f393": (1.5, 0.36),
    "1f9e2": (1.2, 0.36),
    "1fa96": (1.2, 0.55),
    "26d1": (1.2, 0.4),
}

# A portrait's lower end lies this far down its square: no gap shows below it, wherever the hidden offset puts it.
BUST_FOOT = 1.025
ANY_FIT = (1.2, 0.3)  # for a control that puts something else on the head


@dataclass(frozen=True)
class Placement:
    """Placement of one item in the target.

    ``reference``: index of the reference that shows it. ``box``: the item's own box, clipped to the picture.
    ``mask``: float32 [H, W], the share of each pixel that is this item, after occlusion.
    """

    reference: int | None
    asset: Asset
    box: Box
    mask: np.ndarray
    z: int


@dataclass(frozen=True)
class Sample:
    """A drawn scene. ``background`` is the target without any item."""

    references: tuple[Image.Image, ...]
    instruction: str
    target: Image.Image
    background: Image.Image
    placements: tuple[Placement, ...]
    task: str


@dataclass(frozen=True)
class Hidden:
    """Hidden variation of one item that the inputs do not determine: scale, mirror image, offset in pixels of 128."""

    scale: float = 1.0
    flip: bool = False
    dx: float = 0.0
    dy: float = 0.0


def draw_hidden(rng: np.random.Generator) -> Hidden:
    dx, dy = rng.uniform(-HIDDEN_OFFSET, HIDDEN_OFFSET, 2)
    scale = 1 + rng.uniform(-HIDDEN_SCALE, HIDDEN_SCALE)
    return Hidden(float(scale), bool(rng.random() < HIDDEN_FLIP), float(dx), float(dy))


def hidden_of(scene: Scene, hidden_seed: int | None) -> list[Hidden]:
    """Hidden variation per item. Edits have none, since their reference shows the items: their seed is the scene's."""
    other = [] if hidden_seed is None or scene.edit else [hidden_seed]
    rng = np.random.default_rng([HIDDEN_SALT, scene.seed, *other])
    drawn = [(draw_hidden(rng), item) for item in scene.items]
    return [replace(hidden, flip=hidden.flip != item.mirror) for hidden, item in drawn]


def look_matrix(look: Look) -> Matrix:
    """Hue, saturation and brightness as one linear map of (r, g, b)."""
    angle = 2 * np.pi * look.hue
    turn = look.saturation * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    yiq = np.eye(3)
    yiq[1:, 1:] = turn
    return look.brightness * FROM_YIQ @ yiq @ TO_YIQ


def colour_matrix(colour: str) -> Matrix:
    """Map to shades of one colour: luma times the colour, slightly brightened."""
    return 1.35 * np.outer(np.array(COLOURS[colour]) / 255, LUMA)


def light_of(background: Image.Image) -> Matrix:
    """Mild tint of the items by the background's mean colour."""
    mean = np.asarray(background.resize((1, 1), Image.Resampling.BOX))[0, 0] / 255.0
    level = float(mean.mean())
    cast = 1 + 0.22 * (mean / max(level, 0.05) - 1)
    return np.diag(cast * (0.8 + 0.32 * level))


def recolour(picture: Image.Image, matrix: Matrix) -> Image.Image:
    """An RGB picture with the map applied to each pixel, clipped to 0..255."""
    rows = np.concatenate([matrix, np.zeros((3, 1))], axis=1)
    return picture.convert("RGB", tuple(rows.ravel().tolist()))


@lru_cache(maxsize=64)
def _backdrop(
    background: Background, shape: tuple[int, int], size: int, canvas: tuple[int, int]
) -> tuple[Image.Image, Image.Image]:
    """The background's reference (longer side ``size``) and what is cut from its middle to fill the canvas (w, h)."""
    (wide, high), (width, height) = shape, canvas
    full = draw(background, *backdrop_size(shape, canvas))
    left, top = (full.width - width) // 2, (full.height - height) // 2
    cut = full.crop((left, top, left + width, top + height)) if full.size != canvas else full
    longer = max(wide, high)
    reference = full.resize((size * wide // longer, size * high // longer), Image.Resampling.BILINEAR)
    return reference, cut


def backdrop_size(shape: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the smallest whole background of this shape that covers the canvas."""
    (wide, high), (width, height) = shape, canvas
    if width * high >= height * wide:
        return width, width * high // wide
    return height * wide // high, height


def extent(item: Item, sprite: Image.Image, side: float) -> tuple[float, float]:
    """Width and height in pixels: an object's longer side, or a person's height, becomes ``side``."""
    width, height = sprite.width * item.look.stretch**0.5, sprite.height / item.look.stretch**0.5
    longer = height if item.asset.kind == "person" else max(width, height)
    scale = side / longer
    return width * scale, height * scale


def in_square(bank: Bank, item: Item, side: float) -> Rectangle:
    """Box of an item in its square in pixels: centred, or for busts cut by the lower edge."""
    width, height = extent(item, bank.sprite(item.asset), 1.0)
    scale = item.fill * side / max(width, height)
    width, height = width * scale, height * scale
    top = side * BUST_FOOT - height if item.asset.pose == "bust" else (side - height) / 2
    return (side - width) / 2, top, width, height


def place(bank: Bank, scene: Scene, hidden: Sequence[Hidden]) -> list[Rectangle]:
    """Boxes of all items; hosts come before the items that they carry."""
    boxes: list[Rectangle] = []
    for item, variation in zip(scene.items, hidden, strict=True):
        host = item.anchor.host
        if item.anchor.align in ("head", "top") and host is not None:
            boxes.append(_on_top(bank, item, scene.items[host], boxes[host], variation, hidden[host], scene.unit))
            continue
        side = item.anchor.size * scene.unit
        x, y = square(scene, item)
        left, top, width, height = in_square(bank, item, side)
        unit, larger = scene.size / 128, variation.scale - 1
        left += x + variation.dx * unit - larger * width / 2
        top += y + variation.dy * unit - larger * height / 2
        boxes.append((left, top, width * variation.scale, height * variation.scale))
    return boxes


def square(scene: Scene, item: Item) -> tuple[float, float]:
    """The upper left corner of an item's square: on the lattice, inside the picture. Pixels."""
    anchor = item.anchor
    x, foot = anchor.x, anchor.y
    if anchor.host is not None:  # at the chest
        host = scene.items[anchor.host].anchor
        x, foot = host.x, host.y
    (width, height), side, step = scene.canvas, anchor.size * scene.unit, lattice_step(scene.size)
    left = round((x * width - side / 2) / step) * step
    top = round((foot * height - side) / step) * step
    return min(max(left, 0), width - side), min(max(top, 0), height - side)


def _on_top(
    bank: Bank, item: Item, host: Item, box: Rectangle, variation: Hidden, hosts: Hidden, unit: float
) -> Rectangle:
    """The box of a hat, which fits its head, or of a thing that stands on another."""
    left, top, width, height = box
    sprite = bank.sprite(item.asset)
    if item.anchor.align == "head":
        x, y, span = bank.head(host.asset)
        x = 1 - x if hosts.flip else x
        relative, depth = HAT_FIT.get(item.asset.key, ANY_FIT)
        head = span * width
        scale = 1 + (variation.scale - 1) * 0.5  # hats vary less
        hat_width, hat_height = extent(item, sprite, 1.0)
        factor = relative * head * scale / hat_width
        hat_width, hat_height = hat_width * factor, hat_height * factor
        return left + x * width - hat_width / 2, top + y * height + depth * head - hat_height, hat_width, hat_height
    wide, high = extent(item, sprite, item.fill * item.anchor.size * unit * variation.scale)
    return left + (width - wide) / 2, max(top - high + 0.06 * high, 0), wide, high


def sprite_at(
    bank: Bank, item: Item, flip: bool, size: tuple[float, float], matrix: Matrix
) -> tuple[Image.Image, Image.Image]:
    """The item's colours (RGB) and alpha (L) at a pixel size."""
    whole = (max(1, round(size[0])), max(1, round(size[1])))
    picture = bank.sprite(item.asset).resize(whole, Image.Resampling.BILINEAR)
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return recolour(picture.convert("RGB"), matrix), picture.getchannel("A")


def cast_shadow(canvas: Image.Image, box: Rectangle) -> None:
    """A soft contact shadow under an item's foot."""
    left, top, width, height = box
    wide, high = max(2, round(width * 1.05)), max(2, round(width * 0.2))
    spot = _shadow().resize((wide, high), Image.Resampling.BILINEAR)
    canvas.paste((20, 16, 30), (round(left + (width - wide) / 2), round(top + height - high * 0.6)), spot)


@lru_cache(maxsize=1)
def _shadow() -> Image.Image:
    return soft_disc().point(lambda value: value * 0.55)


def assemble(
    bank: Bank, scene: Scene, background: Image.Image, hidden: Sequence[Hidden], matrices: Sequence[Matrix]
) -> tuple[Image.Image, tuple[Placement, ...]]:
    """Put the items on the background from far to near; ``matrices``: the colour map of each item before the light."""
    canvas, light = background.copy(), light_of(background)
    boxes = place(bank, scene, hidden)
    by_depth = sorted(range(len(scene.items)), key=lambda index: scene.items[index].anchor.z)
    masks: dict[int, np.ndarray] = {}
    for index in by_depth:
        item, (left, top, width, height) = scene.items[index], boxes[index]
        if item.anchor.align == "foot" and item.asset.pose != "bust":
            cast_shadow(canvas, boxes[index])
        colours, alpha = sprite_at(bank, item, hidden[index].flip, (width, height), light @ matrices[index])
        corner = (round(left), round(top))
        canvas.paste(colours, corner, alpha)
        layer = Image.new("L", scene.canvas)
        layer.paste(alpha, corner)
        cover = np.asarray(layer, np.float32) / 255
        masks = {farther: mask * (1 - cover) for farther, mask in masks.items()} | {index: cover}
    placements = tuple(
        Placement(scene.reference_of(index), item.asset, clip(boxes[index], scene.canvas), masks[index], item.anchor.z)
        for index, item in enumerate(scene.items)
    )
    return canvas, placements


def clip(box: Rectangle, canvas: tuple[int, int]) -> Box:
    """Left, top, right, bottom in whole pixels inside the picture."""
    left, top = round(box[0]), round(box[1])
    right, bottom = left + max(1, round(box[2])), top + max(1, round(box[3]))
    return max(left, 0), max(top, 0), min(right, canvas[0]), min(bottom, canvas[1])


def reference_picture(bank: Bank, item: Item, size: int) -> Image.Image:
    """Draw an asset alone on plain paper in a square picture."""
    left, top, width, height = in_square(bank, item, size)
    colours, alpha = sprite_at(bank, item, False, (width, height), look_matrix(item.look))
    paper = Image.new("RGB", (size, size), item.paper)
    paper.paste(colours, (round(left), round(top)), alpha)
    return paper


def render(bank: Bank, scene: Scene, *, hidden_seed: int | None = None) -> Sample:
    """Draw the scene. ``hidden_seed`` selects another hidden variation; edits have none."""
    return render_with(bank, scene, hidden_of(scene, hidden_seed))


def render_with(bank: Bank, scene: Scene, hidden: Sequence[Hidden]) -> Sample:
    """Draw the scene with a given hidden variation, one per item."""
    matrices = [look_matrix(item.look) for item in scene.items]
    reference, backdrop = _backdrop(scene.background, scene.background_shape, scene.size, scene.canvas)
    if scene.light:
        backdrop = recolour(backdrop, np.diag(LIGHTS[scene.light]))
    if scene.edit:
        before, _ = assemble(bank, scene, backdrop, hidden, matrices)
        after, backdrop, matrices, remaining = edited(scene, backdrop, matrices)
        target, placements = assemble(bank, after, backdrop, [hidden[index] for index in remaining], matrices)
        return Sample((before,), scene.instruction, target, backdrop.copy(), placements, scene.task)
    target, placements = assemble(bank, scene, backdrop, hidden, matrices)
    sources = [reference_picture(bank, item, scene.size) for item in scene.items] + [reference.copy()]
    sources += [reference_picture(bank, item, scene.size) for item in scene.spares]
    references = tuple(sources[source] for source in scene.order)
    return Sample(references, scene.instruction, target, backdrop.copy(), placements, scene.task)


def edited(
    scene: Scene, backdrop: Image.Image, matrices: list[Matrix]
) -> tuple[Scene, Image.Image, list[Matrix], list[int]]:
    """Scene after its edit, its background picture, its colour maps, and the indices of the remaining items."""
    edit, items = scene.edit, list(scene.items)
    assert edit is not None
    remaining = list(range(len(items)))
    if edit.background is not None:
        backdrop = _backdrop(edit.background, scene.shape, scene.size, scene.canvas)[1]
    elif edit.item is not None and edit.kind == "remove":
        remaining.remove(edit.item)
    elif edit.item is not None and edit.colour is not None:
        matrices = [*matrices]
        matrices[edit.item] = colour_matrix(edit.colour) @ matrices[edit.item]
    elif edit.item is not None and edit.anchor is not None:
        items[edit.item] = replace(items[edit.item], anchor=edit.anchor)
    after = replace(scene, items=tuple(items[index] for index in remaining))
    return after, backdrop, [matrices[index] for index in remaining], remaining
