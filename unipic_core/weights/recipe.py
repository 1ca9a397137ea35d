"""The recipe that travels with weights: how they want to be sampled, and how they were made.

Stored as JSON: `recipe.json` in a folder, or under "unipic_recipe" in a safetensors file's metadata. Every value may be
absent; fields that this version does not know are kept and written back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import CheckpointError, UniPicError
from ..model.config import ATTENTION_FORMS, FULL
from .files import PathLike, find_weight_file
from .safetensors_file import read_safetensors

METADATA_KEY = "unipic_recipe"
FILE_NAME = "recipe.json"
RECIPE_FROM = "recipe_from"
"""Key of `made` that says "name" where a recipe is no more than a guess by the weights' name (`released_recipe`)."""

TRANSFORMER_FOLDERS = ("transformer", "ema_transformer")
"""Where a released repository keeps the network, in the order of preference."""

Sampler = Literal["consistency", "euler"]
Schedule = Literal["few_step", "base"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)

LIMITS = {"steps": (1, 1000), "reference_budget": (32, 8192), "output_budget": (32, 8192), "version": (1, 1_000_000)}
"""Least and most of the whole numbers: steps, and sides in pixels."""

MAX_GUIDANCE = 1000.0

_CHOICES = {"sampler": SAMPLERS, "schedule": get_args(Schedule)}


