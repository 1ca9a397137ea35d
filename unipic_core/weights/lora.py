"""LoRAs without peft: read every naming in use, say what matched, merge; write files that all programs read."""

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
from .files import PREFIXES as NETWORK_PREFIXES
from .files import PathLike, open_weights
from .lora_layers import LoRALayer, Shape
from .recipe import METADATA_KEY, Recipe, step_lora_recipe
from .write import write_safetensors

PREFIXES = (
    *("base_model.model.", "base_model.", *NETWORK_PREFIXES, "unet."),
    *("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_", "lora_"),
)
"""What trainers put before a layer's name; they may be nested. Names behind those of the last row use _ for dots."""

LORA_KEY = "unipic_lora"
"""Metadata of the LoRAs that are written here: their ranks, and the alpha (null = the rank) that `up` holds already."""

_LOW_RANK = re.compile(
    r"(?P<layer>.+?)[._](?:lora_(?P<ab>A|B|down|up)|lora(?:_linear_layer)?\.(?P<du>down|up))"
    r"(?:\.(?!bias$)[\w-]+)??(?:\.weight)?$"  # an adapter's name may stand before .weight
)
_OTHER = re.compile(r"(?P<layer>.+)\.(?P<part>alpha|diff|diff_b|lokr_w[12](?:_[ab])?|hada_w[12]_[ab])$")
_DORA = re.compile(r"\.(dora_scale|lora_magnitude_vector)\b")
_SIDE = {"A": "down", "down": "down", "B": "up", "up": "up"}


@dataclass(frozen=True)
class LoRA:
    """A LoRA file. layers: name without prefix -> layer (names of some trainers have _ for dots; `fit` finds them).

    unread: keys that belong to nothing this module knows, such as a text encoder's bias patches.
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
        """The layers under the parameters they change. shapes: every parameter's name and shape.

        Raises LoRAError if no layer belongs to one of these parameters, or if one does and has another shape.
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
            for is_bias, got in ((False, self._shape(name, layer)), (True, layer.bias_shape)):
                if got is not None:
                    parameter = target + (".bias" if is_bias else ".weight")
                    self._check(name, parameter, got, shapes)
                    table.setdefault(parameter, []).append((layer, is_bias))
        if not matched:
            raise LoRAError(
                f"none of the {len(self.layers)} layers of {self.name} belongs to this model: its first is "
                f"{next(iter(unmatched), 'absent')!r}, the model's first is {next(iter(shapes), 'absent')!r}; it was "
                "made for another architecture"
            )
        return FittedLoRA(table, MergeReport(matched, tuple(unmatched)))

    def _shape(self, name: str, layer: LoRALayer) -> Shape | None:
        try:
            return layer.weight_shape()
        except LoRAError as error:
            raise LoRAError(f"{self.name}: layer {name}: {error}") from error

    def _check(self, name: str, parameter: str, got: Shape, shapes: Mapping[str, Shape]) -> None:
        expected = shapes.get(parameter)
        if expected is None or tuple(expected) != got:
            wanted = list(expected) if expected is not None else "no such parameter"
            raise LoRAError(
                f"{self.name} does not fit: layer {name} changes {parameter} of shape {list(got)}, "
                f"the model has {wanted}; it was made for a model of other sizes"
            )


@dataclass(frozen=True)
class MergeReport:
    """matched: layers that were added. unmatched: names that belong to no parameter of the model."""

    matched: int
    unmatched: tuple[str, ...] = ()


@dataclass(frozen=True)
class FittedLoRA:
    """A LoRA that is known to fit. table: parameter -> layers that change it, and whether by their bias part."""

    table: Mapping[str, list[tuple[LoRALayer, bool]]]
    report: MergeReport

    def apply(self, parameter: str, value: Tensor, strength: float = 1.0) -> Tensor:
        """value + strength * deltas, added in float32, in value's type; a parameter without deltas as it is."""
        if parameter not in self.table or not strength:
            return value
        total = value.float()
        for layer, is_bias in self.table[parameter]:
            delta = layer.bias_delta(total.device) if is_bias else layer.weight_delta(total.device)
            total = total.add(delta, alpha=strength)
        return total.to(value.dtype)


