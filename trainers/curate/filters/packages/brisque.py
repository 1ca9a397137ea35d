"""BRISQUE (Mittal, Moorthy and Bovik 2012): quality of a photograph without a reference; lower is better.

The features in numpy, and the decision function of the package's support vector machine. The package itself fails on
numpy 2.4 and needs OpenCV, so only its weights are read.
"""

from __future__ import annotations

import math
import pickle
from functools import lru_cache
from typing import IO, Any

import numpy as np

from ..picture import Decoded
from . import folder_of

TAPS, SIGMA, STABILISER = 7, 7 / 6, 1 / 255
GREY = np.array([0.2125, 0.7154, 0.0721])
HALF = np.array([-0.09375, 0.59375, 0.59375, -0.09375])
"""Bicubic weights (a = -0.75) between two pixels."""

LARGEST = 1024
"""Longer pictures are measured at their centre: 1024 x 1024 pixels at native size."""


def brisque(picture: Decoded) -> float:
    """Score of the picture's centre at native size: below 30 for clean photographs, above it for spoilt ones."""
    width, height = picture.size
    left, top = max(0, (width - LARGEST) // 2), max(0, (height - LARGEST) // 2)
    crop = picture.rgb.crop((left, top, min(width, left + LARGEST), min(height, top + LARGEST)))
    return float(f"{score(np.asarray(crop, np.float64) / 255 @ GREY):.6g}")


def score(grey: np.ndarray) -> float:
    """Score of grey values in 0..1, [H, W]."""
    if min(grey.shape) < 4 * TAPS:
        return 100.0
    least, most, vectors, weights, gamma, rho = model()
    values = np.array([*features(grey), *features(halved(grey))])
    scaled = 2 * (values - least) / (most - least) - 1
    return float(weights @ np.exp(-gamma * ((vectors - scaled) ** 2).sum(axis=1)) - rho)


def features(grey: np.ndarray) -> list[float]:
    """18 numbers: the shape of the normalised luminance, and of its products with four neighbours."""
    values = normalised(grey)
    pairs = (
        values[:, :-1] * values[:, 1:],
        values[:-1] * values[1:],
        values[:-1, :-1] * values[1:, 1:],
        values[1:, :-1] * values[:-1, 1:],
    )
    alpha, _, left, right = fit(values)
    found = [alpha, (left**2 + right**2) / 2]
    for pair in pairs:
        alpha, mean, left, right = fit(pair)
        found += [alpha, mean, left**2, right**2]
    return found


def normalised(grey: np.ndarray) -> np.ndarray:
    """Luminance minus its local mean, over its local deviation."""
    mean = smoothed(grey)
    deviation = np.sqrt(np.abs(mean**2 - smoothed(grey**2)))
    return (grey - mean) / (deviation + STABILISER)


def smoothed(grey: np.ndarray) -> np.ndarray:
    """Gaussian mean of 7 x 7 pixels, zeros outside."""
    window = np.exp(-((np.arange(TAPS) - TAPS // 2) ** 2) / (2 * SIGMA**2))
    window /= window.sum()
    padded = np.pad(grey, TAPS // 2)
    rows = sum(w * padded[i : i + grey.shape[0]] for i, w in enumerate(window))
    return np.asarray(sum(w * rows[:, i : i + grey.shape[1]] for i, w in enumerate(window)))


def halved(grey: np.ndarray) -> np.ndarray:
    """Bicubic reduction to half the size."""
    height, width = round(grey.shape[0] / 2), round(grey.shape[1] / 2)
    padded = np.pad(grey, ((1, 3), (1, 3)), mode="edge")
    rows = sum(w * padded[i : i + 2 * height : 2] for i, w in enumerate(HALF))
    return np.asarray(sum(w * rows[:, i : i + 2 * width : 2] for i, w in enumerate(HALF)))


def fit(values: np.ndarray) -> tuple[float, float, float, float]:
    """Asymmetric generalised Gaussian: (shape, mean, left deviation, right deviation)."""
    below, above = values[values < 0], values[values >= 0]
    left, right = math.sqrt(_mean_square(below)), math.sqrt(_mean_square(above))
    ratio = left / right if right else 1.0
    spread = float(np.mean(np.abs(values)) ** 2 / max(np.mean(values**2), 1e-12))
    shape = shape_of(spread * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2)
    constant = math.sqrt(math.gamma(1 / shape) / math.gamma(3 / shape))
    mean = (right - left) * constant * math.gamma(2 / shape) / math.gamma(1 / shape)
    return shape, mean, left, right


def _mean_square(values: np.ndarray) -> float:
    return float(np.mean(values**2)) if values.size else 0.0


def shape_of(spread: float) -> float:
    """Shape whose gamma(2/s)^2 / (gamma(1/s) gamma(3/s)), which rises with s, is `spread`; by bisection in 0.1..20."""
    low, high = 0.1, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        rises = math.gamma(2 / middle) ** 2 / (math.gamma(1 / middle) * math.gamma(3 / middle))
        low, high = (middle, high) if rises < spread else (low, middle)
    return (low + high) / 2


class _Numbers(pickle.Unpickler):
    """Unpickler of plain numbers, lists and dictionaries: anything that names a class is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed here")


def _numbers(file: IO[bytes]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = _Numbers(file).load()
    return values


@lru_cache(maxsize=1)
def model() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, float]:
    """Smallest and largest features, support vectors [n, 36], their weights [n], gamma and rho."""
    folder = folder_of("brisque") / "models"
    with (folder / "normalize.pickle").open("rb") as file:
        scale = _numbers(file)
    head, _, body = (folder / "svm.txt").read_text(encoding="ascii").partition("SV\n")
    settings = dict(line.split(" ", 1) for line in head.splitlines() if " " in line)
    rows = [line.split() for line in body.splitlines() if line.strip()]
    vectors = np.zeros((len(rows), 36))
    for at, row in enumerate(rows):
        for pair in row[1:]:
            index, value = pair.split(":")
            vectors[at, int(index) - 1] = float(value)
    weights = np.array([float(row[0]) for row in rows])
    least, most = (np.array(scale[name], np.float64) for name in ("min_", "max_"))
    return least, most, vectors, weights, float(settings["gamma"]), float(settings["rho"])
