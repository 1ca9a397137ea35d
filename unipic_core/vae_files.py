"""The `vae/` folder of a pipeline, in diffusers' layout: its config, and its weights in two dimensions and back.

diffusers stores the video model (`AutoencoderKLQwenImage`). Of its causal 3-D kernels only the last temporal slices act
on single pictures, and its temporal resamplers (`time_conv`) not at all; see image_vae.py.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import check_keys
from .errors import CheckpointError
from .image_vae import ImageVAE, VAEConfig
from .sequence import VAE_SCALE
from .weights import PathLike, Weights, open_weights

VAE_CLASS = "AutoencoderKLQwenImage"

_LARGEST = 1 << 16
_MOST_BLOCKS = 100
_LEVELS = VAE_SCALE.bit_length()  # each but the last halves the picture
_LAST_SLICE = 2
"""Of the three temporal slices of a causal kernel, the one that meets the picture itself."""


def read_vae_config(folder: PathLike) -> VAEConfig:
    """Sizes and latent statistics of a vae/ folder's config.json.

    Raises CheckpointError if it is absent, damaged, of another class, or of sizes that no such VAE has.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent.parent} has no {file.parent.name}/config.json; download vae/ from a Qwen-Image or UniPic 3 "
            "repository"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        kind, config = content.get("_class_name"), VAEConfig.from_dict(content)
        wrong = _wrong(config)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        detail = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file} cannot be read ({detail}); download the vae folder again") from error
    if kind != VAE_CLASS:
        raise CheckpointError(
            f"{file} describes a {kind}, expected an {VAE_CLASS}; take vae/ from a Qwen-Image or UniPic 3 repository"
        )
    if wrong:
        raise CheckpointError(f"{file}: {wrong}; download the vae folder again")
    return config


def _wrong(config: VAEConfig) -> str:
    """What is wrong with a config that may come from anyone; empty if nothing is."""
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


def load_image_vae(
    folder: PathLike,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    kind: type[ImageVAE] = ImageVAE,
    operations: Any = nn,
) -> ImageVAE:
    """The 2-D VAE of a vae/ folder, frozen, in eval mode, its kernels in channels_last.

    Built without memory, then filled tensor by tensor in its final type and place: beside it there is never more than
    one stored tensor. kind, operations: a class derived from
    ImageVAE, and the layers to build it of. Raises CheckpointError.
    """
    folder = Path(folder)
    config, weights = read_vae_config(folder), open_weights(folder)
    with torch.device("meta"):
        model = kind(config, operations=operations)
    _require_weights(folder, model, weights)
    for module_name, module in model.named_modules():
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                tensor = image_weight(f"{module_name}.{name}", weights.get(f"{module_name}.{name}"))
                module._parameters[name] = nn.Parameter(_placed(tensor, dtype, device), requires_grad=False)
    return model.eval()


def _require_weights(folder: Path, model: ImageVAE, weights: Weights) -> None:
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: _image_shape(name, shape) for name, shape in weights.shapes().items() if not _is_temporal(name)}
    report = check_keys(expected, found)
    if not report.fits:
        raise CheckpointError(
            f"the VAE in {folder} does not fit its config.json ({report}); download the vae folder again"
        )


def _placed(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """In memory of its own, 4-D kernels in the format in which convolutions are fastest."""
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.to(device=device, dtype=dtype).contiguous(memory_format=layout)


def vae_parameters(folder: PathLike) -> int:
    """Parameters that `load_image_vae` will hold, from the files' headers."""
    weights = open_weights(folder)
    return sum(prod(_image_shape(name, weights.shape(name))) for name in weights if not _is_temporal(name))


# --- names, shapes and values, both ways -----------------------------------------------------------------------------


def _is_temporal(name: str) -> bool:
    return ".time_conv." in name


def _is_planar(name: str) -> bool:
    """Whether the video model has this weight in two dimensions too: resampling and attention go frame by frame."""
    return ".resample." in name or ".attentions." in name


def _image_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a video weight's `image_weight`; of one that is no weight of the video model, as it is."""
    if len(shape) == 5 and shape[2]:
        return (*shape[:2], *shape[3:])
    return shape[:3] if len(shape) == 4 and shape[3] == 1 and not _is_planar(name) else shape


def image_weight(name: str, w: Tensor) -> Tensor:
    """A weight of the video model as ImageVAE has it: a view."""
    return w[:, :, -1] if w.ndim == 5 else w.reshape(_image_shape(name, tuple(w.shape)))


def video_shapes(vae: ImageVAE) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the video model's weights, of the same sizes as `vae`."""
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
    """All weights of the video model: kernels as last temporal slice, zeros before it and in the resamplers."""
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