def read_lora(path: PathLike, *, mapped: bool = False) -> LoRA:
    """A LoRA file or folder (a peft adapter folder too). Raises LoRAError if it is none, or one with DoRA magnitudes.

    mapped: leave the tensors in the memory-mapped file until they are used, as a description needs.
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
    """A LoRA from a file that is open already. path: its name for messages, and where adapter settings may lie.

    A step LoRA without a recipe gets the one that its name tells (`step_lora_recipe`).

    Raises LoRAError as `read_lora`.
    """
    keys = list(keys)
    if dora := next((name for name in keys if _DORA.search(name)), None):
        raise LoRAError(
            f"{path.name} is a DoRA ({dora}), which cannot be added to weights; save it merged, or as a plain LoRA"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    stored: dict[str, str] = {}
    unread = []
    for key in keys:
        parsed = _parse(key)
        if parsed is None:
            unread.append(key)
        else:
            layer, part, outer = parsed
            parts.setdefault(layer, {})[part] = get(key)
            stored[layer] = outer
    alphas = _declared_alphas(path, metadata)
    layers = {}
    for name, found in parts.items():
        alpha = found.pop("alpha", None)
        if alpha is not None and alpha.numel() != 1:
            raise LoRAError(f"{path.name}: the alpha of {name} should be one number, got shape {list(alpha.shape)}")
        declared, stabilised = alphas(stored[name], name) if alpha is None else (float(alpha), False)
        layer_ = LoRALayer(found, declared, stabilised)
        if layer_.kind:
            layers[name] = layer_
        else:
            unread += [f"{stored[name]}.{part}" for part in found] or [f"{stored[name]}.alpha"]
    if not layers:
        raise LoRAError(
            f"{path.name} holds no LoRA layer among {len(keys)} tensors (first {next(iter(keys), 'none')!r})"
        )
    return LoRA(layers, recipe or step_lora_recipe(path), dict(metadata), tuple(unread), path)


def merge_lora(model: nn.Module, lora: LoRA, strength: float = 1.0) -> MergeReport:
    """Add strength times the LoRA to the model's weights, in place.

    A negative strength takes it out again, up to rounding in the weights' type. Nothing is changed if any layer does
    not fit. Raises LoRAError as `LoRA.fit`.
    """
    parameters = dict(model.named_parameters())
    fitted = lora.fit({name: tuple(p.shape) for name, p in parameters.items()})
    with torch.no_grad():
        for name in fitted.table if strength else ():
            parameters[name].copy_(fitted.apply(name, parameters[name], strength))
    return fitted.report


def apply_to_weights(
    fitted: FittedLoRA, tensors: Iterable[tuple[str, Tensor]], strength: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a stream with the LoRA added, one at a time. Raises LoRAError where a sum is not finite."""
    for name, tensor in tensors:
        changed = fitted.apply(name, tensor, strength)
        if changed is not tensor and not torch.isfinite(changed.sum()):
            raise LoRAError(f"with the LoRA, {name} holds NaN or infinity; one of the two files is damaged")
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
    programs which ignore it and programs which assume the rank give the same picture; LORA_KEY in the metadata says
    what it was. Written aside and renamed. Raises LoRAError for parts that do not multiply.
    """
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in layers.items():
        layer = LoRALayer({"down": down, "up": up}, alpha)
        layer.weight_shape()
        tensors[f"transformer.{name}.lora_A.weight"] = down.detach().to("cpu", torch.bfloat16).contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = (
            (up.detach().float() * layer.scale).to("cpu", torch.bfloat16).contiguous()
        )
    if not tensors:
        raise LoRAError("a LoRA needs at least one layer, got none")
    ranks = sorted({down.shape[0] for down, _ in layers.values()})
    about = {"ranks": ranks, "alpha": alpha, "alpha_is_in_the_weights": True}
    notes = {"format": "pt", LORA_KEY: json.dumps(about), **(metadata or {})}
    if recipe is not None:
        notes[METADATA_KEY] = recipe.to_json()
    described = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_safetensors(Path(path), described, tensors.items(), notes)


def _parse(key: str) -> tuple[str, str, str] | None:
    """Key -> (layer without prefix, part, layer as stored)."""
    if found := _LOW_RANK.match(key):
        part = _SIDE[found["ab"] or found["du"]]
    elif found := _OTHER.match(key):
        part = found["part"]
    else:
        return None
    layer = found["layer"].replace(".processor.", ".")
    while prefix := next((p for p in PREFIXES if layer.startswith(p) and len(p) < len(layer)), None):
        layer = layer[len(prefix) :]
    return layer, part, found["layer"]


def _aliases(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Every spelling of a module's name -> the module: dots or underscores, `to_out` for `to_out.0`."""
    modules = {n.rsplit(".", 1)[0] for n in shapes if n.endswith((".weight", ".bias"))}
    table = {}
    for module in modules:
        spellings = {module, module.removesuffix(".0")} if module.endswith("to_out.0") else {module}
        # "lora_transformer_blocks_0" loses "lora_transformer_" as a prefix
        spellings |= {s.removeprefix("transformer_") for s in spellings}
        for spelling in spellings:
            table[spelling] = table[spelling.replace(".", "_")] = module
    return table | {module: module for module in modules}


def _declared_alphas(path: Path, metadata: Mapping[str, str]) -> Any:
    """Function of (stored name, bare name): (alpha or None, rank-stabilised), from diffusers or peft."""
    beside = (path if path.is_dir() else path.parent) / "adapter_config.json"
    try:
        if "lora_adapter_metadata" in metadata:
            found = json.loads(metadata["lora_adapter_metadata"])
            found = {key.removeprefix("transformer."): value for key, value in found.items()}
        elif beside.is_file() and (path.is_dir() or path.stem == "adapter_model"):
            found = json.loads(beside.read_text(encoding="utf-8"))
        else:
            return lambda stored, name: (None, False)
        default, stabilised = found.get("lora_alpha"), bool(found.get("use_rslora"))
        default = None if default is None else float(default)
        patterns = {str(k): float(v) for k, v in (found.get("alpha_pattern") or {}).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LoRAError(f"the adapter settings of {path.name} are not readable; the file is damaged") from error

    def alpha_of(stored: str, name: str) -> tuple[float | None, bool]:
        ends = [v for k, v in patterns.items() if name == k or name.endswith("." + k) or stored == k]
        return (ends[0] if ends else default), stabilised

    return alpha_of


def common_targets(lora: LoRA) -> dict[str, int]:
    """How many layers of each sort the LoRA has: {"attn.to_q": 60, ...}; for descriptions."""
    return dict(Counter(re.sub(r"^.*?\d+[._]", "", name) for name in lora.layers).most_common())
