"""Merge LoRAs into a checkpoint with a few tensors in memory, to one safetensors file or a diffusers folder."""

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

from ..checks import finite
from ..errors import CheckpointError, LoRAError
from ..replacing import replacing, require_new, write_errors, write_json
from .convert import (
    STORAGE_DTYPES,
    WeightStream,
    attention_form_warnings,
    check_storage_dtype,
    encode_tensors,
    protect_sources,
    source_recipe,
    stored_tensors,
    write_file,
)
from .files import PathLike, Weights
from .formats.quantised import FP8
from .hub_cache import model_folder
from .lora import FittedLoRA, LoRA, MergeReport, apply_to_weights, read_lora
from .model_files import files_to_copy, foreign_file, write_manifest
from .recipe import FILE_NAME, TRANSFORMER_FOLDERS, Recipe
from .transformer import PARTS, compute_dtype_of, expected_shapes, open_transformer
from .write import Progress, TensorLayout, file_size, write_tensors

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
    """Add LoRAs, each (path, strength), to the transformer at `src` and write the result. Returns one report per LoRA.

    dst: a name that ends in .safetensors gives one file, as `convert` writes it; any other a diffusers folder, with
    the text encoder and the other parts copied from the pipeline folder `parts_from`, or from `src` if it is one. The
    LoRAs' recipes override the source's. Sums are computed in float32 and rounded once. Warns if the result's attention
    form is not full.

    dtype: one of STORAGE_DTYPES, None = as the source is stored; folders cannot be fp8. overwrite: replace an existing
    `dst`. progress: called with (bytes written, bytes in all). Raises CheckpointError and LoRAError; on any failure,
    Ctrl-C included, no partial file remains and an older `dst` stays.
    """
    src, dst = model_folder(src), Path(dst)
    single = _is_single_file(dst, dtype, overwrite)
    adapters = [(read_lora(path, mapped=True), checked_strength(strength)) for path, strength in loras]
    if not adapters:
        raise LoRAError("nothing to merge: name at least one LoRA")
    opened = open_transformer(src)
    weights, config = opened.weights, opened.config
    parts = src if parts_from is None else model_folder(parts_from)
    protect_sources(dst, [src, parts, *weights.files, *(Path(path) for path, _ in loras)])
    fitted = [(lora.fit(weights.shapes()), strength) for lora, strength in adapters]
    for fit, strength in fitted:
        fit.check(strength)
    dtype = dtype or storage_dtype_of(weights, single)
    recipe = merged_recipe(source_recipe(src), adapters, src.absolute().name, dtype)
    output = WeightStream(
        config.with_attention_form(recipe.causal_attention_form), recipe, partial(_tensors_with_loras, weights, fitted)
    )
    if single:
        write_file(dst, output, dtype, progress, overwrite=overwrite)
    else:
        write_folder(dst, output, dtype, parts, progress, overwrite=overwrite)
    names = [lora.name for lora, _ in adapters]
    reports = tuple(fit.report for fit, _ in fitted)
    for message in (*unknown_key_warnings(names, reports), *attention_form_warnings(dst, output.config)):
        warnings.warn(message, stacklevel=2)
    return reports


def unknown_key_warnings(names: Sequence[str], reports: Sequence[MergeReport]) -> Iterator[str]:
    """Warn of LoRAs with keys that match no layer of the network."""
    for name, report in zip(names, reports, strict=True):
        if unknown := report.unmatched:
            yield f"{name}: {len(unknown)} keys match no layer of the network ({', '.join(unknown[:3])})"


def checked_strength(strength: object) -> float:
    """Return the strength as a float; raise LoRAError unless it is a finite number other than 0."""
    number = finite(strength)
    if not number:
        raise LoRAError(f"the strength of a LoRA to merge should be a number other than 0, got {strength!r}")
    return float(number)


def storage_dtype_of(weights: Weights, single: bool = True) -> str:
    """Storage dtype of the weights, one of STORAGE_DTYPES; bf16 in place of fp8 unless written to a single file."""
    if single and any(weights.dtype(name) in FP8 for name in weights):
        return "fp8_scaled"
    return "fp32" if compute_dtype_of(weights) is torch.float32 else "bf16"


def merged_recipe(base: Recipe, adapters: Sequence[tuple[LoRA, float]], source: str, dtype: str) -> Recipe:
    """Recipe of the base with those of the LoRAs over it; `made` lists the LoRAs, their strengths and earlier merges.

    source: name of the base's file or folder. dtype: storage dtype of the merged weights.
    """
    recipe = base
    for lora, _ in adapters:
        recipe = recipe.merge(lora.recipe)
    names = [{"name": lora.name, "strength": strength} for lora, strength in adapters]
    record: dict[str, object] = {"source": source, "dtype": dtype, "loras": names}
    if earlier := recipe.made.get("merge"):
        record["after"] = earlier
    return replace(recipe, made={**recipe.made, "merge": record})


