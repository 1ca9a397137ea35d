"""Convert a UniPic transformer of any layout to one safetensors file, with about one tensor in memory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..model.config import FULL, MMDiTConfig
from ..replacing import require_new
from .files import PathLike, Weights
from .hub_cache import model_folder
from .recipe import METADATA_KEY, RECIPE_FROM, Recipe, released_recipe
from .transformer import CONFIG_KEY, ZERO_COND_MARKER, expected_shapes, is_block_matrix, open_transformer
from .write import Progress, TensorLayout, write_safetensors

STORAGE_DTYPES = {"bf16": torch.bfloat16, "fp8_scaled": torch.bfloat16, "fp32": torch.float32}
"""Storage dtype of a file -> torch dtype of its tensors that are not quantised."""

FP8_MAX = 448.0
"""Largest value of float8_e4m3fn."""

FP8_LAYER = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
"""Content of `X.comfy_quant`. Without the second entry ComfyUI also rounds activations to fp8, with scale 1; those of
this architecture exceed fp8's range, so matrix products stay in bf16."""


@dataclass(frozen=True)
class WeightStream:
    """Weights to be written, one tensor at a time.

    read: parameter names -> (name, tensor) pairs; each tensor is computed when the iteration reaches it.
    """

    config: MMDiTConfig
    recipe: Recipe
    read: Callable[[Iterable[str]], Iterable[tuple[str, Tensor]]]

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the safetensors files to write: config and recipe."""
        config = json.dumps(self.config.to_dict())
        return {"format": "pt", CONFIG_KEY: config, METADATA_KEY: self.recipe.to_json()}


def convert(
    src: PathLike, dst: PathLike, *, dtype: str = "bf16", overwrite: bool = False, progress: Progress | None = None
) -> Path:
    """Write the transformer at `src`, in any layout that `load_transformer` reads, as one safetensors file.

    Keys are the parameter names, which ComfyUI recognises; the metadata holds the config and the recipe, which records
    this conversion. Returns the path of the new file.

    dtype: "bf16", "fp32", or "fp8_scaled": the blocks' matrices in float8_e4m3fn with one scale each, as ComfyUI 0.33
    reads them, all else in bf16. overwrite: replace an existing `dst`. progress: called with (bytes written, bytes in
    all). Raises CheckpointError; on any failure, Ctrl-C included, no partial file remains and an older `dst` stays.
    Warns if the attention form is not full.
    """
    src, dst = model_folder(src), Path(dst)
    check_storage_dtype(dtype)
    if dst.is_dir():
        raise CheckpointError(f"{dst} is a folder; name the file to write, such as {dst / 'unipic.safetensors'}")
    if dst.suffix != ".safetensors":
        raise CheckpointError(f"the destination should end in .safetensors, got {dst.name}; rename it")
    protect_sources(dst, [src])
    opened = open_transformer(src)
    weights, config = opened.weights, opened.config
    protect_sources(dst, weights.files)
    require_new(dst, overwrite)
    recipe = source_recipe(src)
    conversion = {"source": src.absolute().name, "dtype": dtype}
    recipe = replace(recipe, made={**recipe.made, "convert": conversion})
    output = WeightStream(
        config.with_attention_form(recipe.causal_attention_form), recipe, partial(stored_tensors, weights)
    )
    write_file(dst, output, dtype, progress, overwrite=overwrite)
    for message in attention_form_warnings(dst, output.config):
        warnings.warn(message, stacklevel=2)
    return dst


def attention_form_warnings(dst: Path, config: MMDiTConfig) -> Iterator[str]:
    """Warn of an attention form that other programs do not know: they compute full attention without an error."""
    if config.attention_form != FULL:
        yield (
            f"{dst.name}: its attention form is {config.attention_form}, which only unipic and the node Load UniPic "
            "compute; other programs compute full attention and give wrong pictures without an error"
        )


def stored_tensors(weights: Weights, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Read the named tensors of a checkpoint one at a time: the `read` function of a WeightStream."""
    return ((name, weights.get(name)) for name in names)


def write_file(
    dst: Path, output: WeightStream, dtype: str, progress: Progress | None = None, *, overwrite: bool = True
) -> None:
    """Write one safetensors file as `convert` does. dtype: one of STORAGE_DTYPES."""
    shapes = expected_shapes(output.config)
    layout = output_layout(shapes, output.config, dtype)
    data = encode_tensors(output.read(shapes), layout)
    write_safetensors(dst, layout, data, output.metadata, progress, overwrite=overwrite)


