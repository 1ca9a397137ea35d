"""`python -m tests.benchmarks.placement [--model PATH] [--n N] [--steps N] [--json FILE] [--speed]`

Which way to put references into boxes is followed best by weights that were never trained with boxes, on closed scenes
of two things side by side, whose places are known:

- none: words alone;
- mask: the target's tokens outside a reference's box do not attend to it (Influence.region);
- soft: the same with a strength of e^-2 and e^-4 outside, in place of 0;
- area: one conditioning for each box, with that reference and the background alone, as by ComfyUI's Conditioning (Set
  Mask), and one of the background for the rest.

Words either leave the sides open or name them. Boxes are those of the scene, or exchanged. For each thing: the IoU of
the changed pixels' box at its asked place with the asked box, 0 if the other thing is there. The control is the IoU of
the same picture with the exchanged boxes.

--speed: the time of a step of a wide network with and without an attention bias, in place of all this.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainers.judges.arrays import psnr, to_array
from trainers.judges.placement import SOLID, changed, owners, union
from trainers.judges.statistics import Bootstrap
from trainers.nano.emoji import Bank
from trainers.nano.open_scenes.wording import open_instruction
from trainers.nano.render import Hidden, Sample, render_with
from trainers.nano.scene import Scene
from trainers.nano.scenes import make_scene
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.images import resize_references, to_images
from unipic_core.conditioning.influence import GRID, Influence, Region
from unipic_core.conditioning.sequence import LatentShape, TextCond, pack_with_references
from unipic_core.model import reference_bias
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.pipeline import UniPicPipeline
from unipic_core.run.plan import resolve
from unipic_core.sampling.samplers import sample_euler, seeded_noise

from .common import heading, in_turns, line, machine, write_json

OUTSIDE = {"mask": 0.0, "soft e^-4": float(np.exp(-4)), "soft e^-2": float(np.exp(-2))}
"""Way -> strength of a reference outside its box."""

TRIMMED = 2.0
"""Per cent of the changed pixels that a found box leaves out at each side."""

AREA_WORDS, REST_WORDS = "Show the {} from image 1, in the place of image 2.", "Show the place of image 1."

COLUMNS = {"way": "<10", "words": "<8", "boxes": "<16", "iou": ">6.2f", "low": ">6.2f", "high": ">6.2f"}
COLUMNS |= {"control": ">8.2f", "right": ">6.2f", "things_db": ">10.1f", "around_db": ">10.1f"}

Generate = Callable[[str, Sequence[Region] | None], Image.Image]
"""(instruction, boxes of the two things or None) -> picture."""


@dataclass(frozen=True)
class Case:
    """A scene of two things side by side and the same with their places exchanged."""

    scene: Scene
    samples: tuple[Sample, Sample]
    open_words: str

    @classmethod
    def of(cls, bank: Bank, scene: Scene) -> Case:
        first, second = scene.items
        exchanged = replace(scene, items=(replace(first, anchor=second.anchor), replace(second, anchor=first.anchor)))
        hidden = [Hidden(), Hidden()]
        samples = (render_with(bank, scene, hidden), render_with(bank, exchanged, hidden))
        rng = np.random.default_rng(scene.seed)
        words = open_instruction("open_side", scene.items, scene.background, scene.order, False, rng)
        return cls(scene, samples, words)

    def regions(self, ask: int) -> list[Region]:
        """Boxes of both things as in the scene (0) or exchanged (1)."""
        size = self.scene.size / GRID
        return [Region(*(side / size for side in placement.box)) for placement in self.samples[ask].placements]

    def score(self, picture: Image.Image, ask: int) -> dict[str, float]:
        """IoU with the asked boxes, share of things at their asked place, and PSNR of the things and around them."""
        asked, other = self.samples[ask], self.samples[1 - ask]
        shown, backdrop = to_array(picture), to_array(asked.background)
        truth, exchanged = to_array(asked.target), to_array(other.target)
        masks = [placement.mask for placement in asked.placements]
        pixels, owner = changed(shown, backdrop), owners(masks)
        ious, right = [], []
        for i, placement in enumerate(asked.placements):
            there = union([masks[i], other.placements[1 - i].mask]) > SOLID
            errors = [float(((shown - x)[there] ** 2).mean()) for x in (truth, exchanged)]
            right.append(errors[0] < errors[1])
            box = found_box(pixels & (owner == i))
            ious.append(box_iou(box, placement.box) if right[-1] and box else 0.0)
        inside = union(masks) > SOLID
        return {
            "iou": float(np.mean(ious)),
            "right": float(np.mean(right)),
            "things_db": psnr(float(((shown - truth)[inside] ** 2).mean())),
            "around_db": psnr(float(((shown - truth)[~inside] ** 2).mean())),
        }


def found_box(pixels: np.ndarray) -> tuple[float, float, float, float] | None:
    """Box (left, top, right, bottom) of most of the pixels; None without any."""
    rows, columns = np.nonzero(pixels)
    if not len(rows):
        return None
    ends = (TRIMMED, 100 - TRIMMED)
    (left, right), (top, bottom) = np.percentile(columns, ends), np.percentile(rows, ends)
    return left, top, right + 1, bottom + 1


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(wide, 0) * max(high, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def masked(pipe: UniPicPipeline, case: Case, steps: int, outside: float) -> Generate:
    """Generate with the network's attention bias."""

    def generate(words: str, regions: Sequence[Region] | None) -> Image.Image:
        order, influences = case.scene.order, None
        if regions is not None:
            influences = [Influence(region=regions[source]) if source < 2 else Influence() for source in order]
        before, reference_bias.OUTSIDE = reference_bias.OUTSIDE, outside
        try:
            return pipe(
                list(case.samples[0].references),
                words,
                width=case.scene.canvas[0],
                height=case.scene.canvas[1],
                num_inference_steps=steps,
                true_cfg_scale=1.0,
                sampler="euler",
                seed=case.scene.seed % 2**31,
                influences=influences,
            ).images[0]
        finally:
            reference_bias.OUTSIDE = before

    return generate


