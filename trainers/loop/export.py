"""Exports of a finished run: a LoRA, the merged model as one file, and as a diffusers folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from unipic_core.errors import CheckpointError
from unipic_core.model.config import MMDiTConfig
from unipic_core.weights.convert import STORAGE_DTYPES, WeightStream, protect_sources, source_recipe, write_file
from unipic_core.weights.lora import save_adapter
from unipic_core.weights.lora_layers import LoRALayer
from unipic_core.weights.merge import MODEL_INDEX, OTHER_PARTS, merge, write_folder
from unipic_core.weights.model_files import files_to_copy
from unipic_core.weights.recipe import Recipe
from unipic_core.weights.transformer import check_keys, expected_shapes

from .checkpointing import TrainingError, free_space, gigabytes, partial_folder, put_in_place


@dataclass(frozen=True)
class Export:
    """One file or folder of RUN/export. size: bytes, 0 if small.

    write: writes `name` into a folder; with sharded networks every process calls it.
    """

    name: str
    size: int
    write: Callable[[Path], None]


def write_exports(accelerator: Accelerator, exports: Sequence[Export], folder: Path, together: bool) -> None:
    """Write the exports one by one, each atomically. together: every process takes part.

    Raises TrainingError that names the finished exports and the bytes that the others need.
    """
    for i, export in enumerate(exports):
        try:
            with partial_folder(accelerator, folder / export.name) as aside:
                if accelerator.is_main_process or together:
                    export.write(aside)
        except TrainingError as error:
            needed = sum(other.size for other in exports[i:])
            finished = ", ".join(other.name for other in exports[:i]) or "nothing"
            raise TrainingError(
                f"{error}. Exported so far: {finished}. The others need {gigabytes(needed)}, and {free_space(folder)} "
                "are "
                "free: free some, or choose fewer with export: [lora], and run the same command again; it only exports"
            ) from error
        if accelerator.is_main_process:
            put_in_place(aside / export.name, folder / export.name)
            shutil.rmtree(aside)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        names = {export.name for export in exports}
        if older := sorted(path.name for path in folder.iterdir() if path.name not in names):
            accelerator.print(f"note: files of earlier exports are kept in {folder}: {', '.join(older)}")


def check_space(accelerator: Accelerator, exports: Sequence[Export], output: Path) -> None:
    """Warn before training starts if the export will not fit."""
    needed = sum(export.size for export in exports)
    if needed > shutil.disk_usage(output).free:
        accelerator.print(
            f"warning: the export will need {gigabytes(needed)} in {output}, where {free_space(output)} are free; "
            "free some before the end, or choose fewer formats with export: [lora]"
        )


STORAGE_DTYPE = "bf16"
"""Storage dtype of exported weights."""


def export_adapter(
    folder: Path,
    base: Path,
    layers: Mapping[str, LoRALayer],
    recipe: Recipe,
    name: str = "unipic_distill",
    parts_from: Path | None = None,
    kinds: Collection[str] = ("merged", "folder"),
) -> None:
    """Write the adapter NAME.safetensors and, as `kinds` names them, NAME_merged.safetensors and the folder NAME/.

    base: any checkpoint that `merge` reads. parts_from: pipeline folder of NAME/'s other parts (default: base). layers:
    bare module name -> LoRA, DoRA, LoKr or LoHa, on any device. recipe: of the LoRA; merged models have it merged
    over the base's. Earlier exports are replaced, each when its successor is complete. Raises CheckpointError (full
    disk, or a source would be replaced) and LoRAError (layers that do not fit `base`).
    """
    sources = [base, parts_from or base]
    lora, merged, model = _targets(folder, sources, f"{name}.safetensors", f"{name}_merged.safetensors", name)
    save_adapter(lora, layers, recipe=recipe)
    for target in [path for kind, path in (("merged", merged), ("folder", model)) if kind in kinds]:
        merge(base, target, [(lora, 1.0)], dtype=STORAGE_DTYPE, overwrite=True, parts_from=parts_from)


def export_network(
    folder: Path,
    base: Path,
    network_state: Mapping[str, Tensor],
    config: MMDiTConfig,
    recipe: Recipe,
    name: str = "unipic_distill",
    parts_from: Path | None = None,
    kinds: Collection[str] = ("merged", "folder"),
) -> None:
    """Write a fully trained network as NAME.safetensors ("merged") and as the folder NAME/.

    base: starting checkpoint, over whose recipe `recipe` is merged. parts_from: pipeline folder of NAME/'s other parts
    (default: base). network_state: bare parameter name -> tensor, on any device. Raises CheckpointError for a state
    that does not fit `config`, for a full disk, and if a source would be replaced.
    """
    report = check_keys(expected_shapes(config), {key: tuple(value.shape) for key, value in network_state.items()})
    if not report.fits:
        raise CheckpointError(f"the trained weights do not fit their config ({report})")
    single, model = _targets(folder, [base, parts_from or base], f"{name}.safetensors", name)
    stream = WeightStream(config, source_recipe(base).merge(recipe), partial(_state_tensors, network_state))
    if "merged" in kinds:
        write_file(single, stream, STORAGE_DTYPE)
    if "folder" in kinds:
        write_folder(model, stream, STORAGE_DTYPE, parts_from or base)


def export_bytes(kind: str, config: MMDiTConfig, parts_from: Path) -> int:
    """Size on disk of a merged file or a folder; 0 for a LoRA, which is small."""
    if kind == "lora":
        return 0
    network = STORAGE_DTYPES[STORAGE_DTYPE].itemsize * sum(prod(shape) for shape in expected_shapes(config).values())
    if kind == "merged":
        return network
    return network + sum(
        path.stat().st_size for path in files_to_copy(parts_from, (MODEL_INDEX,), OTHER_PARTS).values()
    )


def _targets(folder: Path, sources: Sequence[Path], *names: str) -> list[Path]:
    """Create the folder and return the paths to write. Raises CheckpointError if one would replace a source."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot create the folder {folder}: {error.strerror or error}") from error
    targets = [folder / name for name in names]
    for target in targets:
        protect_sources(target, sources)
    return targets


def _state_tensors(state: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters on the CPU."""
    return ((name, state[name].detach().cpu()) for name in names)
