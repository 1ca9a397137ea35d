"""Bookkeeping of the LoRAs merged into a network: their strengths and recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..checks import finite
from ..errors import UniPicError
from ..weights.recipe import Recipe

NO_STRENGTH = 1e-6
"""Strengths that sum to less than this count as 0: in floating point 0.3 + 0.4 - 0.7 is not exactly 0."""


@dataclass(frozen=True)
class AddedLoRAs:
    """LoRAs in a network's weights. table: file -> (recipe, sum of its strengths) in order; sums of 0 are left out."""

    table: Mapping[Path, tuple[Recipe | None, float]] = field(default_factory=dict)

    def add(self, path: str | Path, recipe: Recipe | None, strength: float) -> AddedLoRAs:
        """Return the table with one more LoRA. Raises UniPicError for a strength that is not a finite number."""
        number = finite(strength)
        if number is None:
            raise UniPicError(f"the strength of a LoRA must be a finite number, got {strength!r}; 1 is usual")
        file = Path(path).resolve()
        total = self.table.get(file, (None, 0.0))[1] + number
        table = {**self.table, file: (recipe, total)}
        return AddedLoRAs({f: (r, s) for f, (r, s) in table.items() if abs(s) > NO_STRENGTH})

    def over(self, recipe: Recipe) -> Recipe:
        """Override the checkpoint's recipe with those of the LoRAs, in order."""
        for of_lora, _ in self.table.values():
            recipe = recipe.merge(of_lora)
        return recipe
