"""Any form of a UniPic transformer to one safetensors file, with about one tensor in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints import CONFIG_KEY, ZERO_COND_MARKER, expected_shapes, open_transformer
from .errors import CheckpointError
from .lora import FittedLoRA, LoRA, read_lora
from .mmdit import MMDiTConfig
from .recipe import METADATA_KEY, RECIPE_FROM, Recipe, released_recipe
from .saving import Progress, write_safetensors
from .weights import PathLike, Weights

DTYPES = {"bf16": torch.bfloat16, "fp8_scaled": torch.bfloat16, "fp32": torch.float32}
"""Choices of `convert`, and the type of the tensors that are not quantised."""

FP8_MAX = 448.0
"""Largest number of float8_e4m3fn."""

FP8_LAYER = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
"""What `X.comfy_quant` says. Without the second entry ComfyUI rounds activations to fp8 too, with scale 1;
those of this architecture exceed fp8's range, so products stay in bf16."""

Described = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def convert(
    src: PathLike,
    dst: PathLike,
    *,
    dtype: str = "bf16",
    lora: PathLike | LoRA | None = None,
    strength: float = 1.0,
    progress: Progress | None = None,
) -> Path:
    """Write the transformer at `src` (any form that `load_transformer` takes) as one safetensors file.

    Keys are the network's own, which ComfyUI recognises; metadata holds the config, the recipe and how the file
    was made. Returns the path written.

    dtype: "bf16", "fp32", or "fp8_scaled": the blocks' matrices in float8_e4m3fn with one scale each, as ComfyUI 0.33
    reads them, all else in bf16. lora: added at `strength` on the way, its recipe over the base's. progress: called
    with (bytes written, bytes in all). Raises CheckpointError and LoRAError; on any failure, Ctrl-C included, nothing
    is left behind and an older `dst` stays.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype should be one of {', '.join(DTYPES)}, got {dtype!r}")
    target = _target(Path(src), Path(dst))
    weights, config = open_transformer(src)
    adapter = lora if isinstance(lora, LoRA) or lora is None else read_lora(lora)
    _keep_sources(target, [*weights.files, *([] if isinstance(lora, LoRA) or lora is None else [Path(lora)])])
    fitted = adapter.fit(weights.shapes()) if adapter else None
    described = describe_output(expected_shapes(config), config, dtype)
    metadata = _metadata(Path(src), config, dtype, adapter, strength)
    write_safetensors(target, described, _stream(weights, config, described, fitted, strength), metadata, progress)
    return target


def describe_output(shapes: Mapping[str, tuple[int, ...]], config: MMDiTConfig, dtype: str) -> Described:
    """Names, types and shapes of everything the file will hold."""
    plain = DTYPES[dtype]
    out: Described = {}
    for name, shape in shapes.items():
        if dtype == "fp8_scaled" and _is_block_matrix(name, shape):
            layer = name.removesuffix(".weight")
            out[name] = (torch.float8_e4m3fn, shape)
            out[layer + ".weight_scale"] = (torch.float32, ())
            out[layer + ".comfy_quant"] = (torch.uint8, tuple(_note().shape))
        else:
            out[name] = (plain, shape)
    if config.zero_cond_t:
        out[ZERO_COND_MARKER] = (plain, (1,))
    return out


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight -> (values of its shape in float8_e4m3fn, scale [] in float32), with weight ~ values * scale.

    The largest value comes near 448. The scale is a number that bf16 holds exactly, rounded up, because ComfyUI
    multiplies by it in bf16.
    """
    largest = weight.abs().amax().float() if weight.numel() else torch.zeros(())
    if not torch.isfinite(largest):
        raise CheckpointError("the weights hold NaN or infinity and cannot be quantised; fetch them again")
    scale = _bf16_above(largest / FP8_MAX) if largest > 0 else torch.ones(())
    values = weight.to(torch.float32, copy=True).div_(scale).clamp_(-FP8_MAX, FP8_MAX)
    return values.to(torch.float8_e4m3fn), scale


def _bf16_above(value: Tensor) -> Tensor:
    """The smallest bf16 number not below a positive float32, as float32."""
    below = value.bfloat16()
    return below.float() if below >= value else (below.view(torch.int16) + 1).view(torch.bfloat16).float()


def _stream(
    weights: Weights, config: MMDiTConfig, described: Described, fitted: FittedLoRA | None, strength: float
) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors, one at a time, each source tensor read once."""
    for name in weights:
        if name == ZERO_COND_MARKER:
            continue
        tensor = weights.get(name)
        if fitted is not None and name in fitted.table:
            tensor = fitted.apply(name, tensor.float(), strength)  # rounded once, to the file's type
        dtype = described[name][0]
        if dtype is torch.float8_e4m3fn:
            layer = name.removesuffix(".weight")
            values, scale = quantise_fp8(tensor)
            del tensor
            yield name, values
            yield layer + ".weight_scale", scale
            yield layer + ".comfy_quant", _note()
        else:
            yield name, tensor.to(dtype)
    if config.zero_cond_t:
        yield ZERO_COND_MARKER, torch.ones(1, dtype=described[ZERO_COND_MARKER][0])


def _is_block_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("transformer_blocks.") and name.endswith(".weight") and len(shape) == 2


def _note() -> Tensor:
    return torch.tensor(list(json.dumps(FP8_LAYER).encode()), dtype=torch.uint8)


def _target(src: Path, dst: Path) -> Path:
    if dst.is_dir():
        raise CheckpointError(f"{dst} is a folder; name the file to write, such as {dst / 'unipic.safetensors'}")
    if dst.suffix != ".safetensors":
        raise CheckpointError(f"the destination should end in .safetensors, got {dst.name}")
    _keep_sources(dst, [src])
    return dst


def _keep_sources(dst: Path, sources: Iterable[Path]) -> None:
    """CheckpointError if writing `dst` would replace one of these files, or any file in one of these folders."""
    if not dst.exists():
        return
    for source in sources:
        if source.is_dir() and dst.resolve().is_relative_to(source.resolve()):
            raise CheckpointError(f"{dst} is there already, as a part of the source; choose another name")
        if source.exists() and dst.samefile(source):
            raise CheckpointError(f"source and destination are the same file {dst}; choose another name")


def _metadata(src: Path, config: MMDiTConfig, dtype: str, lora: LoRA | None, strength: float) -> dict[str, str]:
    """Metadata of the new file; names only, no paths of this machine."""
    how: dict[str, Any] = {"source": src.absolute().name, "dtype": dtype}
    if lora is not None:
        how |= {"lora": lora.name, "strength": strength}
    recipe = Recipe.read(src)
    if recipe is None and (guess := released_recipe(src)):
        recipe = replace(guess, made={RECIPE_FROM: "name"})
    if lora is not None and lora.recipe is not None:
        recipe = (recipe or Recipe()).merge(lora.recipe)
    recipe = recipe or Recipe()
    recipe = replace(recipe, made={**recipe.made, "convert": how})
    return {"format": "pt", CONFIG_KEY: json.dumps(config.to_dict()), METADATA_KEY: recipe.to_json()}
