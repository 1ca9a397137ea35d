"""Which LoRAs are in a network's weights, and what they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..checks import finite
from ..errors import UniPicError
from ..weights.recipe import Recipe

NO_STRENGTH = 1e-6
"""Strengths that add up to less than this leave the weights as they were: 0.3 + 0.4 - 0.7 is not quite 0."""


@dataclass(frozen=True)
class AddedLoRAs:
    """File -> (its recipe, all its strengths added up), in the order they came; those that cancelled are not there."""

    table: Mapping[Path, tuple[Recipe | None, float]] = field(default_factory=dict)

    def add(self, path: str | Path, recipe: Recipe | None, strength: float) -> AddedLoRAs:
        """With one more. UniPicError for a strength that is not a finite number."""
        number = finite(strength)
        if number is None:
            raise UniPicError(f"the strength of a LoRA must be a number, got {strength!r}")
        file = Path(path).resolve()
        total = self.table.get(file, (None, 0.0))[1] + number
        table = {**self.table, file: (recipe, total)}
        return AddedLoRAs({f: (r, s) for f, (r, s) in table.items() if abs(s) > NO_STRENGTH})

    def over(self, recipe: Recipe) -> Recipe:
        """The checkpoint's recipe with those of the LoRAs over it."""
        for of_lora, _ in self.table.values():
            recipe = recipe.merge(of_lora)
        return recipe
