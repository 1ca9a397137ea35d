"""DistillLoRA: a LoRA with any trainer's key names, added to a MODEL together with its recipe."""

from __future__ import annotations

import logging
import os
from itertools import chain
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import WeightAdapterBase
from comfy_api.latest import io, ui
from torch import Tensor

from ..unipic_core import bundled
from ..unipic_core.bundled import BUNDLED
from ..unipic_core.conditioning.reference_sizes import DEFAULT_BUDGET
from ..unipic_core.errors import CheckpointError, LoRAError, one_line
from ..unipic_core.run.plan import Settings, resolve
from ..unipic_core.weights.lora import LoRA, MergeReport, build_lora
from ..unipic_core.weights.lora_layers import LoRALayer
from ..unipic_core.weights.recipe import METADATA_KEY, Recipe
from . import CATEGORY
from .host.messages import tell
from .host.model.kv_cache import ATTENTION_FORM
from .host.model.loading import round_times
from .host.model.model import UniPicModel
from .host.model.saving import save_with_recipe
from .host.recipe_attachment import attach, attachment_of
from .host.wires import check_model

NETWORK = "diffusion_model."
"""ComfyUI's prefix of the network's parameter names."""

_FACTORS = {"down": "lora_down.weight", "up": "lora_up.weight"}


def lora_names() -> list[str]:
    """The names in the list: bundled LoRAs, then files in ComfyUI's `loras` folders."""
    return [*(BUNDLED + name for name in bundled.bundled_loras()), *folder_paths.get_filename_list("loras")]


def lora_path(name: str) -> Path:
    """File of a name in the list, or of a bundled LoRA's earlier name. Raises LoRAError."""
    if not isinstance(name, str):
        raise LoRAError(f"lora must be the name of a file, got {name!r}; choose one in the list")
    if name.startswith(BUNDLED):
        ours = name.removeprefix(BUNDLED)
        file = bundled.bundled_loras().get(bundled.RENAMED.get(ours, ours))
        if file is None:
            raise LoRAError(f"the pack has no LoRA {ours!r}; choose another, or update the pack")
        return file
    found = folder_paths.get_full_path("loras", name)
    if found is None:
        raise LoRAError(f"there is no LoRA {name!r} in ComfyUI's models/loras; put it there, or choose another")
    return Path(found)


def file_state(name: str | None) -> tuple[int, int] | str | None:
    """Time and size of a LoRA's file, by which ComfyUI notices a replaced one; None for a name from a wire."""
    if name is None:
        return None
    try:
        state = os.stat(lora_path(name))
    except LoRAError as error:  # `execute` raises it where the user sees it
        return str(error)
    return state.st_mtime_ns, state.st_size


def read_lora(path: Path) -> LoRA:
    """Read a LoRA file by ComfyUI's reader, which runs no code from it. Raises LoRAError for a damaged one."""
    try:
        tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
        tensors = {str(key): value for key, value in tensors.items() if isinstance(value, Tensor)}
    except Exception as error:  # of safetensors, pickle, zipfile or torch
        reason = one_line(error)
        raise LoRAError(f"{path.name} cannot be read as a LoRA ({reason}); it is damaged: download it again") from error
    metadata = metadata or {}
    try:
        recipe = Recipe.from_json(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
    except CheckpointError as error:
        raise LoRAError(f"{path.name}: {error}") from error
    return build_lora(tensors, tensors.__getitem__, path, metadata, recipe)


def add_lora(model: ModelPatcher, lora: LoRA, strength: float) -> tuple[Any, MergeReport]:
    """A clone of the MODEL with the LoRA as ComfyUI's weight patches, and its recipe overriding the model's.

    Raises LoRAError if no layer matches, or one has another shape or cannot be added, and UniPicError if the recipe
    names a sampler or a schedule that this version does not have.
    """
    parameters = model.model.diffusion_model.named_parameters()
    fitted = lora.fit({name: tuple(parameter.shape) for name, parameter in parameters})
    attached = attachment_of(model).with_recipe(lora.recipe)
    resolve(attached.recipe)
    fitted.check(strength)
    clone = model.clone()
    rounds: list[dict[str, Any]] = []  # a dictionary holds one patch a parameter; several layers may share one
    for parameter, layers in fitted.table.items():
        rounds += [{} for _ in range(len(layers) - len(rounds))]
        for patches, (layer, is_bias) in zip(rounds, layers, strict=False):
            patches[NETWORK + parameter] = _bias_patch(layer) if is_bias else _weight_patch(layer)
    for patches in rounds:
        clone.add_patches(patches, strength)
    if attached.recipe.causal_attention_form:
        switch_attention_form(clone, lora.name, attached.recipe.causal_attention_form)
    attach(clone, attached)
    if isinstance(model.model, UniPicModel):
        round_times(clone)
    else:  # a UniPicModel's patcher saves its recipe already
        save_with_recipe(clone)
    return clone, fitted.report


def switch_attention_form(model: ModelPatcher, name: str, form: str) -> None:
    """Set a MODEL's attention form to the one that a LoRA was trained for. LoRAError for a network without it."""
    if not isinstance(model.model, UniPicModel):
        raise LoRAError(
            f"{name} was trained for the attention form {form}, which ComfyUI's own Qwen-Image network does not have; "
            "load the model with Load UniPic"
        )
    model.model_options.setdefault("transformer_options", {})[ATTENTION_FORM] = form


def _bias_patch(layer: LoRALayer) -> Any:
    return ("diff", (layer.bias_delta(),))


class LayerPatch(WeightAdapterBase):
    """ComfyUI patch of a layer that does not add to a weight, such as DoRA or OFT.

    weights: alpha, rank-stabilised or not, then name and tensor of each part; ComfyUI may move the tensors.
    """

    name = "unipic"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, layer: LoRALayer) -> LayerPatch:
        return cls(set(), (layer.alpha, layer.rank_stabilised, *chain.from_iterable(layer.parts.items())))

    def calculate_weight(
        self, weight: Tensor, key: str, strength: float, strength_model: float, *_: object, **__: object
    ) -> Tensor:
        """The patched weight, in its dtype."""
        alpha, stabilised, *parts = self.weights
        layer = LoRALayer(dict(zip(parts[::2], parts[1::2], strict=True)), alpha, stabilised)
        return layer.applied(weight.float(), strength).to(weight.dtype)


