"""LoRAs baked into a checkpoint, with a few tensors in memory: to one safetensors file or a diffusers folder."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, LoRAError
from ..replacing import replacing, require_new, write_errors, write_json
from .convert import (
    DTYPES,
    Network,
    checked_form,
    encoded,
    form_cautions,
    keep_sources,
    source_recipe,
    stored,
    write_file,
)
from .files import FP8, PathLike, Weights
from .lora import FittedLoRA, LoRA, MergeReport, apply_to_weights, read_lora
from .model_files import files_to_copy, foreign_file, write_manifest
from .recipe import FILE_NAME, TRANSFORMER_FOLDERS, Recipe
from .transformer import PARTS, expected_shapes, open_transformer, stored_dtype
from .write import Described, Progress, file_size, write_tensors

STEM = "diffusion_pytorch_model"
MODEL_INDEX = "model_index.json"

SHARD_BYTES = 10_000_000_000
"""Largest file of a diffusers folder that has more than one tensor; diffusers' own limit."""

OTHER_PARTS = tuple(folder for folders in PARTS.values() for folder in folders if folder not in TRANSFORMER_FOLDERS)
"""Folders of a pipeline that a merge copies."""

Fitted = Sequence[tuple[FittedLoRA, float]]


def merge(
    src: PathLike,
    dst: PathLike,
    loras: Sequence[tuple[PathLike, float]],
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    parts_from: PathLike | None = None,
    progress: Progress | None = None,
) -> tuple[MergeReport, ...]:
    """Write the transformer at `src` with LoRAs, each (path, strength), added to its weights. Returns a report of each.

    dst: a name that ends in .safetensors becomes one file, as `convert` writes it; any other a diffusers folder, with
    the text encoder and the other parts copied from the pipeline folder `parts_from`, or `src` if it is one. The recipe
    is the source's with the LoRAs' over it. Sums are taken in float32 and rounded once. Warns where the result's
    attention form is not full.

    dtype: one of DTYPES, None = the source's own; a folder holds no fp8. overwrite: replace what is at `dst`. progress:
    called with (bytes written, bytes in all). Raises CheckpointError and LoRAError; on any failure, Ctrl-C included,
    nothing half-written is left and an older `dst` stays.
    """
    src, dst = Path(src), Path(dst)
    single = _checked_target(dst, dtype, overwrite)
    adapters = [(read_lora(path, mapped=True), checked_strength(strength)) for path, strength in loras]
    if not adapters:
        raise LoRAError("nothing to merge: name at least one LoRA")
    opened = open_transformer(src)
    weights, config = opened.weights, opened.config
    parts = src if parts_from is None else Path(parts_from)
    keep_sources(dst, [src, parts, *weights.files, *(Path(path) for path, _ in loras)])
    fitted = [(lora.fit(weights.shapes()), strength) for lora, strength in adapters]
    dtype = dtype or form_of(weights, single)
    recipe = merged_recipe(source_recipe(src), adapters, {"source": src.absolute().name, "dtype": dtype})
    network = Network(config.with_form(recipe.causal_form), recipe, partial(_with_loras, weights, fitted))
    if single:
        write_file(dst, network, dtype, progress)
    else:
        write_folder(dst, network, dtype, parts, progress)
    names = [lora.name for lora, _ in adapters]
    reports = tuple(fit.report for fit, _ in fitted)
    for caution in (*key_cautions(names, reports), *form_cautions(dst, network.config)):
        warnings.warn(caution, stacklevel=2)
    return reports


def key_cautions(names: Sequence[str], reports: Sequence[MergeReport]) -> Iterator[str]:
    """What to say of LoRAs, by their names, that hold keys which belong to nothing."""
    for name, report in zip(names, reports, strict=True):
        if strange := report.unmatched:
            yield f"{name}: {len(strange)} keys not known here ({', '.join(strange[:3])})"


def checked_strength(strength: Any) -> float:
    """A strength that changes something, or LoRAError."""
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool) and math.isfinite(strength)
    if not number or not strength:
        raise LoRAError(f"the strength of a LoRA to merge should be a number other than 0, got {strength!r}")
    return float(strength)


def form_of(weights: Weights, single: bool = True) -> str:
    """The form that weights are stored in, as DTYPES names it; bf16 in place of fp8 unless it is for one file."""
    if single and any(weights.dtype(name) in FP8 for name in weights):
        return "fp8_scaled"
    return "fp32" if stored_dtype(weights) is torch.float32 else "bf16"


