"""What a finished run leaves: a LoRA, the same merged into its base as one file, and as a diffusers folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from unipic_core.errors import CheckpointError
from unipic_core.model.config import MMDiTConfig
from unipic_core.weights.convert import WeightStream, protect_sources, source_recipe, write_file
from unipic_core.weights.lora import save_lora
from unipic_core.weights.merge import merge, write_folder
from unipic_core.weights.recipe import Recipe
from unipic_core.weights.transformer import check_keys, expected_shapes

STORAGE_DTYPE = "bf16"
"""How trained weights are written."""


def export_adapter(
    folder: Path,
    base: Path,
    layers: Mapping[str, tuple[Tensor, Tensor]],
    alpha: float,
    recipe: Recipe,
    name: str = "unipic_distill",
    parts_from: Path | None = None,
) -> None:
    """Write NAME.safetensors (the LoRA), NAME_merged.safetensors and the folder NAME/ (`base` with the LoRA).

    base: any checkpoint that `merge` reads. parts_from: the pipeline folder of NAME/'s other parts, `base` unless it is
    said. layers: bare module name -> (down [r, in], up [out, r]), on any device. recipe: the LoRA's own; the merged
    ones have it over the base's. What an earlier export left is replaced, each of the three when its successor is
    whole. Raises CheckpointError, as for a full disk or where a source itself would be replaced, and LoRAError for
    layers that do not fit `base`.
    """
    sources = [base, parts_from or base]
    lora, merged, model = _targets(folder, sources, f"{name}.safetensors", f"{name}_merged.safetensors", name)
    save_lora(lora, layers, alpha=alpha, recipe=recipe)
    for target in (merged, model):
        merge(base, target, [(lora, 1.0)], dtype=STORAGE_DTYPE, overwrite=True, parts_from=parts_from)


def export_network(
    folder: Path,
    base: Path,
    network_state: Mapping[str, Tensor],
    config: MMDiTConfig,
    recipe: Recipe,
    name: str = "unipic_distill",
    parts_from: Path | None = None,
) -> None:
    """Write NAME.safetensors and the folder NAME/ with a network whose every weight was trained.

    base: where the training started; its recipe goes under `recipe`. parts_from: the pipeline folder of NAME/'s other
    parts, `base` unless it is said. network_state: bare parameter name -> tensor, on any device. Raises CheckpointError
    for a state that does not fit `config`, for a full disk, and where a source itself would be replaced.
    """
    report = check_keys(expected_shapes(config), {key: tuple(value.shape) for key, value in network_state.items()})
    if not report.fits:
        raise CheckpointError(f"the trained weights do not fit their config ({report})")
    single, model = _targets(folder, [base, parts_from or base], f"{name}.safetensors", name)
    stream = WeightStream(config, source_recipe(base).merge(recipe), partial(_state_tensors, network_state))
    write_file(single, stream, STORAGE_DTYPE)
    write_folder(model, stream, STORAGE_DTYPE, parts_from or base)


def _targets(folder: Path, sources: Sequence[Path], *names: str) -> list[Path]:
    """What is going to be written, in a folder that is there; CheckpointError if a source is one of it or in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    targets = [folder / name for name in names]
    for target in targets:
        protect_sources(target, sources)
    return targets


def _state_tensors(state: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """One parameter after the other, on the CPU."""
    return ((name, state[name].detach().cpu()) for name in names)
