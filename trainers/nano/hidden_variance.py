"""Hidden variance: pixel variance of the targets that the inputs leave open (scale, mirror image, offset).

    python -m trainers.nano.hidden_variance [--split heldout] [--scenes 100] [--seed 0]

It bounds how close a picture drawn from the inputs alone can be to the target on average.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .catalogue import Split
from .emoji import Bank
from .render import Hidden, Sample, hidden_of, render_with
from .scene import Scene
from .scenes import EDITS, TASKS, make_scene

# Restriction of the hidden variation to one cause.
CAUSES: dict[str, Callable[[Hidden], Hidden]] = {
    "all": lambda hidden: hidden,
    "scale": lambda hidden: Hidden(scale=hidden.scale),
    "flip": lambda hidden: Hidden(flip=hidden.flip),
    "offset": lambda hidden: replace(hidden, scale=1.0, flip=False),
}


@dataclass(frozen=True)
class HiddenShare:
    """Share of a task's target variance per cause, and the PSNR of predicting the mean (dB)."""

    shares: dict[str, float]
    ceiling_psnr: float


def _pixels(sample: Sample) -> np.ndarray:
    return np.asarray(sample.target, np.float64)


def _half_squared_difference(bank: Bank, scene: Scene, cause: Callable[[Hidden], Hidden]) -> float:
    """Half the mean squared difference of two renders estimates the variance without bias."""
    first, second = (
        _pixels(render_with(bank, scene, [cause(hidden) for hidden in hidden_of(scene, seed)])) for seed in (1, 2)
    )
    return float(((first - second) ** 2).mean() / 2)


def hidden_share(bank: Bank, split: Split, task: str, scenes: int = 100, seed: int = 0) -> HiddenShare:
    """Variance within scenes over hidden seeds, relative to the variance of all targets of the task.

    The total is around the mean picture of the task. Edits have no hidden variation, so their shares are 0.
    """
    drawn = [make_scene(bank, split, seed, index, task=task) for index in range(scenes)]
    targets = np.stack([_pixels(render_with(bank, scene, hidden_of(scene, None))) for scene in drawn])
    total = float(targets.var(axis=0).mean())
    hidden = {
        name: float(np.mean([_half_squared_difference(bank, scene, cause) for scene in drawn]))
        for name, cause in CAUSES.items()
    }
    ceiling = 10 * np.log10(255**2 / hidden["all"]) if hidden["all"] > 0 else float("inf")
    return HiddenShare({name: value / total for name, value in hidden.items()}, float(ceiling))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("train", "heldout", "all"), default="heldout")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bank = Bank.open()
    print(bank.note)
    print(f"{'task':10}", *(f"{cause:>7}" for cause in CAUSES), "ceiling PSNR")
    for task in (task for task in TASKS if task not in EDITS):
        share = hidden_share(bank, options.split, task, options.scenes, options.seed)
        print(f"{task:10}", *(f"{value:7.1%}" for value in share.shares.values()), f"{share.ceiling_psnr:9.1f} dB")


if __name__ == "__main__":
    main()
