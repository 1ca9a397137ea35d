"""The recipe that travels with weights: how they want to be sampled, and how they were made.

Stored as JSON: `recipe.json` in a folder, or under "unipic_recipe" in a safetensors file's metadata. Every value may be
absent; fields that this version does not know are kept and written back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import CheckpointError, UniPicError
from ..model.config import ATTENTION_FORMS, FULL
from .files import PathLike, find_weight_file
from .formats.safetensors_file import read_safetensors

METADATA_KEY = "unipic_recipe"
FILE_NAME = "recipe.json"
RECIPE_FROM = "recipe_from"
"""Key of `made` that says "name" where a recipe is no more than a guess by the weights' name (`released_recipe`)."""

TRANSFORMER_FOLDERS = ("transformer", "ema_transformer")
"""Where a released repository keeps the network, in the order of preference."""

Sampler = Literal["consistency", "euler"]
Schedule = Literal["few_step", "base", "fixed_shift"]
TimeRounding = Literal["release", "none"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
SCHEDULES: tuple[str, ...] = get_args(Schedule)

LIMITS = {"steps": (1, 1000), "reference_budget": (32, 8192), "output_budget": (32, 8192), "version": (1, 1_000_000)}
"""Least and most of the whole numbers: steps, and sides in pixels."""

MAX_GUIDANCE = 1000.0
MAX_SHIFT = 100.0

_CHOICES = {"sampler": SAMPLERS, "schedule": SCHEDULES, "time_rounding": get_args(TimeRounding)}


_MERGED = (
    *("steps", "guidance", "sampler", "schedule", "reference_budget", "output_budget", "shift"),
    "time_rounding",
)
"""Fields of which a LoRA's recipe replaces those that it sets."""


@dataclass(frozen=True)
class Recipe:
    """How weights want to be used. None = not said.

    guidance: scale s of v = u + s (c - u); 1 = no unconditional pass. reference_budget, output_budget: side in pixels
    of the square that all references together, or the output, may fill. shift: of the schedule "fixed_shift", the
    same at every size. time_rounding: "none" for weights that were trained on exact times; "release", and None, feed a
    network in bfloat16 times that are rounded as the release rounds them (`rounded_time`). attention_form: the one that
    the weights were trained with, see model/attention_forms.py. made: how they were made, free form. extra: fields of
    newer versions.
    """

    version: int = 1
    steps: int | None = None
    guidance: float | None = None
    sampler: Sampler | None = None
    schedule: Schedule | None = None
    reference_budget: int | None = None
    output_budget: int | None = None
    shift: float | None = None
    time_rounding: TimeRounding | None = None
    attention_form: str = FULL
    made: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, source: str | Mapping[str, object]) -> Recipe:
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
        for name in _MERGED:
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
    def causal_attention_form(self) -> str | None:
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

STEP_LORA = Recipe(steps=8, guidance=1.0, sampler="euler", schedule="fixed_shift", shift=3.0)
"""Lightning and other step LoRAs for Qwen-Image: the schedule that they were distilled with."""

MOST_FEW_STEPS = 16
"""Numbers of steps in a name above this are those of a training."""

WEIGHT_ENDINGS = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt", ".gguf")

_FEW_STEP_WORD = re.compile(r"dmd|cm|lcm|consistency(model)?")
_STEP_FOLDER = re.compile(r"(step|checkpoint)[-_]?\d+")
_PLAIN_WORDS = {
    *("diffusion", "pytorch", "model", "models", "transformer", "unet", "dit", "network", "weights", "checkpoint"),
    *("ema", "final", "last", "latest", "of", "qwen", "image", "edit", "scaled", "bf", "fp", "e", "m", "fn", "index"),
    *map(str, range(100)),
    *(f"{n:05d}" for n in range(100)),
}
"""Words of file names that say what a file holds, and nothing of how it was trained."""


