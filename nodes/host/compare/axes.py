"""Axes of a comparison: which setting varies, its values as typed, and the cells that they span."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ....unipic_core.errors import UniPicError
from ..sampling.choices import Widgets

NONE = "none"
AXES = SEED, STEPS, GUIDANCE, LORA, BUDGET = "seed", "steps", "guidance", "lora_strength", "reference_budget"
"""Settings that an axis can vary."""

MOST_CELLS = 64
"""Largest number of pictures in a grid."""

_LABELS = {SEED: "seed", STEPS: "steps", GUIDANCE: "guidance", LORA: "LoRA", BUDGET: "budget"}
_WHOLE = (SEED, STEPS, BUDGET)


@dataclass(frozen=True)
class Cell:
    """Settings of one picture. lora: strength, None = without the LoRA; budget: side in pixels, None = as composed."""

    seed: int
    widgets: Widgets
    lora: float | None = None
    budget: int | None = None

    def at(self, axis: str, value: float) -> Cell:
        """The cell with another value on an axis. Values are whole numbers where the setting is one."""
        if axis == SEED:
            return replace(self, seed=int(value))
        if axis == STEPS:
            return replace(self, widgets=replace(self.widgets, steps=int(value)))
        if axis == GUIDANCE:
            return replace(self, widgets=replace(self.widgets, cfg=value))
        return replace(self, lora=value) if axis == LORA else replace(self, budget=int(value))


@dataclass(frozen=True)
class Axis:
    """A setting and its values; for NONE no values, and one row or column."""

    name: str
    values: tuple[float, ...]

    @property
    def labels(self) -> list[str]:
        """Name and value of each row or column; whole numbers with all their digits, which seeds need."""
        return [f"{_LABELS[self.name]} {int(v) if self.name in _WHOLE else f'{v:.12g}'}" for v in self.values]

    def over(self, cell: Cell) -> list[Cell]:
        """The cell at each of the values."""
        return [cell.at(self.name, value) for value in self.values] or [cell]


def parsed_axis(side: str, name: str, text: str) -> Axis:
    """Parse the values of an axis, such as "1, 2, 3". side: "x" or "y". Raises UniPicError."""
    if name == NONE:
        return Axis(NONE, ())
    if name not in AXES:
        raise UniPicError(f"{side}_axis must be one of {', '.join((NONE, *AXES))}, got {name!r}")
    words = [word for word in re.split(r"[,;\s]+", text.strip()) if word]
    if not words:
        raise UniPicError(f"{side}_values must list values of {name}, such as {_example(name)}, got nothing")
    return Axis(name, tuple(_number(side, name, word) for word in words))


def spanned(cell: Cell, x: Axis, y: Axis) -> list[list[Cell]]:
    """Rows of cells: y from row to row, x from column to column. Raises UniPicError for equal axes and large grids."""
    if x.name == y.name != NONE:
        raise UniPicError(f"x_axis and y_axis must be different settings, got {x.name} twice; set one to none")
    rows, columns = max(len(y.values), 1), max(len(x.values), 1)
    if rows * columns > MOST_CELLS:
        raise UniPicError(
            f"a grid may have at most {MOST_CELLS} pictures, got {columns} x {rows} = {rows * columns}; give fewer "
            "values"
        )
    return [x.over(of_row) for of_row in y.over(cell)]


def order(cells: Sequence[Cell]) -> list[int]:
    """Indices of the cells in the order in which to sample: equal LoRA strengths and budgets one after the other, since
    a change of them takes longest."""

    def cost(index: int) -> tuple[float, int]:
        cell = cells[index]
        return (float("-inf") if cell.lora is None else cell.lora, cell.budget or 0)

    return sorted(range(len(cells)), key=cost)


def _number(side: str, name: str, word: str) -> float:
    try:
        value = int(word) if name in _WHOLE else float(word)
    except ValueError:
        kind = "whole numbers" if name in _WHOLE else "numbers"
        raise UniPicError(f"{side}_values must be {kind} for {name}, such as {_example(name)}, got {word!r}") from None
    if name == SEED and not 0 <= value < 2**64:
        raise UniPicError(f"{side}_values must be seeds from 0 to 2^64 - 1, got {word}")
    if name in (STEPS, BUDGET, GUIDANCE) and not 0 < value < float("inf"):
        raise UniPicError(f"{side}_values must be above 0 for {name}, got {word}")
    if value != value or value in (float("inf"), float("-inf")):
        raise UniPicError(f"{side}_values must be finite, got {word}")
    return value


def _example(name: str) -> str:
    examples = {SEED: "1, 2, 3", STEPS: "4, 8, 16", GUIDANCE: "1, 2.5, 4", LORA: "0, 0.5, 1", BUDGET: "512, 1024"}
    return examples[name]
