"""What weights say about their own use: MODEL and CLIP carry it from the loader to the nodes that need it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from comfy.model_patcher import ModelPatcher

from ...unipic_core.sampling.schedules import Shift
from ...unipic_core.weights.recipe import Recipe

KEY = "unipic"


@dataclass(frozen=True)
class Facts:
    """recipe: the checkpoint's, with those of its LoRAs over it. shift: the time shift of its scheduler."""

    recipe: Recipe = field(default_factory=Recipe)
    shift: Shift = field(default_factory=Shift)

    def with_recipe(self, over: Recipe | None) -> Facts:
        """Another recipe over this one, as a LoRA brings it."""
        return replace(self, recipe=self.recipe.merge(over))


def attach(patcher: ModelPatcher, facts: Facts) -> None:
    """Let a ModelPatcher (a MODEL, or a CLIP's .patcher) carry the facts; its clones carry them too."""
    patcher.set_attachments(KEY, facts)


def facts_of(patcher: ModelPatcher) -> Facts:
    """The facts that a ModelPatcher carries; docs/recipes.md's defaults for one of another loader."""
    return patcher.get_attachment(KEY) or Facts()
