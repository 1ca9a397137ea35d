"""VAE checkpoints: a pipeline's `vae/` folder in diffusers' layout, or one file in ComfyUI's (qwen_image_vae).

Both store the video model, diffusers' `AutoencoderKLQwenImage`. On a single image only the last temporal slice of its
causal 3-D kernels acts, and its temporal resamplers (`time_conv`) do not act at all; see model/vae.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from ..conditioning.sequence import VAE_SCALE
from ..errors import CheckpointError, one_line
from ..model.layers import ConvOperations, fill_parameters
from ..model.vae import ImageVAE, VAEConfig
from .files import PathLike, Weights, open_weights
from .formats.json_file import read_json
from .transformer import check_keys

VAE_CLASS = "AutoencoderKLQwenImage"

CHECKPOINT_PREFIX = "vae."

_LARGEST = 1 << 16
_MOST_BLOCKS = 100
_LEVELS = VAE_SCALE.bit_length()  # each but the last halves height and width
_LAST_SLICE = 2
"""Index of the temporal slice of a causal kernel that is applied to the image; the other two meet zero padding."""


def read_vae_config(folder: PathLike) -> VAEConfig:
    """Read sizes and latent statistics from a vae/ folder's config.json.

    Raises CheckpointError if it is absent, damaged, of another class, or of impossible sizes.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent.parent} has no {file.parent.name}/config.json; download vae/ from a Qwen-Image or UniPic 3 "
            "repository"
        )
    try:
        content = read_json(file)
        kind, config = content.get("_class_name"), VAEConfig.from_dict(content)
        mistake = _mistake(config)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({one_line(error)}); download the vae folder again") from error
    if kind != VAE_CLASS:
        raise CheckpointError(
            f"{file}: expected the config of an {VAE_CLASS}, got one of a {kind}; take vae/ from a Qwen-Image or "
            "UniPic 3 repository"
        )
    if mistake:
        raise CheckpointError(f"{file}: {mistake}; download the vae folder again")
    return config


def _mistake(config: VAEConfig) -> str:
    """Describe the first impossible value of an untrusted config; empty if there is none."""
    sizes = {"base_dim": _LARGEST, "z_dim": _LARGEST, "num_res_blocks": _MOST_BLOCKS}
    for name, most in sizes.items():
        value = getattr(config, name)
        if type(value) is not int or not 0 < value <= most:
            return f"{name} should be a whole number from 1 to {most}, got {value!r}"
    for name, length in (("dim_mult", _LEVELS), ("temperal_downsample", _LEVELS - 1)):
        values = getattr(config, name)
        if len(values) != length or not all(0 <= v <= _MOST_BLOCKS for v in values):
            return f"{name} should be {length} values, got {list(values)!r}"
    if not config.z_dim == len(config.latents_mean) == len(config.latents_std) or not min(config.latents_std) > 0:
        return f"latents_mean and latents_std should each be {config.z_dim} numbers, the latter above 0"
    return ""


@dataclass(frozen=True)
class OpenedVAE:
    """A VAE on disk, opened once; no tensor is loaded. stored: diffusers' name -> stored name."""

    source: Path
    config: VAEConfig
    weights: Weights
    stored: Mapping[str, str]

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the 2-D VAE that `load_image_vae` loads."""
        shapes = ((name, self.weights.shape(stored)) for name, stored in self.stored.items())
        return sum(prod(_image_shape(name, shape)) for name, shape in shapes if not _is_temporal(name))


def open_vae(source: PathLike) -> OpenedVAE:
    """Open a vae/ folder or a single file. Raises CheckpointError."""
    source = Path(source)
    if not source.is_file():
        config, weights = read_vae_config(source), open_weights(source)
        return OpenedVAE(source, config, weights, {name: name for name in weights})
    weights = open_weights(source)
    prefix = vae_prefix(weights)
    inferred = config_of_file({name[len(prefix) :]: weights.shape(name) for name in weights if name.startswith(prefix)})
    if inferred is None:
        raise CheckpointError(
            f"{source} is not the Qwen-Image VAE in ComfyUI's layout; use qwen_image_vae.safetensors, or a vae/ folder"
        )
    names = {name: prefix + name_in_file(name, inferred) for name in _video_shapes(inferred)}
    return OpenedVAE(source, inferred, weights, names)


def vae_prefix(names: Iterable[str]) -> str:
    """Prefix of a VAE's names in a file: "vae." in a checkpoint with all parts, as ComfyUI saves it; else ""."""
    return CHECKPOINT_PREFIX if any(name.startswith(f"{CHECKPOINT_PREFIX}decoder.") for name in names) else ""