def released_recipe(path: PathLike) -> Recipe | None:
    """The recipe of the released weights, known by the name of their folder or file; None for other weights.

    A guess: anyone may give a folder that name. A recipe that the weights bring themselves goes before it.
    """
    path = Path(path)
    alone = path.is_dir() and not (path / "transformer").is_dir() and (path / "ema_transformer").is_dir()
    if path.name == "ema_transformer" or alone:
        return RELEASED_FEW_STEP
    names = _own_names(path.absolute())
    family = any("unipic" in name for name in names)
    for name in names:
        words = _words(name)
        few = _few_step_count(words)
        if few and (family or _only_few_step(words)):
            return replace(RELEASED_FEW_STEP, steps=few)
        if "base" in words and family:
            break
    return RELEASED_BASE if any("unipic3" in _letters(name) for name in names) else None


def step_lora_recipe(path: PathLike) -> Recipe | None:
    """How a LoRA wants to be sampled that brings no recipe and whose file name tells; None where it tells nothing.

    Step LoRAs such as Qwen-Image-Edit-Lightning-4steps: Euler, a shift of 3 at every size, no stretch, no guidance.
    """
    name = Path(path).stem.lower()
    words = _words(name)
    steps = _counted_steps(words)
    if _few_step_kind(words) and "unipic" in name:
        known = replace(RELEASED_FEW_STEP, reference_budget=None, output_budget=None)
    elif steps or "lightning" in words:
        known = STEP_LORA
    else:
        return None
    return replace(known, steps=steps or known.steps, made={RECIPE_FROM: "name"})


def _own_names(path: Path) -> list[str]:
    """What weights are called, in small letters: the file's own name, and its model folder's.

    The model folder is that of a transformer's folder, of a checkpoint step<N> of the release's trainers, and of a file
    whose own name says no more than what it holds; a snapshot in the Hugging Face cache has its repository's name
    (models--OWNER--NAME/snapshots/HASH). Folders farther up have no say.
    """
    names, place = [path.name.lower()], path
    if path.suffix.lower() in WEIGHT_ENDINGS:
        names, place = [path.stem.lower()], path.parent
        if place.name in TRANSFORMER_FOLDERS or set(_words(names[0])) <= _PLAIN_WORDS or "unipic" in names[0]:
            folder = place.name.lower()
            if place.name in TRANSFORMER_FOLDERS or _STEP_FOLDER.fullmatch(folder) or "unipic" in folder:
                names.append(folder)
    for _ in range(3):
        if place.name in TRANSFORMER_FOLDERS or _STEP_FOLDER.fullmatch(place.name.lower()):
            place = place.parent
            names.append(place.name.lower())
    if place.parent.name == "snapshots":
        names.append(place.parent.parent.name.lower())
    return names


def _letters(name: str) -> str:
    """A name without what stands between its words: UniPic-3.0 and unipic_3 begin with unipic3."""
    return re.sub(r"[^a-z0-9]", "", name)


def _words(name: str) -> list[str]:
    """Words and numbers of a name in small letters, without the model's own: unipic3dmd -> dmd."""
    name = re.sub(r"unipic[-_. ]*3?(\.0)?(?![0-9])", " ", name)
    return re.findall(r"[a-z]+|[0-9]+", name)


def _few_step_kind(words: list[str]) -> bool:
    return any(_FEW_STEP_WORD.fullmatch(word) for word in words)


def _counted_steps(words: list[str]) -> int | None:
    """8 of "8step", "8 steps"; numbers of training steps are none."""
    pairs = pairwise(words)
    counts = (int(n) for n, word in pairs if word in ("step", "steps") and n.isdecimal() and len(n) < 3)
    return next((n for n in counts if 1 <= n <= MOST_FEW_STEPS), None)


def _few_step_count(words: list[str]) -> int | None:
    """The steps of few-step weights by the words of their name; None if these say nothing of few steps."""
    return _counted_steps(words) or (RELEASED_FEW_STEP.steps if _few_step_kind(words) else None)


def _only_few_step(words: list[str]) -> bool:
    """Whether a folder is called "DMD" and no more, as the release's trainers call theirs."""
    return len(words) == 1 and _few_step_kind(words)


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
    elif name == "shift":
        good, expected = number and 0 < value <= MAX_SHIFT, f"a number above 0, up to {MAX_SHIFT:g}"
        value = float(value) if good else value
    elif name == "made":
        good, expected = isinstance(value, dict), "a table"
    else:
        good, expected = isinstance(value, str) and bool(value), "a text"
    if not good:
        raise CheckpointError(f"the recipe's {name} should be {expected}, got {repr(value)[:60]}")
    return value
