"""What weights say about their own use: MODEL and CLIP carry it from the loader to the nodes that need it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from comfy.model_patcher import ModelPatcher

from ...unipic_core.errors import CheckpointError, UniPicError
from ...unipic_core.model.config import FULL
from ...unipic_core.sampling.schedules import Shift
from ...unipic_core.weights.recipe import Recipe, recipe_of
from ...unipic_core.weights.transformer import open_transformer

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
    """The facts that a ModelPatcher carries; of one from a stock loader, those of its file.

    Loaders that keep no path (GGUF) leave nothing to be known: docs/recipes.md's defaults. UniPicError for a file that
    only Load UniPic can use.
    """
    attached = patcher.get_attachment(KEY)
    if attached is not None:
        return attached
    path = stock_file(patcher)
    if path is None:
        return Facts()
    state = path.stat()
    return _facts_of_file(path, state.st_mtime_ns, state.st_size)


def stock_file(patcher: ModelPatcher) -> Path | None:
    """The file that a stock loader read: ComfyUI keeps it, to load again. None where there is none."""
    arguments = (getattr(patcher, "cached_patcher_init", None) or (None, ()))[1]
    first = arguments[0] if arguments else None
    path = Path(first) if isinstance(first, (str, Path)) else None
    return path if path is not None and path.is_file() else None


@lru_cache(maxsize=8)
def _facts_of_file(path: Path, changed: int, size: int) -> Facts:
    """changed, size: of the file, so that one rewritten under its name is read again."""
    recipe = recipe_of(path)
    form = recipe.attention_form
    if path.suffix in (".safetensors", ".sft"):
        with suppress(CheckpointError):  # a whole checkpoint, or quantised in a form that only ComfyUI reads
            form = open_transformer(path).config.attention_form
    if form != FULL:
        raise UniPicError(
            f"{path.name} attends in the form {form}, which ComfyUI's own loaders do not have; load it with Load UniPic"
        )
    return Facts(recipe)
