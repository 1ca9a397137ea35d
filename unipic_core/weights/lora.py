"""LoRAs without peft: read the names of all common trainers, match layers, merge, write files that programs share."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, LoRAError
from .files import PathLike, open_weights
from .formats.json_file import read_json
from .formats.peft_patterns import LayerPatterns
from .lora_keys import parse_key, refused_kind
from .lora_layers import LoRALayer, Shape
from .recipe import METADATA_KEY, Recipe, step_lora_recipe
from .write import write_safetensors

LORA_KEY = "unipic_lora"
"""Metadata key of LoRAs that `save_lora` writes: ranks, and the alpha (null = the rank) that `up` already includes."""

AlphaOf = Callable[[str, str], tuple[float | None, bool]]
"""(stored name, bare name) of a layer -> (its alpha or None, True if it is rank-stabilised)."""


@dataclass(frozen=True)
class LoRA:
    """A LoRA file. layers: name without prefix -> layer; `fit` matches names with _ for dots too.

    unread: keys that belong to no known kind of layer, such as a text encoder's bias patches.
    """

    layers: dict[str, LoRALayer]
    recipe: Recipe | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    path: Path = Path("LoRA")

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({r for layer in self.layers.values() if (r := layer.rank)}))

    def fit(self, shapes: Mapping[str, Shape]) -> FittedLoRA:
        """Assign the layers to the parameters they change. shapes: names and shapes of all parameters of the model.

        Raises LoRAError if no layer matches a parameter, or if a matching layer has another shape.
        """
        table: dict[str, list[tuple[LoRALayer, bool]]] = {}
        unmatched, targets = list(self.unread), _aliases(shapes)
        matched = 0
        for name, layer in self.layers.items():
            target = targets.get(name)
            if target is None:
                unmatched.append(name)
                continue
            matched += 1
            for is_bias, shape in ((False, self._shape(name, layer)), (True, layer.bias_shape)):
                if shape is not None:
                    parameter = target + (".bias" if is_bias else ".weight")
                    self._check(name, parameter, shape, shapes)
                    table.setdefault(parameter, []).append((layer, is_bias))
        if not matched:
            raise LoRAError(
                f"none of the {len(self.layers)} layers of {self.name} belongs to this model: its first is "
                f"{next(iter(unmatched), 'absent')!r}, the model's first is {next(iter(shapes), 'absent')!r}; choose a "
                "LoRA for Qwen-Image-Edit or UniPic 3"
            )
        return FittedLoRA(table, MergeReport(matched, tuple(unmatched)))

    def _shape(self, name: str, layer: LoRALayer) -> Shape | None:
        try:
            return layer.weight_shape()
        except LoRAError as error:
            raise LoRAError(f"{self.name}: layer {name}: {error}") from error

    def _check(self, name: str, parameter: str, shape: Shape, shapes: Mapping[str, Shape]) -> None:
        expected = shapes.get(parameter)
        if expected is None or not LoRALayer.fits(shape, tuple(expected)):
            in_model = list(expected) if expected is not None else "no such parameter"
            raise LoRAError(
                f"{self.name} does not fit: layer {name} changes {parameter} of shape {list(shape)}, the model has "
                f"{in_model}; choose a LoRA for a model of these sizes"
            )


@dataclass(frozen=True)
class MergeReport:
    """Result of a merge. matched: number of layers added. unmatched: names that match no parameter of the model."""

    matched: int
    unmatched: tuple[str, ...] = ()


@dataclass(frozen=True)
class FittedLoRA:
    """A LoRA matched to a model. table: parameter -> (layer, True for its bias part) of all layers that change it."""

    table: Mapping[str, list[tuple[LoRALayer, bool]]]
    report: MergeReport

    def check(self, strength: float) -> None:
        """Raise LoRAError if `apply` would fail at any parameter: to be called before the first one changes."""
        if not strength:
            return
        for parameter, layers in self.table.items():
            for layer, _ in layers:
                layer.check_strength(strength)
                if not layer.is_finite:
                    raise LoRAError(f"the LoRA's layer of {parameter} holds NaN or infinity; fetch the LoRA again")

    def apply(self, parameter: str, value: Tensor, strength: float = 1.0) -> Tensor:
        """Apply the layers of a parameter in float32, each at this strength; returned in value's dtype.

        Returns `value` itself for a parameter without layers. Raises LoRAError as `LoRALayer.applied`.
        """
        if parameter not in self.table or not strength:
            return value
        total = value.float()
        for layer, is_bias in self.table[parameter]:
            if is_bias:
                total = total.add(layer.bias_delta(total.device), alpha=strength)
            else:
                total = layer.applied(total, strength)
        return total.to(value.dtype)


def read_lora(path: PathLike, *, mapped: bool = False) -> LoRA:
    """Read a LoRA file or folder (a peft adapter folder too). Raises LoRAError for other weights and adapters.

    mapped: leave the tensors in the memory-mapped file until they are used; enough for a description.
    """
    path = Path(path)
    try:
        weights = open_weights(path)
        recipe = Recipe.read(path, weights.metadata)
    except CheckpointError as error:
        raise LoRAError(str(error)) from error
    return build_lora(weights, partial(weights.get, mapped=mapped), path, weights.metadata, recipe)


def build_lora(
    keys: Iterable[str],
    get: Callable[[str], Tensor],
    path: Path,
    metadata: Mapping[str, str],
    recipe: Recipe | None = None,
) -> LoRA:
    """Build a LoRA from the tensors of an open file.

    path: for messages, and for adapter settings beside the file. recipe: None = guess a step LoRA's by its name
    (`step_lora_recipe`). Raises LoRAError like `read_lora`.
    """
    keys = list(keys)
    if refused := next(((kind, key) for key in keys if (kind := refused_kind(key))), None):
        raise LoRAError(
            f"{path.name} is {refused[0]} ({refused[1]}), which is not added to weights here; save it merged, or train "
            "a plain LoRA, DoRA, LoKr or LoHa"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    key_of: dict[tuple[str, str], str] = {}
    stored: dict[str, str] = {}
    unread = []
    for key in keys:
        parsed = parse_key(key)
        if parsed is None:
            unread.append(key)
        else:
            layer, part, outer = parsed
            if (first := key_of.setdefault((layer, part), key)) != key:
                raise LoRAError(
                    f"{path.name} holds two adapters: {first} and {key} are both the {part} of layer {layer}; save "
                    "each in a file of its own"
                )
            parts.setdefault(layer, {})[part] = get(key)
            stored[layer] = outer
    alpha_of = _declared_alphas(path, metadata)
    layers = {}
    for name, tensors in parts.items():
        alpha = tensors.pop("alpha", None)
        if alpha is not None and alpha.numel() != 1:
            raise LoRAError(f"{path.name}: the alpha of {name} should be one number, got shape {list(alpha.shape)}")
        declared, stabilised = alpha_of(stored[name], name) if alpha is None else (float(alpha), False)
        layer_ = LoRALayer(tensors, declared, stabilised)
        if layer_.kind:
            layers[name] = layer_
        else:
            unread += [f"{stored[name]}.{part}" for part in tensors] or [f"{stored[name]}.alpha"]
    if not layers:
        raise LoRAError(
            f"{path.name} holds no LoRA layer among {len(keys)} tensors (first {next(iter(keys), 'none')!r}); choose a "
            "LoRA file"
        )
    return LoRA(layers, recipe or step_lora_recipe(path), dict(metadata), tuple(unread), path)


def merge_lora(model: nn.Module, lora: LoRA, strength: float = 1.0) -> MergeReport:
    """Add strength times the LoRA to the model's weights in place.

    The negative strength undoes plain products, up to rounding in the weights' dtype. If any layer does not fit or
    cannot be applied, no weight changes. Raises LoRAError like `LoRA.fit` and `FittedLoRA.check`.
    """
    parameters = dict(model.named_parameters())
    fitted = lora.fit({name: tuple(p.shape) for name, p in parameters.items()})
    fitted.check(strength)
    with torch.no_grad():
        for name in fitted.table if strength else ():
            parameters[name].copy_(fitted.apply(name, parameters[name], strength))
    return fitted.report


def apply_to_weights(
    fitted: FittedLoRA, tensors: Iterable[tuple[str, Tensor]], strength: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    """Add the LoRA to a stream of tensors, one at a time. Raises LoRAError where a sum is not finite."""
    for name, tensor in tensors:
        changed = fitted.apply(name, tensor, strength)
        if changed is not tensor and not torch.isfinite(changed.sum()):
            raise LoRAError(f"with the LoRA, {name} holds NaN or infinity; fetch the LoRA and the weights again")
        yield name, changed


def save_lora(
    path: PathLike,
    layers: Mapping[str, tuple[Tensor, Tensor]],
    *,
    alpha: float | None = None,
    recipe: Recipe | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write bf16 safetensors with diffusers' keys, which ComfyUI reads too.

    layers: module name -> (down [r, in], up [out, r]). alpha (None = the rank) is multiplied into `up`, so that
    programs that ignore it and programs that assume the rank give the same picture; the metadata LORA_KEY records it.
    The file appears at `path` only when complete. Raises LoRAError for parts that do not multiply, CheckpointError when
    it cannot be written.
    """
    pairs = {name: LoRALayer({"down": down, "up": up}, alpha) for name, (down, up) in layers.items()}
    save_adapter(path, pairs, recipe=recipe, metadata=metadata)