def by_area(pipe: UniPicPipeline, case: Case, steps: int) -> Generate:
    """Generate with one conditioning for each box and one for the rest, as ComfyUI blends masked conditionings."""
    scene, references = case.scene, case.samples[0].references
    background = references[scene.order.index(2)]
    shape = LatentShape.of_pixels(*scene.canvas)

    def condition(pictures: list[Image.Image], words: str) -> tuple[list[Tensor], TextCond]:
        resized = resize_references(pictures, resolve(pipe.recipe).reference_budget)
        return pipe._encode_references(resized), pipe._encode_text(resized, words)

    @torch.no_grad()
    def generate(words: str, regions: Sequence[Region] | None) -> Image.Image:
        assert regions is not None  # area conditioning needs areas
        inside = [Influence(region=region) for region in regions]
        weights = [reference_bias._strengths(influence, shape)[None, :, None] for influence in inside]
        weights.append((1 - torch.stack(weights).sum(0)).clamp(0, 1))
        names = [item.asset.name for item in scene.items]
        parts = [
            condition([references[scene.order.index(i)], background], AREA_WORDS.format(name))
            for i, name in enumerate(names)
        ]
        parts.append(condition([background], REST_WORDS))
        noise = seeded_noise((shape.num_tokens, pipe.transformer.config.in_channels), scene.seed % 2**31)(-1)[None]
        packed = [pack_with_references(noise, shape, [latents]) for latents, _ in parts]

        def velocity(x_t: Tensor, t: float) -> Tensor:
            total = sum(weights)
            each = [
                weight * pipe.transformer(sequence.with_target(x_t), t, text).float()
                for weight, sequence, (_, text) in zip(weights, packed, parts, strict=True)
            ]
            return sum(each) / total  # type: ignore[operator,return-value]

        times = resolve(pipe.recipe, steps, 1.0, "euler").times(shape.num_tokens, pipe.shift).tolist()
        return to_images(pipe._decode(sample_euler(velocity, noise, times), shape))[0]

    return generate


def cases(n: int, size: int) -> list[Case]:
    """Scenes of two unseen things, one left of the other."""
    bank = Bank.open(size=size)
    found: list[Case] = []
    index = 0
    while len(found) < n:
        scene = make_scene(bank, "heldout", 11, index, task="pair", size=size)
        index += 1
        if scene.items[1].relation in ("left", "right"):
            found.append(Case.of(bank, scene))
    return found


