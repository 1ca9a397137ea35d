"""Transformer checkpoints: find the file, read or infer the sizes, check the keys, load without a second copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, one_line
from ..model.attention import Attention, scaled_dot_product_attention
from ..model.config import MMDiTConfig
from ..model.layers import Operations, fill_parameters
from ..model.mmdit import MMDiT
from ..sampling.schedules import Shift
from .files import PathLike, Weights, find_weight_file, folder_content, open_weights
from .formats.json_file import parse_json, read_json
from .formats.quantised import FP8
from .hub_cache import model_folder
from .recipe import TRANSFORMER_FOLDERS, Recipe, recipe_of

CONFIG_KEY = "unipic_config"
"""Metadata key of a single file, for the network's config.json as text."""

ZERO_COND_MARKER = "__index_timestep_zero__"
"""Tensor that marks zero_cond_t in single files (Qwen-Image-Edit-2511), as ComfyUI reads them."""

PARTS = {
    "transformer": TRANSFORMER_FOLDERS,
    "text_encoder": ("text_encoder",),
    "tokenizer": ("tokenizer",),
    "vae": ("vae",),
    "processor": ("processor",),
    "scheduler": ("scheduler",),
}
"""Parts of a pipeline folder and the names of their folders."""

NETWORK_CLASS = "QwenImageTransformer2DModel"
_MOST_LAYERS = 400
_LARGEST = 1 << 20

NUNCHAKU = "a Nunchaku quantisation"

_NAME_PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoRA", ("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lokr_w", "hada_w")),
    (NUNCHAKU, ("qweight", "smooth_factor")),
    ("a Qwen-Image transformer", ("txt_norm.weight",)),
    ("a FLUX transformer", ("double_blocks.", "single_blocks.", "single_transformer_blocks.")),
    ("a Stable Diffusion 3 transformer", ("joint_blocks.", "pos_embed.proj.")),
    ("a Stable Diffusion U-Net", ("input_blocks.", "down_blocks.0.attentions", "conv_norm_out.")),
    ("a Z-Image transformer", ("noise_refiner.",)),
    ("a text encoder", ("embed_tokens.", "visual.blocks.", "text_model.encoder.", "lm_head.")),
    ("a Wan transformer", ("blocks.0.self_attn.", "blocks.0.cross_attn.")),
    ("a VAE", ("quant_conv.", "decoder.conv_in.", "decoder.mid_block.", "decoder.conv1.", "decoder.middle.")),
)


def looks_like(names: Mapping[str, object] | list[str]) -> str:
    """Guess the kind of weights from tensor names: "a FLUX transformer", "a VAE", ..., or "unknown weights"."""
    text = "\n".join("." + name for name in names)
    for kind, parts in _NAME_PARTS:
        if any("." + part in text for part in parts):
            return kind
    return "unknown weights"


def find_transformer(path: PathLike) -> Path:
    """Locate the transformer's folder or file.

    In a pipeline folder that is `transformer/`, else `ema_transformer/`; a transformer folder or a single file is
    returned as it is. Raises CheckpointError if there is none.
    """
    path = model_folder(path)
    if path.is_file():
        return path
    if not path.is_dir():
        if path.exists():
            raise CheckpointError(f"{path} is a device or a pipe, not a file; name a weight file or a folder")
        raise CheckpointError(f"there is no file or folder {path}; check the path")
    for folder in (*(path / name for name in TRANSFORMER_FOLDERS), path):
        if find_weight_file(folder):
            return folder
    raise CheckpointError(
        f"no transformer in {path}: expected transformer/, ema_transformer/, or a .safetensors or .bin file, "
        f"found {folder_content(path, 8)}"
    )


def read_config(path: PathLike, weights: Weights | None = None) -> MMDiTConfig:
    """Read the config of the transformer at `path`.

    Sources in order: a folder's config.json, a single file's metadata, a transformer's config.json beside the file,
    the tensors' shapes (`infer_config`). weights: the opened weights, under bare names, to open no file twice. Raises
    CheckpointError if none of these describes this architecture.
    """
    source = find_transformer(path)
    if source.is_dir() and (source / "config.json").is_file():
        return config_from_file(source / "config.json")
    weights = weights or open_weights(source).bare()
    if CONFIG_KEY in weights.metadata:
        described = f"the metadata of {source}"
        return _parse_config(parse_json(weights.metadata[CONFIG_KEY], described), described)
    beside = source.parent / "config.json"
    if source.is_file() and beside.is_file() and class_name(beside) == NETWORK_CLASS:
        return config_from_file(beside)
    return infer_config(weights)