@dataclass(frozen=True)
class Recipe:
    """How weights want to be used. None = not said.

    guidance: scale s of v = u + s (c - u); 1 = no unconditional pass. reference_budget, output_budget: side in pixels
    of the square that all references together, or the output, may fill. attention_form: the one that the weights were
    trained with, see model/attention_forms.py. made: how they were made, free form. extra: fields of newer versions.
    """

    version: int = 1
    steps: int | None = None
    guidance: float | None = None
    sampler: Sampler | None = None
    schedule: Schedule | None = None
    reference_budget: int | None = None
    output_budget: int | None = None
    attention_form: str = FULL
    made: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, source: str | Mapping[str, Any]) -> Recipe:
        """From JSON text or its table. CheckpointError names the field, what was expected and what came."""
        if isinstance(source, str):
            try:
                source = json.loads(source)
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"the recipe is not JSON: {str(error)[:100]}") from error
        if not isinstance(source, Mapping):
            raise CheckpointError(f"a recipe is a table of fields, got {type(source).__name__}")
        known = {f.name for f in fields(cls)} - {"extra"}
        values = {k: _checked(k, v) for k, v in source.items() if k in known and v is not None}
        return cls(**values, extra={k: v for k, v in source.items() if k not in known})

    def to_json(self) -> str:
        """One line of JSON without the fields that say nothing."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        values = {k: v for k, v in values.items() if v is not None and v != {}}
        return json.dumps({**self.extra, **values})

    def merge(self, over: Recipe | None) -> Recipe:
        """This recipe with another's set fields over it, as a LoRA's over its base's.

        `made` keeps both: the base's moves under "base". An attention form other than "full" wins, whoever asks for it.
        """
        if over is None:
            return self
        values = {}
        for name in ("steps", "guidance", "sampler", "schedule", "reference_budget", "output_budget"):
            value = getattr(over, name)
            values[name] = getattr(self, name) if value is None else value
        made = {"base": self.made, **over.made} if self.made and over.made else over.made or self.made
        return Recipe(
            version=max(self.version, over.version),
            attention_form=self.attention_form if over.attention_form == FULL else over.attention_form,
            made=made,
            extra={**self.extra, **over.extra},
            **values,
        )

    @property
    def causal_form(self) -> str | None:
        """The attention form that a network must be switched to; None for the one that every network has.

        UniPicError for a form that this version does not have.
        """
        if self.attention_form not in ATTENTION_FORMS:
            raise UniPicError(
                f"these weights want attention of the form {self.attention_form!r}, which this version does not have; "
                "install a newer version"
            )
        return None if self.attention_form == FULL else self.attention_form

    @classmethod
    def read(cls, path: PathLike, metadata: Mapping[str, str] | None = None) -> Recipe | None:
        """The recipe of a folder or a weight file, None if it has none. CheckpointError if it has one that is wrong.

        metadata: of the weight file, where it is open already and need not be opened again.
        """
        path = Path(path)
        places = [folder / FILE_NAME for folder in _folders(path)]
        if path.is_file():
            places.insert(0, path)
        elif metadata is not None:
            places.append(path)
        else:
            places += [file for folder in _folders(path) if (file := find_weight_file(folder))]
        for place in places:
            try:
                text = metadata.get(METADATA_KEY) if metadata is not None and place == path else _recipe_text(place)
                if text is not None:
                    return cls.from_json(text)
            except (OSError, ValueError) as error:
                raise CheckpointError(str(error) if str(place) in str(error) else f"{place}: {error}") from error
        return None


RELEASED_BASE = Recipe(
    steps=50, guidance=4.0, sampler="euler", schedule="base", reference_budget=1024, output_budget=1024
)
"""Skywork/Unipic3, and any Qwen-Image-Edit weights that say nothing else."""

RELEASED_FEW_STEP = Recipe(
    steps=8, guidance=1.0, sampler="consistency", schedule="few_step", reference_budget=1024, output_budget=1024
)
"""Skywork/Unipic3-Consistency-Model and Skywork/Unipic3-DMD: guidance was distilled in, and 1.0 costs half."""


def released_recipe(path: PathLike) -> Recipe | None:
    """The recipe of the released weights, known by the name of their folder or file; None for other weights.

    A guess: anyone may give a folder that name. A recipe that the weights bring themselves goes before it.
    """
    names = [name.lower().replace("_", "-") for name in _own_names(Path(path).absolute())]
    if any("unipic3-dmd" in n or "unipic3-consistency" in n or n == "ema-transformer" for n in names):
        return RELEASED_FEW_STEP
    if Path(path).is_dir() and not (Path(path) / "transformer").is_dir() and (Path(path) / "ema_transformer").is_dir():
        return RELEASED_FEW_STEP
    return RELEASED_BASE if any("unipic3" in n for n in names) else None


def _own_names(path: Path) -> list[str]:
    """What weights are called: the path's own name, and the repository's where the path is a part of one.

    Parts are the transformer's folder or a file in it, and a snapshot in the Hugging Face cache
    (models--OWNER--NAME/snapshots/HASH).
    """
    names = [path.name]
    for _ in range(2):
        if path.name in TRANSFORMER_FOLDERS or path.parent.name in TRANSFORMER_FOLDERS:
            path = path.parent
            names.append(path.name)
    if path.parent.name == "snapshots":
        names.append(path.parent.parent.name)
    return names


def recipe_of(path: PathLike, metadata: Mapping[str, str] | None = None) -> Recipe:
    """The recipe stored with the weights over the one known by their name; metadata as for `Recipe.read`."""
    return (released_recipe(path) or Recipe()).merge(Recipe.read(path, metadata))


def _folders(path: Path) -> list[Path]:
    """Where a recipe.json may lie for this path, nearest first; beside a file only if a config.json is there too."""
    if path.is_file():
        return [path.parent] if (path.parent / "config.json").is_file() else []
    folders = [path, *(path / name for name in TRANSFORMER_FOLDERS)]
    return [*folders, path.parent] if path.name in TRANSFORMER_FOLDERS else folders


def _recipe_text(place: Path) -> str | None:
    """The JSON in a recipe.json or in a safetensors file's metadata; None where there is none."""
    if place.name == FILE_NAME:
        return place.read_text(encoding="utf-8") if place.is_file() else None
    return read_safetensors(place)[1].get(METADATA_KEY) if place.suffix in (".safetensors", ".sft") else None


def _checked(name: str, value: Any) -> Any:
    """The value of a field, or CheckpointError."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in _CHOICES:
        good, expected = value in _CHOICES[name], " or ".join(map(repr, _CHOICES[name]))
    elif name in LIMITS:
        least, most = LIMITS[name]
        good, expected = (
            number and least <= value <= most and value == int(value),
            f"a whole number from {least} to {most}",
        )
        value = int(value) if good else value
    elif name == "guidance":
        good, expected = number and 0 <= value <= MAX_GUIDANCE, f"a number from 0 to {MAX_GUIDANCE:g}"
        value = float(value) if good else value
    elif name == "made":
        good, expected = isinstance(value, dict), "a table"
    else:
        good, expected = isinstance(value, str) and bool(value), "a text"
    if not good:
        raise CheckpointError(f"the recipe's {name} should be {expected}, got {repr(value)[:60]}")
    return value
