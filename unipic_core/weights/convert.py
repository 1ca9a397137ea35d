"""Any form of a UniPic transformer to one safetensors file, with about one tensor in memory."""

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
from .files import PathLike, Weights
from .recipe import METADATA_KEY, RECIPE_FROM, Recipe, released_recipe
from .transformer import CONFIG_KEY, ZERO_COND_MARKER, expected_shapes, open_transformer
from .write import Described, Progress, write_safetensors

DTYPES = {"bf16": torch.bfloat16, "fp8_scaled": torch.bfloat16, "fp32": torch.float32}
"""Forms that weights are written in, and the type of the tensors that are not quantised."""

FP8_MAX = 448.0
"""Largest number of float8_e4m3fn."""

FP8_LAYER = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
"""What `X.comfy_quant` says. Without the second entry ComfyUI rounds activations to fp8 too, with scale 1;
those of this architecture exceed fp8's range, so products stay in bf16."""


@dataclass(frozen=True)
class Network:
    """A network on its way to a file. stream: names of its parameters -> those with their tensors, one at a time."""

    config: MMDiTConfig
    recipe: Recipe
    stream: Callable[[Iterable[str]], Iterable[tuple[str, Tensor]]]

    @property
    def metadata(self) -> dict[str, str]:
        """What its files say about it."""
        config = json.dumps(self.config.to_dict())
        return {"format": "pt", CONFIG_KEY: config, METADATA_KEY: self.recipe.to_json()}


def convert(src: PathLike, dst: PathLike, *, dtype: str = "bf16", progress: Progress | None = None) -> Path:
    """Write the transformer at `src` (any form that `load_transformer` takes) as one safetensors file.

    Keys are the network's own, which ComfyUI recognises; metadata holds the config, the recipe and how the file
    was made. Returns the path written.

    dtype: "bf16", "fp32", or "fp8_scaled": the blocks' matrices in float8_e4m3fn with one scale each, as ComfyUI 0.33
    reads them, all else in bf16. progress: called with (bytes written, bytes in all). Raises CheckpointError; on any
    failure, Ctrl-C included, nothing is left behind and an older `dst` stays. Warns of a form that is not full.
    """
    src, dst = Path(src), Path(dst)
    checked_form(dtype)
    if dst.is_dir():
        raise CheckpointError(f"{dst} is a folder; name the file to write, such as {dst / 'unipic.safetensors'}")
    if dst.suffix != ".safetensors":
        raise CheckpointError(f"the destination should end in .safetensors, got {dst.name}")
    keep_sources(dst, [src])
    opened = open_transformer(src)
    weights, config = opened.weights, opened.config
    keep_sources(dst, weights.files)
    recipe = source_recipe(src)
    how = {"source": src.absolute().name, "dtype": dtype}
    recipe = replace(recipe, made={**recipe.made, "convert": how})
    network = Network(config.with_form(recipe.causal_form), recipe, partial(stored, weights))
    write_file(dst, network, dtype, progress)
    for caution in form_cautions(dst, network.config):
        warnings.warn(caution, stacklevel=2)
    return dst


def form_cautions(dst: Path, config: MMDiTConfig) -> Iterator[str]:
    """What to say of a checkpoint written at `dst` in an attention form that other programs do not know: they report
    no error."""
    if config.attention_form != FULL:
        yield (
            f"{dst.name}: its attention is {config.attention_form}, which only unipic and the node Load UniPic "
            "compute; other programs read it as full and make wrong pictures without an error"
        )


def stored(weights: Weights, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The `stream` of a checkpoint."""
    return ((name, weights.get(name)) for name in names)


def write_file(dst: Path, network: Network, dtype: str, progress: Progress | None = None) -> None:
    """Write one safetensors file, as `convert` describes it."""
    shapes = expected_shapes(network.config)
    described = describe_output(shapes, network.config, dtype)
    data = encoded(network.stream(shapes), described)
    write_safetensors(dst, described, data, network.metadata, progress)


def checked_form(dtype: str) -> None:
    """CheckpointError for a form that is none of DTYPES."""
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype should be one of {', '.join(DTYPES)}, got {dtype!r}")


def describe_output(shapes: Mapping[str, tuple[int, ...]], config: MMDiTConfig, dtype: str) -> Described:
    """Names, types and shapes of everything the file will hold."""
    plain = DTYPES[dtype]
    out: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if dtype == "fp8_scaled" and is_block_matrix(name, shape):
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


def encoded(tensors: Iterable[tuple[str, Tensor]], described: Described) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file from those of the network, one at a time."""
    for name, tensor in tensors:
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
    if ZERO_COND_MARKER in described:
        yield ZERO_COND_MARKER, torch.ones(1, dtype=described[ZERO_COND_MARKER][0])


def is_block_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("transformer_blocks.") and name.endswith(".weight") and len(shape) == 2


def _note() -> Tensor:
    return torch.tensor(list(json.dumps(FP8_LAYER).encode()), dtype=torch.uint8)


def keep_sources(dst: Path, sources: Iterable[Path]) -> None:
    """CheckpointError if writing `dst` would replace one of these files or folders, or any file in one of them."""
    if not dst.exists():
        return
    for source in sources:
        if source.is_dir() and dst.resolve().is_relative_to(source.resolve()):
            raise CheckpointError(f"{dst} is there already, as a part of the source; choose another name")
        if source.exists() and dst.samefile(source):
            raise CheckpointError(f"source and destination are the same file {dst}; choose another name")
        if dst.is_dir() and source.resolve().is_relative_to(dst.resolve()):
            raise CheckpointError(f"{dst} holds the source {source.name}; choose another name")


def source_recipe(src: Path) -> Recipe:
    """The recipe that a checkpoint brings, or the guess by its name, marked as one."""
    recipe = Recipe.read(src)
    if recipe is None and (guess := released_recipe(src)):
        recipe = replace(guess, made={RECIPE_FROM: "name"})
    return recipe or Recipe()