def load_image_vae(
    source: PathLike | OpenedVAE,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    kind: type[ImageVAE] = ImageVAE,
    operations: ConvOperations = nn,
) -> ImageVAE:
    """Load the 2-D VAE of a vae/ folder or a file, frozen, in eval mode, its kernels in channels_last.

    The VAE is built on the meta device and filled tensor by tensor, each in its final dtype and place; memory holds at
    most one stored tensor beside it. kind: a subclass of ImageVAE. operations: its layer classes. Raises
    CheckpointError.
    """
    opened = source if isinstance(source, OpenedVAE) else open_vae(source)
    weights, stored = opened.weights, opened.stored
    with torch.device("meta"):
        model = kind(opened.config, operations=operations)
    _require_weights(opened.source, model, {name: weights.shape(stored[name]) for name in stored})

    def tensor_of(name: str) -> Tensor:
        return _placed(image_weight(name, weights.get(stored[name])), dtype, device)

    fill_parameters(model, tensor_of, requires_grad=False)
    return model.eval()


def _require_weights(folder: Path, model: ImageVAE, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    image_shapes = {name: _image_shape(name, shape) for name, shape in shapes.items() if not _is_temporal(name)}
    report = check_keys(expected, image_shapes)
    if not report.fits:
        raise CheckpointError(
            f"the VAE in {folder} does not fit its config.json ({report}); download the vae folder again"
        )


def _placed(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Copy a tensor to its final dtype and device, 4-D kernels in channels_last, the fastest for convolutions."""
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.to(device=device, dtype=dtype).contiguous(memory_format=layout)


# --- names, shapes and values, both ways -----------------------------------------------------------------------------


def _is_temporal(name: str) -> bool:
    return ".time_conv." in name


def _is_planar(name: str) -> bool:
    """True for a weight that is 2-D in the video model too: spatial resampling and attention act frame by frame."""
    return ".resample." in name or ".attentions." in name


def _image_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `image_weight` for a video weight of this shape; any other shape is returned unchanged."""
    if len(shape) == 5 and shape[2]:
        return (*shape[:2], *shape[3:])
    return shape[:3] if len(shape) == 4 and shape[3] == 1 and not _is_planar(name) else shape


def image_weight(name: str, w: Tensor) -> Tensor:
    """View a weight of the video model as the corresponding weight of ImageVAE."""
    return w[:, :, -1] if w.ndim == 5 else w.reshape(_image_shape(name, tuple(w.shape)))


def video_shapes(vae: ImageVAE) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of the video model that corresponds to `vae`."""
    shapes: dict[str, tuple[int, ...]] = {}
    downs, ups = iter(vae.config.temperal_downsample), iter(vae.config.temperal_downsample[::-1])
    for name, p in vae.state_dict().items():
        shape = tuple(p.shape)
        if _is_planar(name):
            shapes[name] = shape
        elif len(shape) == 4:
            shapes[name] = (*shape[:2], 1 if shape[-1] == 1 else _LAST_SLICE + 1, *shape[2:])
        else:
            shapes[name] = (*shape, 1) if len(shape) == 3 else shape
        if name.endswith(".resample.1.weight"):
            down = name.startswith("encoder.")
            if next(downs if down else ups):
                dim = shape[1]
                out, conv = dim if down else 2 * dim, name.replace("resample.1.weight", "time_conv")
                shapes |= {f"{conv}.weight": (out, dim, 3, 1, 1), f"{conv}.bias": (out,)}
    return shapes


def video_weights(vae: ImageVAE) -> dict[str, Tensor]:
    """Extend the weights to the video model: kernels become the last temporal slice, all other slices are zero."""
    image, out = vae.state_dict(), {}
    for name, shape in video_shapes(vae).items():
        if _is_temporal(name):
            out[name] = vae.quant_conv.weight.new_zeros(shape)
        elif len(shape) == 5:
            out[name] = image[name].new_zeros(shape)
            out[name][:, :, -1] = image[name]
        else:
            out[name] = image[name].reshape(shape)
    return out


# --- one file in ComfyUI's layout -------------------------------------------------------------------------------------

_FILE_NAMES = (
    *((".norm1.", ".residual.0."), (".conv1.", ".residual.2.")),
    *((".norm2.", ".residual.3."), (".conv2.", ".residual.6."), (".conv_shortcut.", ".shortcut.")),
    *((".mid_block.resnets.0.", ".middle.0."), (".mid_block.resnets.1.", ".middle.2.")),
    *((".mid_block.attentions.0.", ".middle.1."), (".down_blocks.", ".downsamples.")),
    *((".conv_in.", ".conv1."), (".norm_out.", ".head.0."), (".conv_out.", ".head.2.")),
    *(("post_quant_conv.", "conv2."), ("quant_conv.", "conv1.")),
)
"""Parts of diffusers' names and their counterparts in Wan 2.1's code, to be replaced in this order."""


def name_in_file(name: str, config: VAEConfig) -> str:
    """Translate a weight's name from diffusers' layout to ComfyUI's, which numbers the decoder's blocks in one row."""
    blocks = config.num_res_blocks + 1

    def numbered(match: re.Match[str]) -> str:
        level, kind, i = match.groups()
        return f".upsamples.{int(level) * (blocks + 1) + (int(i) if kind == 'resnets' else blocks)}."

    for diffusers_part, wan_part in _FILE_NAMES:
        name = name.replace(diffusers_part, wan_part)
    return re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", numbered, name)


def config_of_file(shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig | None:
    """Infer the config of a single file from its tensors; None for another VAE (other channels or blocks, a prefix).

    The file stores no config: width and residual blocks follow from the shapes, all else is the release's.
    """
    width = shapes.get("decoder.head.0.gamma", (0,))[:1]
    blocks = len({name.split(".")[2] for name in shapes if name.startswith("encoder.downsamples.")})
    res_blocks = (blocks - (_LEVELS - 1)) // _LEVELS  # beside them each level but the last has a resampler
    if not width or not 0 < width[0] <= _LARGEST or not 0 < res_blocks <= _MOST_BLOCKS:
        return None
    config = VAEConfig(base_dim=width[0], num_res_blocks=res_blocks)
    expected = {name_in_file(name, config): shape for name, shape in _video_shapes(config).items()}
    return config if check_keys(expected, shapes).fits else None


def weights_in_file(vae: ImageVAE) -> dict[str, Tensor]:
    """All weights under ComfyUI's names, contiguous.

    Raises CheckpointError for a VAE that a single file cannot describe: the file stores no latent statistics, and no
    sizes beyond those that `config_of_file` infers.
    """
    tensors = {name_in_file(name, vae.config): w.contiguous() for name, w in video_weights(vae).items()}
    if config_of_file({name: tuple(w.shape) for name, w in tensors.items()}) != vae.config:
        raise CheckpointError(
            "this VAE's sizes or latent statistics differ from the release's and one file cannot store them; use the "
            "model folder with its vae/config.json"
        )
    return tensors


def _video_shapes(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return video_shapes(ImageVAE(config))