FILE_NAMES = {"down": "lora_A.weight", "up": "lora_B.weight"}
"""Part of a layer -> its name in files; other parts have the same."""

SCALED_PARTS = ("up", "lokr_w1", "lokr_w1_a", "hada_w1_a")
"""Part of each kind of layer into which its scale is multiplied."""


def save_adapter(
    path: PathLike,
    layers: Mapping[str, LoRALayer],
    *,
    recipe: Recipe | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`save_lora` for layers of any low-rank kind: LoRA, DoRA, LoKr, LoHa, with LyCORIS' names of their parts.

    alpha is multiplied into one part of each. DoRA's magnitudes stay float32: in bf16 they would move whole rows of
    weights. Raises LoRAError and CheckpointError like `save_lora`.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.weight_shape()
        for part, value in layer.parts.items():
            scaled = value.detach().float() * (layer.scale if part in SCALED_PARTS else 1.0)
            dtype = torch.float32 if part == "dora_scale" else torch.bfloat16
            tensors[f"transformer.{name}.{FILE_NAMES.get(part, part)}"] = scaled.to("cpu", dtype).contiguous()
    if not tensors:
        raise LoRAError("a LoRA needs at least one layer, got none")
    ranks = sorted({layer.rank for layer in layers.values() if layer.rank})
    alphas = {layer.alpha for layer in layers.values() if layer.rank}
    alpha = alphas.pop() if len(alphas) == 1 else None
    scaling = {"ranks": ranks, "alpha": alpha, "alpha_is_in_the_weights": True}
    entries = {"format": "pt", LORA_KEY: json.dumps(scaling), **(metadata or {})}
    if recipe is not None:
        entries[METADATA_KEY] = recipe.to_json()
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_safetensors(Path(path), layout, tensors.items(), entries)


def _aliases(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Map all spellings of a module's name to the module: dots or underscores, `to_out` for `to_out.0`."""
    modules = {n.rsplit(".", 1)[0] for n in shapes if n.endswith((".weight", ".bias"))}
    table = {}
    for module in modules:
        spellings = {module, module.removesuffix(".0")} if module.endswith("to_out.0") else {module}
        # "lora_transformer_blocks_0" loses "lora_transformer_" as a prefix
        spellings |= {s.removeprefix("transformer_") for s in spellings}
        for spelling in spellings:
            table[spelling] = table[spelling.replace(".", "_")] = module
    return table | {module: module for module in modules}


def _declared_alphas(path: Path, metadata: Mapping[str, str]) -> AlphaOf:
    """Read the alphas in diffusers' metadata or peft's adapter_config.json.

    Ranks need no such table, and none of their patterns: they are those of the tensors.
    """
    try:
        settings = _adapter_settings(path, metadata)
        default, stabilised = settings.get("lora_alpha"), bool(settings.get("use_rslora"))
        default = None if default is None else float(default)
        values = {str(k): float(v) for k, v in (settings.get("alpha_pattern") or {}).items()}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise LoRAError(f"the adapter settings of {path.name} are not readable; fetch the file again") from error
    try:
        patterns = LayerPatterns(values)
    except LoRAError as error:
        raise LoRAError(
            f"{path.name}: the alpha_pattern of its adapter settings is not read: {error}; save it with an alpha in "
            "each layer"
        ) from error

    def alpha_of(stored: str, name: str) -> tuple[float | None, bool]:
        spellings = dict.fromkeys((name, stored.removeprefix("base_model.model.")))
        named = (patterns.value(spelling) for spelling in spellings)
        return next((alpha for alpha in named if alpha is not None), default), stabilised

    return alpha_of


def _adapter_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read peft's settings of an adapter: those in its metadata, or in the file beside it; empty without any."""
    beside = (path if path.is_dir() else path.parent) / "adapter_config.json"
    if "lora_adapter_metadata" in metadata:
        settings = json.loads(metadata["lora_adapter_metadata"])
        return {key.removeprefix("transformer."): value for key, value in settings.items()}
    return read_json(beside) if beside.is_file() and (path.is_dir() or path.stem == "adapter_model") else {}


def common_targets(lora: LoRA) -> dict[str, int]:
    """Count the LoRA's layers by target: {"attn.to_q": 60, ...}; for descriptions."""
    return dict(Counter(re.sub(r"^.*?\d+[._]", "", name) for name in lora.layers).most_common())