def config_from_file(path: Path) -> MMDiTConfig:
    """Read a diffusers config.json. Raises CheckpointError for another class or sizes out of range."""
    return _parse_config(read_json(path), str(path))


def _parse_config(content: object, source: str) -> MMDiTConfig:
    if not isinstance(content, dict):
        raise CheckpointError(f"{source}: expected a JSON object, got {type(content).__name__}; fetch it again")
    if content.get("_class_name", NETWORK_CLASS) != NETWORK_CLASS:
        raise CheckpointError(
            f"{source}: expected the config of a {NETWORK_CLASS}, got one of a {content['_class_name']}; choose a "
            "Qwen-Image or UniPic 3 transformer"
        )
    for name, value in content.items():
        numbers = value if name == "axes_dims_rope" and isinstance(value, list) else [value]
        limit = _MOST_LAYERS if name == "num_layers" else _LARGEST
        if name in _SIZES and not all(type(n) is int and 0 < n <= limit for n in numbers):
            raise CheckpointError(
                f"{source}: {name} should be a whole number from 1 to {limit}, got {value!r}; fetch the config again"
            )
    try:
        config = MMDiTConfig.from_dict(content)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    if config.width > _LARGEST:
        raise CheckpointError(f"{source}: the width should be at most {_LARGEST}, got {config.width}")
    return config


_SIZES = {
    *("patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim", "num_attention_heads"),
    *("joint_attention_dim", "axes_dims_rope"),
}


def class_name(path: Path) -> str | None:
    """Return the class that a config.json names; None if it names none or cannot be read."""
    try:
        name = read_json(path).get("_class_name")
        return name if isinstance(name, str) else None
    except (CheckpointError, AttributeError):
        return None