def check_storage_dtype(dtype: str) -> None:
    """Raise CheckpointError for a storage dtype that is none of STORAGE_DTYPES."""
    if dtype not in STORAGE_DTYPES:
        raise CheckpointError(f"dtype should be one of {', '.join(STORAGE_DTYPES)}, got {dtype!r}")


def output_layout(shapes: Mapping[str, tuple[int, ...]], config: MMDiTConfig, dtype: str) -> TensorLayout:
    """Names, dtypes and shapes of all tensors of the file, those of its quantisation included."""
    plain = STORAGE_DTYPES[dtype]
    out: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if dtype == "fp8_scaled" and is_block_matrix(name, shape):
            layer = name.removesuffix(".weight")
            out[name] = (torch.float8_e4m3fn, shape)
            out[layer + ".weight_scale"] = (torch.float32, ())
            out[layer + ".comfy_quant"] = (torch.uint8, tuple(_comfy_quant().shape))
        else:
            out[name] = (plain, shape)
    if config.zero_cond_t:
        out[ZERO_COND_MARKER] = (plain, (0,))  # the shape that ComfyUI has
    return out


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight to (values of its shape in float8_e4m3fn, scale [] in float32): weight ~ values * scale.

    The largest absolute value is at or just below 448: the scale is rounded up to a number that bf16 represents
    exactly, because ComfyUI multiplies by it in bf16. Raises CheckpointError for NaN and infinity.
    """
    if weight.dtype.itemsize == 1:  # unscaled fp8, which has no arithmetic
        weight = weight.float()
    largest = weight.abs().amax().float() if weight.numel() else torch.zeros(())
    if not torch.isfinite(largest):
        raise CheckpointError("the weights hold NaN or infinity and cannot be quantised; fetch them again")
    scale = _bf16_above(largest / FP8_MAX) if largest > 0 else torch.ones(())
    values = weight.to(torch.float32, copy=True).div_(scale).clamp_(-FP8_MAX, FP8_MAX)
    return values.to(torch.float8_e4m3fn), scale


def _bf16_above(value: Tensor) -> Tensor:
    """Round a positive float32 up to the next bf16 number; returned as float32."""
    below = value.bfloat16()
    return below.float() if below >= value else (below.view(torch.int16) + 1).view(torch.bfloat16).float()


def encode_tensors(tensors: Iterable[tuple[str, Tensor]], layout: TensorLayout) -> Iterator[tuple[str, Tensor]]:
    """Cast or quantise the network's tensors to those of the file's layout, one at a time."""
    for name, tensor in tensors:
        dtype = layout[name][0]
        if dtype is torch.float8_e4m3fn:
            layer = name.removesuffix(".weight")
            values, scale = quantise_fp8(tensor)
            del tensor
            yield name, values
            yield layer + ".weight_scale", scale
            yield layer + ".comfy_quant", _comfy_quant()
        else:
            yield name, tensor.to(dtype)
    if ZERO_COND_MARKER in layout:
        yield ZERO_COND_MARKER, torch.zeros(0, dtype=layout[ZERO_COND_MARKER][0])


def _comfy_quant() -> Tensor:
    return torch.tensor(list(json.dumps(FP8_LAYER).encode()), dtype=torch.uint8)


def protect_sources(dst: Path, sources: Iterable[Path]) -> None:
    """Raise CheckpointError if writing `dst` would replace a source, or any file in a source folder."""
    if not dst.exists():
        return
    for source in sources:
        if source.is_dir() and dst.resolve().is_relative_to(source.resolve()):
            raise CheckpointError(f"{dst} already exists and is a part of the source; choose another name")
        if source.exists() and dst.samefile(source):
            raise CheckpointError(f"source and destination are the same file {dst}; choose another name")
        if dst.is_dir() and source.resolve().is_relative_to(dst.resolve()):
            raise CheckpointError(f"{dst} holds the source {source.name}; choose another name")


def source_recipe(src: Path) -> Recipe:
    """Read the recipe stored with a checkpoint; without one, guess it by the name and mark it as a guess."""
    recipe = Recipe.read(src)
    if recipe is None and (guess := released_recipe(src)):
        recipe = replace(guess, made={RECIPE_FROM: "name"})
    return recipe or Recipe()