def measure(pipe: UniPicPipeline, n: int, steps: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """After each scene its number, and one row for each way, kind of words and order of the boxes, with the mean over
    the scenes so far and its interval."""
    scores: dict[tuple[str, str, str], list[tuple[dict[str, float], float]]] = {}

    def note(way: str, words: str, boxes: str, case: Case, picture: Image.Image, ask: int) -> None:
        score, control = case.score(picture, ask), case.score(picture, 1 - ask)
        scores.setdefault((way, words, boxes), []).append((score, control["iou"]))

    for number, case in enumerate(cases(n, resolve(pipe.recipe).output_budget), start=1):
        kinds = {"open": case.open_words, "named": case.scene.instruction}
        for boxes, ask in (("as in the scene", 0), ("exchanged", 1)):
            note("truth", "-", boxes, case, case.samples[ask].target, ask)
            for words, text in kinds.items():
                plain = masked(pipe, case, steps, 0.0)(text, None)
                note("none", words, boxes, case, plain, ask)
                for way, outside in OUTSIDE.items():
                    if words == "open" or way == "mask":
                        picture = masked(pipe, case, steps, outside)(text, case.regions(ask))
                        note(way, words, boxes, case, picture, ask)
            note("area", "its own", boxes, case, by_area(pipe, case, steps)("", case.regions(ask)), ask)
        yield number, [row_of(key, values) for key, values in scores.items()]


def row_of(key: tuple[str, str, str], values: Sequence[tuple[dict[str, float], float]]) -> dict[str, Any]:
    way, words, boxes = key
    names = values[0][0]
    means = {name: float(np.mean([score[name] for score, _ in values])) for name in names}
    estimate = Bootstrap(len(values), seed=0).mean(np.array([[score["iou"]] for score, _ in values]))
    control = float(np.mean([iou for _, iou in values]))
    row = {"way": way, "words": words, "boxes": boxes, **means, "control": control}
    return row | {"low": estimate.low, "high": estimate.high} if estimate else row


def speed() -> None:
    """Print the ratio of a step's time with a bias to that without, for layers of width 1536, and the bias's memory."""
    config = MMDiTConfig(num_layers=2, num_attention_heads=12, joint_attention_dim=256)
    print("target + references + text tokens: time with a bias / without, memory of the bias in float32")
    for side in (32, 64):
        network = MMDiT(config).eval().requires_grad_(False)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        shape = LatentShape(1, side, side)
        noise = torch.randn(1, shape.num_tokens, config.in_channels)
        references = [torch.randn(1, 16, 1, 2 * side, side) for _ in range(2)]
        packed, text = pack_with_references(noise, shape, [references]), TextCond(torch.randn(1, 300, 256))
        influences = [Influence(region=Region(0, 0, 500, 1000)), Influence(0.5)]
        bias = reference_bias.reference_bias(influences, [(1.0, 0.0)] * 2, shape, 0.5)
        runs = {
            "without": partial(network, packed, 0.5, text),
            "with": partial(network, packed, 0.5, text, reference_bias=bias),
        }
        with torch.no_grad():
            times = in_turns(runs, 5 if side == 32 else 3)
        tokens = packed.tokens.shape[1] + 300
        ratio = times.ratio("with", "without")
        print(f"{shape.num_tokens} + {shape.num_tokens} + 300: {ratio}, {tokens**2 * 4 / 2**20:.0f} MiB", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.placement", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.speed:
        return speed()
    pipe = UniPicPipeline.from_pretrained(args.model, torch_dtype=torch.float32, device="cpu")
    for number, rows in measure(pipe, args.n, args.steps):
        print(f"scene {number} of {args.n}", file=sys.stderr, flush=True)
        if number % 10 == 0 or number == args.n:
            write_json(args.json, {"machine": machine(), "n": number, "steps": args.steps, "rows": rows})
    print(heading(COLUMNS))
    for row in rows:
        print(line(COLUMNS, row))


if __name__ == "__main__":
    main()