def write_folder(
    dst: Path,
    output: WeightStream,
    dtype: str,
    parts_from: Path | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = True,
) -> None:
    """Write a diffusers folder: transformer/, recipe.json, and the other parts of the pipeline folder `parts_from`.

    An older folder at `dst` is replaced at the end if `overwrite` and if every file in it was then written by an
    earlier call. Raises CheckpointError for fp8, which diffusers does not read, for a link in `parts_from` that leads
    out of it, and for a `dst` with a file that no merge wrote or that has changed; on failure no partial folder
    remains.
    """
    _check_folder_dtype(dtype)
    _refuse_foreign(dst)
    layout = {name: (STORAGE_DTYPES[dtype], shape) for name, shape in expected_shapes(output.config).items()}
    shards = plan_shards(layout, SHARD_BYTES)
    copies = files_to_copy(parts_from, (MODEL_INDEX,), OTHER_PARTS) if parts_from is not None else {}
    size = sum(file_size(shard, output.metadata) for shard in shards.values())
    size += sum(source.stat().st_size for source in copies.values())
    placed = replacing(dst, size, folder=True, overwrite=overwrite, check=lambda: _refuse_foreign(dst))
    with write_errors(dst, size), placed as partial:
        (partial / "transformer").mkdir()
        done = 0
        for name, shard in shards.items():
            file = partial / "transformer" / name
            advance = None if progress is None else _shifted(progress, done, size)
            write_tensors(file, shard, encode_tensors(output.read(shard), shard), output.metadata, advance)
            done += file.stat().st_size
        for name, source in copies.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / name)
            done += source.stat().st_size
            if progress:
                progress(done, size)
        write_json(partial / "transformer" / "config.json", output.config.to_dict())
        if len(shards) > 1:
            write_json(partial / "transformer" / f"{STEM}.safetensors.index.json", _index(shards))
        (partial / FILE_NAME).write_text(output.recipe.to_json() + "\n", encoding="utf-8")
        write_manifest(partial)


def _refuse_foreign(dst: Path) -> None:
    """Raise CheckpointError for a folder with a file that no merge wrote or that has changed since."""
    if dst.is_dir() and (foreign := foreign_file(dst)):
        raise CheckpointError(
            f"{dst} holds {foreign}, which merge did not write, so the folder is not overwritten; choose another name"
        )


def plan_shards(layout: TensorLayout, limit: int) -> dict[str, TensorLayout]:
    """Split a layout, in order, into files of at most `limit` bytes, or of one larger tensor: file name -> layout."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for name, (dtype, shape) in layout.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += nbytes
    if len(shards) == 1:
        return {f"{STEM}.safetensors": shards[0]}
    return {f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _index(shards: dict[str, TensorLayout]) -> dict[str, Any]:
    total = sum(math.prod(shape) * dtype.itemsize for shard in shards.values() for dtype, shape in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _tensors_with_loras(weights: Weights, fitted: Fitted, names: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
    """Read tensors and add the LoRAs, in float32, so that the sum is rounded once, to the file's dtype."""
    tensors: Iterable[tuple[str, Tensor]] = ((name, tensor.float()) for name, tensor in stored_tensors(weights, names))
    for lora, strength in fitted:
        tensors = apply_to_weights(lora, tensors, strength)
    return tensors


def _is_single_file(dst: Path, dtype: str | None, overwrite: bool) -> bool:
    """Return True if `dst` names one file, False for a folder. Raises CheckpointError for a wrong ending, dtype or an
    existing `dst` without `overwrite`."""
    single = dst.suffix == ".safetensors"
    if dst.suffix in (".sft", ".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(f"the destination should end in .safetensors or be a folder's name, got {dst.name}")
    if dtype is not None:
        check_storage_dtype(dtype)
        if not single:
            _check_folder_dtype(dtype)
    require_new(dst, overwrite)
    return single


def _check_folder_dtype(dtype: str) -> None:
    if dtype == "fp8_scaled":
        raise CheckpointError(
            "a diffusers folder should be bf16 or fp32, got fp8_scaled, which diffusers does not read; choose another "
            "dtype, or name a destination that ends in .safetensors"
        )


def _shifted(progress: Progress, done: int, size: int) -> Progress:
    return lambda written, _: progress(done + written, size)