def infer_config(weights: Weights) -> MMDiTConfig:
    """Infer the config from tensor shapes, for files without metadata. weights: under bare names.

    The split of a head into RoPE axes leaves no trace in the weights: (16, 56, 56) is assumed for heads of 128, as
    released, otherwise the proportion (8, 12, 12)/32 of the small models. zero_cond_t is read from ComfyUI's marker
    tensor; use_layer3d_rope is assumed to come with the additional time condition (Qwen-Image-Layered). Raises
    CheckpointError for another architecture.
    """
    shapes = weights.shapes()
    try:
        width, in_channels = shapes["img_in.weight"]
        head_dim = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
        joint = shapes["txt_in.weight"][1]
        out = shapes["proj_out.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise _other_architecture(weights) from error
    layers = {name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}
    if not head_dim or width % head_dim or head_dim % 2 or out % 4 or len(layers) > _MOST_LAYERS:
        raise CheckpointError(
            f"{weights.path} has impossible sizes: width {width}, head size {head_dim}, {out} outputs; fetch it again"
        )
    additional = "time_text_embed.addition_t_embedding.weight" in shapes
    return MMDiTConfig(
        in_channels=in_channels,
        out_channels=out // 4,
        num_layers=len(layers),
        attention_head_dim=head_dim,
        num_attention_heads=width // head_dim,
        joint_attention_dim=joint,
        axes_dims_rope=rope_axes(head_dim),
        zero_cond_t=ZERO_COND_MARKER in shapes,
        use_additional_t_cond=additional,
        use_layer3d_rope=additional,
    )


def _other_architecture(weights: Weights) -> CheckpointError:
    kind = looks_like(weights.shapes())
    if kind == NUNCHAKU:
        return CheckpointError(
            f"{weights.path} is quantised by Nunchaku (SVDQuant), which only the loader of ComfyUI-nunchaku reads; use "
            "that loader, or a version in bf16 or fp8"
        )
    return CheckpointError(f"{weights.path} is not a UniPic transformer; it looks like {kind}")


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Split a head's dimensions over (frame, row, column): (16, 56, 56) for 128, else as (8, 12, 12) for 32."""
    side = 56 if head_dim == 128 else head_dim * 12 // 32 // 2 * 2
    return head_dim - 2 * side, side, side


@dataclass(frozen=True)
class KeyReport:
    """Difference between expected and stored tensors. wrong_shape: name -> (expected shape, stored shape)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        shapes = [f"{n} (expected {list(want)}, got {list(got)})" for n, (want, got) in self.wrong_shape.items()]
        groups = (("missing", self.missing), ("unexpected", self.unexpected), ("wrong shape", shapes))
        return "; ".join(f"{len(names)} {kind}: {_few(names)}" for kind, names in groups if names) or "all keys fit"


def _few(names: Any, most: int = 3) -> str:
    return ", ".join(list(names)[:most]) + (", ..." if len(names) > most else "")


def check_keys(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> KeyReport:
    """Compare names and shapes of expected and stored tensors; ZERO_COND_MARKER never counts as unexpected."""
    wrong = {
        n: (tuple(expected[n]), tuple(stored[n]))
        for n in expected
        if n in stored
        if tuple(expected[n]) != tuple(stored[n])
    }
    unexpected = tuple(n for n in stored if n not in expected and n != ZERO_COND_MARKER)
    return KeyReport(tuple(n for n in expected if n not in stored), unexpected, wrong)


def expected_shapes(config: MMDiTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters of a network of these sizes; allocates no weights."""
    return {n: tuple(p.shape) for n, p in MMDiT(config, device="meta").state_dict().items()}


def require_keys(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError, with counts and names, for missing, unexpected or wrongly shaped tensors.

    weights: under bare names.
    """
    report = check_keys(expected, weights.shapes_for(expected))
    if not report.fits:
        raise CheckpointError(
            f"{weights.path} does not fit the network ({report}); it looks like {looks_like(weights.shapes())}, "
            f"{len(weights)} tensors for {len(expected)} expected"
        )


@dataclass(frozen=True)
class OpenedModel:
    """A transformer on disk, opened and checked once; no tensor is loaded.

    source: the path passed to `open_transformer`. weights: under bare names. config: with the recipe's attention form.
    """

    source: Path
    weights: Weights
    config: MMDiTConfig
    recipe: Recipe

    @cached_property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(map(self.weights.count, self.weights))

    @cached_property
    def block_matrices(self) -> Mapping[str, int]:
        """Names of the blocks' matrices, which may be stored in fp8, with their numbers of elements."""
        shapes = self.weights.shapes().items()
        return {name: self.weights.count(name) for name, shape in shapes if is_block_matrix(name, shape)}


def is_block_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Tell by a parameter's name and shape whether it is a matrix of a block."""
    return name.startswith("transformer_blocks.") and name.endswith(".weight") and len(shape) == 2


def open_transformer(path: PathLike, *, any_quantisation: bool = False) -> OpenedModel:
    """Open weights, config and recipe and check them against each other; the recipe may name the attention form.

    any_quantisation: accept quantisations that `Weights.get` cannot dequantise, for callers that read `Weights.stored`.
    Raises CheckpointError.
    """
    weights = open_weights(find_transformer(path)).bare()
    if looks_like(weights.shapes()) == NUNCHAKU:
        raise _other_architecture(weights)
    if not any_quantisation:
        weights.require_readable()
    recipe = recipe_of(model_folder(path), weights.metadata)
    config = read_config(path, weights).with_attention_form(recipe.causal_attention_form)
    if config.num_layers and "transformer_blocks.0.attn.norm_q.weight" not in weights:
        raise _other_architecture(weights)
    require_keys(weights, expected_shapes(config))
    return OpenedModel(Path(path), weights, config, recipe)


def compute_dtype_of(weights: Weights) -> torch.dtype:
    """Dtype to compute in: that of most parameters; bfloat16 for quantised ones, fp8 and float16, which overflows
    here."""
    sizes: dict[torch.dtype, int] = {}
    for name in weights:
        narrow = name in weights.quantised or weights.dtype(name) in (*FP8, torch.float16)
        dtype = torch.bfloat16 if narrow else weights.dtype(name)
        sizes[dtype] = sizes.get(dtype, 0) + weights.count(name)
    most = max(sizes, key=lambda d: sizes[d])
    return torch.float32 if most is torch.float64 else most


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise CheckpointError for a dtype that the network cannot compute in."""
    if dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise CheckpointError(f"{dtype} overflows in this network; use torch.bfloat16 or torch.float32")


def load_transformer(
    source: PathLike | OpenedModel,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    operations: Operations = nn,
    attention: Attention = scaled_dot_product_attention,
) -> MMDiT:
    """Load the network in eval mode, from a path or an OpenedModel.

    The network is built on the meta device and filled tensor by tensor, each in its final dtype and place, so memory
    never holds a second copy. dtype: bfloat16 or float32; None = `compute_dtype_of`. Raises CheckpointError.
    """
    check_dtype(dtype)
    opened = source if isinstance(source, OpenedModel) else open_transformer(source)
    weights = opened.weights
    model = MMDiT(opened.config, operations=operations, attention=attention, device="meta")
    dtype = dtype or compute_dtype_of(weights)
    mapped = torch.device(device).type == "meta"  # for which nothing need be read
    fill_parameters(model, lambda name: weights.get(name, mapped=mapped).to(device=device, dtype=dtype))
    return model.eval()


def read_shift(folder: Path) -> Shift:
    """Read the time shift from scheduler/scheduler_config.json; without that file return the released one."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return Shift()
    try:
        content = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        return Shift.from_config(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error)}); download it again") from error
