"""Describe a model path from tensor names, shapes and configs; no tensor is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..model.config import FULL
from .files import PathLike, Weights, find_weight_file, open_weights
from .formats.json_file import read_json
from .formats.quantised import FP8
from .hub_cache import model_folder
from .lora import common_targets, read_lora
from .recipe import RECIPE_FROM, Recipe, released_recipe
from .transformer import PARTS, find_transformer, looks_like, read_config

Description = dict[str, Any]
"""JSON object that `describe` returns."""

_KINDS = {
    "a LoRA": "lora",
    "a Qwen-Image transformer": "transformer",
    "a text encoder": "text encoder",
    "a VAE": "vae",
}


def describe(path: PathLike) -> Description:
    """Describe the model at `path` as a JSON object.

    Every description has path and kind ("pipeline", "transformer", "lora", "vae", "text encoder" or "unknown"). Weights
    add format, tensors, parameters, bytes, dtypes (dtype -> parameters of it), recipe (an object or None) and
    recipe_source ("file", "name" or None); transformers add their sizes; a LoRA adds ranks, layers and targets; a
    pipeline folder adds `parts`, each a description or None if missing. Raises CheckpointError if nothing is readable.
    """
    path = model_folder(path)
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {path}; check the path")
    if path.is_dir() and _is_pipeline(path):
        return _describe_pipeline(path)
    if path.is_dir() and not find_weight_file(path):
        path = find_transformer(path)
    return _describe_weights(path)


def _is_pipeline(folder: Path) -> bool:
    if (folder / "model_index.json").is_file():
        return True
    return sum(_part(folder, names) is not None for names in PARTS.values()) >= 2


def _part(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir() and any((folder / name).iterdir())), None)


def _describe_pipeline(folder: Path) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for part, names in PARTS.items():
        subfolder = _part(folder, names)
        if subfolder is None:
            parts[part] = None
        elif part in ("transformer", "vae", "text_encoder"):
            parts[part] = _describe_weights(subfolder)
        else:
            parts[part] = {"path": str(subfolder), "kind": part}
    weights = [p for p in parts.values() if p and "bytes" in p]
    return {
        "path": str(folder),
        "kind": "pipeline",
        "parts": parts,
        "missing": [name for name, part in parts.items() if part is None],
        "parameters": sum(p["parameters"] for p in weights),
        "bytes": sum(p["bytes"] for p in weights),
        **_recipe(folder),
    }


def _describe_weights(path: Path) -> dict[str, Any]:
    weights = open_weights(path)
    looks = looks_like(weights.shapes())
    kind = _KINDS.get(looks, "unknown")
    dtypes: Counter[str] = Counter()
    for name in weights:
        dtypes[str(weights.dtype(name)).removeprefix("torch.")] += weights.count(name)
    info = {
        "path": str(path),
        "kind": kind,
        "looks_like": looks,
        "format": _format(path),
        "tensors": len(weights),
        "parameters": sum(dtypes.values()),
        "bytes": weights.nbytes,
        "dtypes": dict(dtypes.most_common()),
    }
    if kind == "transformer":
        info |= _sizes(path, weights.bare()) | _recipe(path)
    elif kind == "lora":
        info |= _lora(path)
    elif (path / "config.json").is_file():
        info["class"] = _class(path / "config.json")
    return info


def _sizes(path: Path, weights: Weights) -> dict[str, Any]:
    config = read_config(path, weights)
    return {
        "layers": config.num_layers,
        "width": config.width,
        "heads": config.num_attention_heads,
        "head_dim": config.attention_head_dim,
        "text_dim": config.joint_attention_dim,
        "channels": config.in_channels,
        "zero_cond_t": config.zero_cond_t,
        "attention_form": config.attention_form,
        "scaled_fp8": any(weights.dtype(name) in FP8 for name in weights),
    }


def _lora(path: Path) -> dict[str, Any]:
    lora = read_lora(path, mapped=True)
    recipe = json.loads(lora.recipe.to_json()) if lora.recipe else None
    return {
        "layers": len(lora.layers),
        "ranks": list(lora.ranks),
        "alphas": sorted({layer.alpha for layer in lora.layers.values() if layer.alpha is not None}),
        "targets": common_targets(lora),
        "unread": list(lora.unread),
        "recipe": recipe,
        "recipe_source": _source(lora.recipe) if lora.recipe else None,
    }


def _recipe(path: Path) -> dict[str, Any]:
    recipe = Recipe.read(path)
    source = _source(recipe) if recipe else "name"
    recipe = recipe or released_recipe(path)
    return {"recipe": json.loads(recipe.to_json()) if recipe else None, "recipe_source": source if recipe else None}


def _source(recipe: Recipe) -> str:
    """Source of a recipe: "name" if it was guessed by the weights' name, else "file"."""
    return "name" if recipe.made.get(RECIPE_FROM) == "name" else "file"