def _weight_patch(layer: LoRALayer) -> Any:
    """The layer as a patch of ComfyUI's reader, which gets ComfyUI's key names."""
    if not layer.additive:
        return LayerPatch.of(layer)
    parts = {part: tensor for part, tensor in layer.parts.items() if part not in ("diff_b", "up_bias")}
    tensors = {f"layer.{_FACTORS.get(part, part)}": tensor for part, tensor in parts.items()}
    if layer.alpha is not None and layer.rank:
        tensors["layer.alpha"] = torch.tensor(layer.scale * layer.rank, dtype=torch.float64)  # it divides by the rank
    return comfy.lora.load_lora(tensors, {"layer": "layer.weight"})["layer.weight"]


class DistillLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillLoRA",
            display_name="Distill LoRA (UniPic)",
            category=CATEGORY,
            description="Adds a LoRA to the model, together with its recipe: steps, guidance, sampler and attention "
            "form. Reads the key names of all common trainers and shows how many layers matched.",
            search_aliases=["lora", "load lora", "unipic lora", "few step lora", "dmd", "consistency"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Load UniPic. Any other Qwen-Image-Edit model works too, except with a causal LoRA.",
                ),
                io.Combo.Input(
                    "lora",
                    options=lora_names(),
                    tooltip="A file in ComfyUI's models/loras folder, or one that comes with the pack.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Strength of the LoRA. 1 = as trained, 0 = the model without it.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the LoRA and its recipe.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, lora: str) -> bool:
        """Accept names that are not in the list: `execute` knows earlier names and names a missing file."""
        return True

    @classmethod
    def fingerprint_inputs(cls, lora: str | None, **_: object) -> Any:
        return file_state(lora)

    @classmethod
    def execute(cls, model: ModelPatcher, lora: str, strength: float) -> io.NodeOutput:
        check_model(model)
        if strength == 0:
            text = "strength 0: the LoRA is not used"
            tell(cls, text)
            return io.NodeOutput(model, ui=ui.PreviewText(text))
        file = read_lora(lora_path(lora))
        clone, report = add_lora(model, file, strength)
        text = summary(file, report, attachment_of(model).recipe, attachment_of(clone).recipe)
        tell(cls, text, logging.WARNING if report.unmatched else logging.INFO)
        return io.NodeOutput(clone, ui=ui.PreviewText(text))


def summary(lora: LoRA, report: MergeReport, before: Recipe, after: Recipe) -> str:
    """The line on the node: number of matched layers, the others, the settings of a run with the LoRA, and its sizes
    where they change.

    before, after: recipe of the model without and with the LoRA.
    """
    settings = resolve(after)
    origin = "the LoRA's recipe" if lora.recipe else "the LoRA has no recipe, so the model's"
    return f"{matched(lora, report)}; {origin}: {settings}{_new_sizes(before, settings)}"


def matched(lora: LoRA, report: MergeReport) -> str:
    """Number of the LoRA's layers that fit the model, and names of the others."""
    text = f"{report.matched} of {report.matched + len(report.unmatched)} layers of {lora.name} matched"
    if report.unmatched:
        text += f"; not in this model: {', '.join(report.unmatched[:3])}" + ", ..." * (len(report.unmatched) > 3)
    return text


def _new_sizes(before: Recipe, settings: Settings) -> str:
    """Advice for a LoRA that was trained at other sizes than the model; empty if they are the same."""
    sizes = (settings.reference_budget, settings.output_budget)
    if sizes == (before.reference_budget or DEFAULT_BUDGET, before.output_budget or DEFAULT_BUDGET):
        return ""
    return (
        f"; trained for references of {sizes[0]}x{sizes[0]} and pictures of {sizes[1]}x{sizes[1]} pixels: connect this "
        "model to model of Multi-Image Compose too"
    )
