"""Content keys of cells: equal keys mean the same picture, also in another process.

A key holds all inputs by content: tensors by their bytes, weights by a checksum over evenly spaced values. Beside them
it holds how they are computed: versions, device, ComfyUI's options. A model with functions of other nodes (patches,
wrappers) has no content that can be compared, hence no key: its pictures are not stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import comfy.model_management as management
import comfyui_version
import torch
from comfy.cli_args import args
from comfy.ldm.modules.attention import optimized_attention_masked
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ....unipic_core import __version__
from ....unipic_core.caching import checksums
from ..model import kv_memory
from ..sampling import conditionings

SAMPLED_VALUES = 16
"""Values of each weight that enter a key; weights may lie in a mapped file, of which each value reads a page."""

_OBJECTS = ("model_sampling", "latent_format")
"""Objects of a MODEL that change its pictures: the schedule, by which time ranges become sigmas, and the statistics of
the latents, which no weights contain."""

_OUR_WRAPPERS = {kv_memory.KEY, conditionings.KEY}
_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device)


class NoKey(Exception):
    """An input has no content that can be compared."""


class Digest:
    """Hash of nested plain values, tensors and dataclasses."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, value: object) -> Digest:
        """Add a value with its type and structure. Raises NoKey for functions and other objects."""
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, _PLAIN):
            self._write(f"{type(value).__name__} {value!r}")
        elif isinstance(value, Mapping):
            self._write(f"mapping {len(value)}")
            for key in sorted(value, key=repr):
                self.add(key).add(value[key])
        elif is_dataclass(value) and not isinstance(value, type):
            self._write(type(value).__qualname__)
            for f in fields(value):
                self.add(f.name).add(getattr(value, f.name))
        elif isinstance(value, Sequence):
            self._write(f"sequence {len(value)}")
            for part in value:
                self.add(part)
        else:
            raise NoKey(type(value).__name__)
        return self

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def _write(self, text: str) -> None:
        self._hash.update(f"{text}\n".encode())

    def _tensor(self, tensor: Tensor) -> None:
        plain = tensor.detach().cpu().contiguous()
        self._write(f"tensor {plain.dtype} {list(plain.shape)}")
        self._hash.update(plain.flatten().view(torch.uint8).numpy().tobytes())


def weights_of(module: torch.nn.Module, originals: Mapping[str, Tensor] = {}) -> list[object]:
    """Kinds of a module's layers, and names, dtypes, shapes and checksums of its tensors.

    Layers of one dtype may multiply in another, as with UNETLoader's fp8_e4m3fn_fast. originals: tensors to read in
    place of patched ones. Raises NoKey for opaque tensors.
    """
    kinds = sorted({type(layer).__qualname__ for layer in module.modules()})
    named = {**dict(module.named_parameters()), **dict(module.named_buffers()), **originals}
    plain = [part for tensor in named.values() for part in _parts(tensor)]
    described = [[name, tensor.dtype, list(tensor.shape)] for name, tensor in named.items()]
    return [kinds, described, checksums(plain, SAMPLED_VALUES)]


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensor, or the plain tensors of a quantised one."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return [tensor]
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        raise NoKey(type(tensor).__name__)
    names, _ = flatten()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def vae_content(vae: VAE) -> list[object]:
    """Weights and device of a VAE."""
    return [weights_of(vae.first_stage_model), management.get_torch_device_name(vae.device)]


def model_key(model: ModelPatcher) -> str:
    """Key of a MODEL: its weights, LoRAs, schedule, latent statistics and options, and how they are computed.

    Raises NoKey where other nodes have put functions.
    """
    foreign = [
        name
        for hooks in (model.wrappers, model.callbacks)
        for by_key in hooks.values()
        for name, functions in by_key.items()
        if functions and name not in _OUR_WRAPPERS
    ]
    if foreign or model.injections or model.hook_patches or model.weight_wrapper_patches:
        raise NoKey(", ".join(map(str, foreign)) or "hooks")
    network = model.model.diffusion_model
    digest = Digest().add(_program()).add([type(model.model).__name__, getattr(network, "config", None)])
    digest.add(weights_of(network, _originals(model))).add(_patches(model.patches)).add(_options(model.model_options))
    names = sorted({*_OBJECTS, *model.object_patches})
    digest.add([_object(name, model.get_model_object(name)) for name in names])
    device = management.get_torch_device_name(model.load_device)
    return digest.add([device, model.model.get_dtype_inference()]).hexdigest()


def _program() -> list[object]:
    """Versions, and the options of ComfyUI that change all pictures: the attention function and --fast."""
    fast = sorted(str(feature) for feature in args.fast)
    return [__version__, torch.__version__, comfyui_version.__version__, optimized_attention_masked.__name__, fast]


def _originals(model: ModelPatcher) -> dict[str, Tensor]:
    """Weights before ComfyUI added LoRAs to them in place, by their names in the network."""
    prefix = "diffusion_model."
    return {k.removeprefix(prefix): saved.weight for k, saved in model.backup.items() if k.startswith(prefix)}


def _patches(patches: Mapping[Any, Any]) -> list[object]:
    """LoRAs as plain values: weight adapters by their tensors."""

    def plain(value: object) -> object:
        if hasattr(value, "weights") and hasattr(value, "calculate_weight"):
            return [type(value).__name__, plain(value.weights)]
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return value

    return [[str(key), plain(value)] for key, value in patches.items()]


def _options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """model_options without empty entries."""

    def empty(value: object) -> bool:
        return value is None or (isinstance(value, (Mapping, list, tuple)) and not value)

    return {k: _options(v) if isinstance(v, Mapping) else v for k, v in options.items() if not empty(v)}


def _object(name: str, value: object) -> list[object]:
    """One of `_OBJECTS` by its classes, tensors and plain attributes. NoKey for another object that a node replaced."""
    if name not in _OBJECTS:
        raise NoKey(name)
    tensors = dict(value.state_dict()) if isinstance(value, torch.nn.Module) else {}
    # preview colours are None or lists, and change no picture
    plain = {k: v for k, v in vars(value).items() if k[0] != "_" and v is not None and isinstance(v, (*_PLAIN, Tensor))}
    return [name, [kind.__name__ for kind in type(value).__mro__], tensors, plain]
