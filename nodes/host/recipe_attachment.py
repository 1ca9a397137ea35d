"""The recipe of the weights, attached to MODEL and CLIP on their way from the loader to the other nodes."""

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
class RecipeAttachment:
    """recipe: the checkpoint's, overridden by those of its LoRAs. shift: the time shift of its scheduler."""

    recipe: Recipe = field(default_factory=Recipe)
    shift: Shift = field(default_factory=Shift)

    def with_recipe(self, over: Recipe | None) -> RecipeAttachment:
        """A copy whose recipe is overridden by another, such as a LoRA's."""
        return replace(self, recipe=self.recipe.merge(over))


def attach(patcher: ModelPatcher, attachment: RecipeAttachment) -> None:
    """Attach a recipe to a ModelPatcher (a MODEL, or a CLIP's .patcher) and its later clones."""
    patcher.set_attachments(KEY, attachment)


def attachment_of(patcher: ModelPatcher) -> RecipeAttachment:
    """The attachment of a ModelPatcher; for one of a stock loader, the recipe of its file.

    A loader that stores no path, such as GGUF's, gets the defaults of docs/recipes.md. UniPicError for a file that only
    Load UniPic can use.
    """
    attached = patcher.get_attachment(KEY)
    if attached is not None:
        return attached
    path = stock_file(patcher)
    if path is None:
        return RecipeAttachment()
    state = path.stat()
    return _attachment_of_file(path, state.st_mtime_ns, state.st_size)


def stock_file(patcher: ModelPatcher) -> Path | None:
    """File of a stock loader, which ComfyUI stores to load it again; None for other loaders."""
    arguments = (getattr(patcher, "cached_patcher_init", None) or (None, ()))[1]
    first = arguments[0] if arguments else None
    path = Path(first) if isinstance(first, (str, Path)) else None
    return path if path is not None and path.is_file() else None


@lru_cache(maxsize=8)
def _attachment_of_file(path: Path, changed: int, size: int) -> RecipeAttachment:
    """changed, size: of the file, so that a rewritten one is read again."""
    recipe = recipe_of(path)
    form = recipe.attention_form
    if path.suffix in (".safetensors", ".sft"):
        with suppress(CheckpointError):  # a whole checkpoint, or quantised in a form that only ComfyUI reads
            form = open_transformer(path).config.attention_form
    if form != FULL:
        raise UniPicError(
            f"{path.name} has the attention form {form}, which ComfyUI's own loaders do not have; load it with Load "
            "UniPic"
        )
    return RecipeAttachment(recipe)