def _format(path: Path) -> str:
    file = find_weight_file(path) if path.is_dir() else path
    name = file.name if file else ""
    sort = "safetensors" if ".safetensors" in name or name.endswith(".sft") else "pickle"
    return f"{sort}, in shards" if name.endswith(".index.json") else sort


def _class(config: Path) -> str | None:
    """Name of a class in diffusers' or transformers' config.json; None if it is not readable or names none."""
    try:
        content = read_json(config)
    except CheckpointError:
        return None
    content = content if isinstance(content, dict) else {}
    architectures = content.get("architectures")
    names = [content.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    return next((name for name in names if name and isinstance(name, str)), None)


def format_description(info: Description) -> str:
    """Format the result of `describe` as a few lines of text."""
    lines = [f"{info['path']}: {_title(info)}"]
    if info["kind"] == "pipeline":
        for name, part in info["parts"].items():
            lines.append(f"  {name:<13} {_summary(part) if part else 'MISSING'}")
        lines.append(f"  in all        {_count(info['parameters'])} parameters, {_size(info['bytes'])}")
    else:
        lines.append(f"  {_summary(info)}")
    if info["kind"] == "lora":
        lines.append(f"  layers        {', '.join(f'{n} x {name}' for name, n in info['targets'].items())}")
    if "recipe" in info:
        lines.append(f"  recipe        {_recipe_line(info)}")
    return "\n".join(lines)


def _title(info: Description) -> str:
    titles = {"pipeline": "a pipeline folder", "transformer": "a UniPic transformer (Qwen-Image architecture)"}
    return titles.get(info["kind"]) or str(info.get("looks_like", info["kind"]))


def _summary(part: Description) -> str:
    if "parameters" not in part:
        return "present"
    dtypes = " + ".join(part["dtypes"])
    items = [f"{_count(part['parameters'])} parameters", dtypes, _size(part["bytes"]), part["format"]]
    if part["kind"] == "transformer":
        items.insert(0, f"{part['layers']} layers, width {part['width']}, {part['heads']} heads of {part['head_dim']}")
        if part["attention_form"] != FULL:
            items.append(f"attention {part['attention_form']}")
    if part["kind"] == "unknown":
        items.insert(0, part["looks_like"])
    if part["kind"] == "lora":
        numbers = f"rank {', '.join(map(str, part['ranks'])) or 'none'}"
        if part["alphas"]:
            numbers += f", alpha {', '.join(f'{alpha:g}' for alpha in part['alphas'])}"
        items.insert(0, f"{part['layers']} layers, {numbers}")
    return ", ".join(items)


def _recipe_line(info: Description) -> str:
    recipe = info["recipe"]
    if recipe is None:
        return "none in the file"
    skipped = ("version", "made", "attention_form")
    settings = ", ".join(f"{name} {value}" for name, value in recipe.items() if name not in skipped)
    if recipe.get("attention_form", FULL) != FULL:
        settings += f", attention {recipe['attention_form']}"
    return (settings or "without settings") + (
        " (known by the name of the folder or file)" if info["recipe_source"] == "name" else ""
    )


def _count(number: int) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"


def _size(number: int) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
