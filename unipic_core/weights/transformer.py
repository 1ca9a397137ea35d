"""From a path to the network: which file, which sizes, do the keys fit; and the weights, without a second copy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..model.attention import Attention, scaled_dot_product_attention
from ..model.config import MMDiTConfig
from ..model.layers import Operations
from ..model.mmdit import MMDiT
from ..sampling.schedules import Shift
from .files import PathLike, Weights, find_weight_file, open_weights
from .formats.quantised import FP8
from .recipe import TRANSFORMER_FOLDERS, Recipe, recipe_of

CONFIG_KEY = "unipic_config"
"""Metadata key of a single file: the network's config.json as text."""

ZERO_COND_MARKER = "__index_timestep_zero__"
"""A tensor of this name says zero_cond_t in single files (Qwen-Image-Edit-2511), as ComfyUI reads them."""

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
_MOST_LAYERS = 1000
_LARGEST = 1 << 20

_LOOKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoRA", ("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lokr_w", "hada_w")),
    ("a Nunchaku quantisation", ("qweight", "smooth_factor")),
    ("a Qwen-Image transformer", ("txt_norm.weight",)),
    ("a FLUX transformer", ("double_blocks.", "single_blocks.", "single_transformer_blocks.")),
    ("a Stable Diffusion 3 transformer", ("joint_blocks.", "pos_embed.proj.")),
    ("a Stable Diffusion U-Net", ("input_blocks.", "down_blocks.0.attentions", "conv_norm_out.")),
    ("a Z-Image transformer", ("noise_refiner.",)),
    ("a text encoder", ("embed_tokens.", "visual.blocks.", "text_model.encoder.", "lm_head.")),
    ("a Wan transformer", ("blocks.0.self_attn.", "blocks.0.cross_attn.")),
    ("a VAE", ("quant_conv.", "decoder.conv_in.", "decoder.mid_block.", "decoder.conv1.", "decoder.middle.")),
)


def looks_like(names: Mapping[str, Any] | list[str]) -> str:
    """What weights of these names seem to be: "a FLUX transformer", "a VAE", ..., "unknown weights"."""
    text = "\n".join("." + name for name in names)
    for kind, marks in _LOOKS:
        if any("." + mark in text for mark in marks):
            return kind
    return "unknown weights"


def find_transformer(path: PathLike) -> Path:
    """The transformer's folder or file, or CheckpointError.

    Of a released folder its `transformer/`, else its `ema_transformer/`; a bare transformer folder or a single file is
    itself the answer.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"there is no file or folder {path}")
    for folder in (*(path / name for name in TRANSFORMER_FOLDERS), path):
        if find_weight_file(folder):
            return folder
    names = sorted(p.name for p in path.iterdir())
    held = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    raise CheckpointError(
        f"no transformer in {path}: expected transformer/, ema_transformer/, or a .safetensors or .bin file, "
        f"found {held}"
    )


def read_config(path: PathLike, weights: Weights | None = None) -> MMDiTConfig:
    """Sizes of the transformer at `path`.

    From a folder's config.json; from a single file's metadata, or the config.json beside it if that is a transformer's;
    else from the tensors' shapes (`infer_config`). CheckpointError if none of these describes this architecture.
    """
    found = find_transformer(path)
    if found.is_dir() and (found / "config.json").is_file():
        return config_from_file(found / "config.json")
    weights = weights or open_weights(found).bare()
    if CONFIG_KEY in weights.metadata:
        return _parse_config(weights.metadata[CONFIG_KEY], f"the metadata of {found}")
    beside = found.parent / "config.json"
    if found.is_file() and beside.is_file() and class_name(beside) == NETWORK_CLASS:
        return config_from_file(beside)
    return infer_config(weights)


def config_from_file(path: Path) -> MMDiTConfig:
    """From a diffusers config.json, or CheckpointError."""
    try:
        return _parse_config(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _parse_config(text: str, source: str) -> MMDiTConfig:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not JSON: {str(error)[:100]}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} is not a table of sizes")
    if content.get("_class_name", NETWORK_CLASS) != NETWORK_CLASS:
        raise CheckpointError(f"{source} describes a {content['_class_name']}, expected a {NETWORK_CLASS}")
    for name, value in content.items():
        numbers = value if name == "axes_dims_rope" and isinstance(value, list) else [value]
        limit = _MOST_LAYERS if name == "num_layers" else _LARGEST
        if name in _SIZES and not all(type(n) is int and 0 < n <= limit for n in numbers):
            raise CheckpointError(f"{source}: {name} should be a whole number from 1 to {limit}, got {value!r}")
    try:
        return MMDiTConfig.from_dict(content)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: {error}") from error


_SIZES = {
    *("patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim", "num_attention_heads"),
    *("joint_attention_dim", "axes_dims_rope"),
}


def class_name(path: Path) -> str | None:
    """The class that a config.json names; None if it names none or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def infer_config(weights: Weights) -> MMDiTConfig:
    """Sizes from tensor shapes, for files without metadata. weights: under bare names.

    The split of a head's dimensions into RoPE axes leaves no trace in the weights: (16, 56, 56) for heads of 128, as
    released, otherwise in the proportion (8, 12, 12)/32 of the small models. zero_cond_t shows only as ComfyUI's marker
    tensor; use_layer3d_rope is taken to come with the additional time condition (Qwen-Image-Layered).
    """
    shapes = weights.shapes()
    try:
        width, in_channels = shapes["img_in.weight"]
        head_dim = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
        joint = shapes["txt_in.weight"][1]
        out = shapes["proj_out.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{weights.path} is not a UniPic transformer; it looks like {looks_like(shapes)}"
        ) from error
    layers = {name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}
    if not head_dim or width % head_dim or head_dim % 2 or out % 4 or len(layers) > _MOST_LAYERS:
        raise CheckpointError(f"{weights.path} has no usable sizes: width {width}, head size {head_dim}, {out} outputs")
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


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Even (frame, row, column) parts of a head: (16, 56, 56) for 128, (8, 12, 12) for 32 and in proportion."""
    side = 56 if head_dim == 128 else head_dim * 12 // 32 // 2 * 2
    return head_dim - 2 * side, side, side


@dataclass(frozen=True)
class KeyReport:
    """How found tensors differ from expected ones. wrong_shape: name -> (expected, found)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        shapes = [f"{n} (expected {list(want)}, got {list(got)})" for n, (want, got) in self.wrong_shape.items()]
        groups = (("missing", self.missing), ("unexpected", self.unexpected), ("wrong shape", shapes))
        return "; ".join(f"{len(names)} {what}: {_few(names)}" for what, names in groups if names) or "all keys fit"