def merged_recipe(base: Recipe, adapters: Sequence[tuple[LoRA, float]], how: dict[str, Any]) -> Recipe:
    """The base's recipe with those of the LoRAs over it; `made` says which, how strong, and of earlier merges."""
    recipe = base
    for lora, _ in adapters:
        recipe = recipe.merge(lora.recipe)
    how = {**how, "loras": [{"name": lora.name, "strength": strength} for lora, strength in adapters]}
    if earlier := recipe.made.get("merge"):
        how["after"] = earlier
    return replace(recipe, made={**recipe.made, "merge": how})


def write_folder(
    dst: Path, network: Network, dtype: str, parts_from: Path | None = None, progress: Progress | None = None
) -> None:
    """Write a diffusers folder: transformer/, recipe.json, and the other parts of the pipeline folder `parts_from`.

    An older folder at `dst` is replaced at the end, where every file in it was written by an earlier call. Raises
    CheckpointError, for fp8 too, which diffusers does not read, for a link in `parts_from` that leads out of it, and
    where `dst` holds any file that was not written here or was changed since; nothing half-written is left.
    """
    _checked_folder_form(dtype)
    if dst.is_dir() and (foreign := foreign_file(dst)):
        raise CheckpointError(
            f"{dst} holds {foreign}, which merge did not write, so the folder is not overwritten; choose another name"
        )
    described = {name: (DTYPES[dtype], shape) for name, shape in expected_shapes(network.config).items()}
    shards = plan_shards(described, SHARD_BYTES)
    copies = files_to_copy(parts_from, (MODEL_INDEX,), OTHER_PARTS) if parts_from is not None else {}
    size = sum(file_size(shard, network.metadata) for shard in shards.values())
    size += sum(source.stat().st_size for source in copies.values())
    with write_errors(dst, size), replacing(dst, size, folder=True) as partial:
        (partial / "transformer").mkdir()
        done = 0
        for name, shard in shards.items():
            file = partial / "transformer" / name
            advance = None if progress is None else _shifted(progress, done, size)
            write_tensors(file, shard, encoded(network.stream(shard), shard), network.metadata, advance)
            done += file.stat().st_size
        for name, source in copies.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / name)
            done += source.stat().st_size
            if progress:
                progress(done, size)
        write_json(partial / "transformer" / "config.json", network.config.to_dict())
        if len(shards) > 1:
            write_json(partial / "transformer" / f"{STEM}.safetensors.index.json", _index(shards))
        (partial / FILE_NAME).write_text(network.recipe.to_json() + "\n", encoding="utf-8")
        write_manifest(partial)


def plan_shards(described: Described, limit: int) -> dict[str, Described]:
    """File name -> its tensors, in order, each file at most `limit` bytes unless one tensor is larger."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for name, (dtype, shape) in described.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += nbytes
    if len(shards) == 1:
        return {f"{STEM}.safetensors": shards[0]}
    return {f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _index(shards: dict[str, Described]) -> dict[str, Any]:
    total = sum(math.prod(shape) * dtype.itemsize for shard in shards.values() for dtype, shape in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _with_loras(weights: Weights, fitted: Fitted, names: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
    """The `stream` of a checkpoint with LoRAs, in float32, so that the sum is rounded once, to the file's type."""
    tensors: Iterable[tuple[str, Tensor]] = ((name, tensor.float()) for name, tensor in stored(weights, names))
    for lora, strength in fitted:
        tensors = apply_to_weights(lora, tensors, strength)
    return tensors


def _checked_target(dst: Path, dtype: str | None, overwrite: bool) -> bool:
    """Whether `dst` is to be one file. CheckpointError for a name, a form or a place that cannot be."""
    single = dst.suffix == ".safetensors"
    if dst.suffix in (".sft", ".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(f"the destination should end in .safetensors or be a folder's name, got {dst.name}")
    if dtype is not None:
        checked_form(dtype)
        if not single:
            _checked_folder_form(dtype)
    require_new(dst, overwrite)
    return single


def _checked_folder_form(dtype: str) -> None:
    if dtype == "fp8_scaled":
        raise CheckpointError(
            "diffusers does not read fp8_scaled; choose bf16 or fp32, or name a destination that ends in .safetensors"
        )


def _shifted(progress: Progress, done: int, size: int) -> Progress:
    return lambda written, _: progress(done + written, size)