def _few(names: Any, most: int = 3) -> str:
    return ", ".join(list(names)[:most]) + (", ..." if len(names) > most else "")


def check_keys(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> KeyReport:
    """Compare names and shapes; the marker of zero_cond_t is never unexpected."""
    wrong = {
        n: (tuple(expected[n]), tuple(found[n]))
        for n in expected
        if n in found
        if tuple(expected[n]) != tuple(found[n])
    }
    unexpected = tuple(n for n in found if n not in expected and n != ZERO_COND_MARKER)
    return KeyReport(tuple(n for n in expected if n not in found), unexpected, wrong)


def expected_shapes(config: MMDiTConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a network of these sizes, without memory."""
    return {n: tuple(p.shape) for n, p in MMDiT(config, device="meta").state_dict().items()}


def require_keys(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """CheckpointError that counts and names what is missing, unexpected or wrongly shaped. weights: bare names."""
    report = check_keys(expected, weights.shapes_for(expected))
    if not report.fits:
        raise CheckpointError(
            f"{weights.path} does not fit the network ({report}); it looks like {looks_like(weights.shapes())}, "
            f"{len(weights)} tensors for {len(expected)} expected"
        )


@dataclass(frozen=True)
class OpenedModel:
    """A transformer on disk, opened once and checked: nothing of it is loaded yet.

    source: the path that it was opened by. weights: under bare names. config: with the recipe's attention form.
    """

    source: Path
    weights: Weights
    config: MMDiTConfig
    recipe: Recipe

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(map(self.weights.count, self.weights))


def open_transformer(path: PathLike, *, any_quantisation: bool = False) -> OpenedModel:
    """Open weights, config and recipe, and check them against each other; a recipe may name the attention form.

    any_quantisation: open weights that `Weights.get` cannot multiply out too, for a reader of its own.
    """
    weights = open_weights(find_transformer(path)).bare()
    if not any_quantisation:
        weights.require_readable()
    recipe = recipe_of(path, weights.metadata)
    config = read_config(path, weights).with_attention_form(recipe.causal_attention_form)
    if config.num_layers and "transformer_blocks.0.attn.norm_q.weight" not in weights:
        raise CheckpointError(
            f"{weights.path} is not a UniPic transformer; it looks like {looks_like(weights.shapes())}"
        )
    require_keys(weights, expected_shapes(config))
    return OpenedModel(Path(path), weights, config, recipe)


def stored_dtype(weights: Weights) -> torch.dtype:
    """The type to compute in: that of most parameters; bfloat16 for quantised ones, fp8 and float16, which overflows
    here."""
    sizes: dict[torch.dtype, int] = {}
    for name in weights:
        narrow = name in weights.quantised or weights.dtype(name) in (*FP8, torch.float16)
        dtype = torch.bfloat16 if narrow else weights.dtype(name)
        sizes[dtype] = sizes.get(dtype, 0) + weights.count(name)
    most = max(sizes, key=lambda d: sizes[d])
    return torch.float32 if most is torch.float64 else most


def checked_dtype(dtype: torch.dtype | None) -> None:
    """CheckpointError for types that the network cannot compute in."""
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
    """Load the network, in eval mode, from a path or from what `open_transformer` opened.

    Built without memory, then filled tensor by tensor in its final type and place, so there is never a second copy.
    dtype: bfloat16 or float32; None = as stored (`stored_dtype`). Raises CheckpointError.
    """
    checked_dtype(dtype)
    opened = source if isinstance(source, OpenedModel) else open_transformer(source)
    weights = opened.weights
    model = MMDiT(opened.config, operations=operations, attention=attention, device="meta")
    dtype = dtype or stored_dtype(weights)
    for module_name, module in model.named_modules():
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                tensor = weights.get(f"{module_name}.{name}" if module_name else name)
                module._parameters[name] = nn.Parameter(tensor.to(device=device, dtype=dtype))
    return model.eval()


def read_shift(folder: Path) -> Shift:
    """The time shift of scheduler/scheduler_config.json; the released one if there is no such file."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return Shift()
    try:
        return Shift.from_config(json.loads(path.read_text(encoding="utf-8")))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error)[:100]}; download it again") from error
