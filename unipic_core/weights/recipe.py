"""Recipe of weights: their sampling settings, and a record of how they were produced.

Stored as JSON: `recipe.json` in a folder, or "unipic_recipe" in a safetensors file's metadata. Every field may be
absent; fields of newer versions are read and written back unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import CheckpointError, UniPicError, one_line
from ..model.config import ATTENTION_FORMS, FULL
from .files import PathLike, find_weight_file
from .formats.json_file import read_json
from .formats.safetensors_file import read_safetensors

METADATA_KEY = "unipic_recipe"
FILE_NAME = "recipe.json"
RECIPE_FROM = "recipe_from"
"""Key of `made` that is "name" in a recipe guessed by the weights' name (`released_recipe`)."""

TRANSFORMER_FOLDERS = ("transformer", "ema_transformer")
"""Folders of a released repository that may hold the network, in order of preference."""

Sampler = Literal["consistency", "euler"]
Schedule = Literal["few_step", "base", "fixed_shift"]
TimeRounding = Literal["release", "none"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
SCHEDULES: tuple[str, ...] = get_args(Schedule)

LIMITS = {"steps": (1, 1000), "reference_budget": (32, 8192), "output_budget": (32, 8192), "version": (1, 1_000_000)}
"""Least and greatest value of the whole numbers; budgets are sides in pixels."""

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
    """Sampling settings of weights. None = not set.

    guidance: scale s of v = u + s (c - u); 1 = no unconditional pass. reference_budget, output_budget: side in pixels
    of the square that all references together, or the output, may fill. shift: time shift of the schedule
    "fixed_shift", the same at every size. time_rounding: "none" for weights that were trained on exact times; with
    "release" and None a network in bfloat16 gets the release's rounded times (`rounded_time`). attention_form: the form
    that the weights were trained with, see model/attention_forms.py. made: record of training, conversion and merges,
    free form. extra: fields of newer versions.
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
        """Parse JSON text or a parsed JSON object. Raises CheckpointError with the field, expected and given value."""
        if isinstance(source, str):
            try:
                source = json.loads(source)
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"the recipe is not JSON ({one_line(error)}); write it again") from error
        if not isinstance(source, Mapping):
            raise CheckpointError(f"a recipe should be a JSON object, got {type(source).__name__}; write it again")
        known = {f.name for f in fields(cls)} - {"extra"}
        values = {k: _checked_value(k, v) for k, v in source.items() if k in known and v is not None}
        return cls(**values, extra={k: v for k, v in source.items() if k not in known})

    def to_json(self) -> str:
        """Serialise to one line of JSON; unset fields are left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        values = {k: v for k, v in values.items() if v is not None and v != {}}
        return json.dumps({**self.extra, **values})

    def merge(self, over: Recipe | None) -> Recipe:
        """Override this recipe, a base's, with the fields that `over`, a LoRA's, sets.

        `made` becomes `over`'s with the base's under "base". An attention form other than "full" in either prevails.
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
        """Attention form to switch the network to; None for full attention, every network's default.

        Raises UniPicError for a form that this version does not have.
        """
        if self.attention_form not in ATTENTION_FORMS:
            raise UniPicError(
                f"expected the attention form {' or '.join(ATTENTION_FORMS)}, got {self.attention_form!r} in the "
                "weights' recipe; install a newer version"
            )
        return None if self.attention_form == FULL else self.attention_form

    @classmethod
    def read(cls, path: PathLike, metadata: Mapping[str, str] | None = None) -> Recipe | None:
        """Read the recipe of a folder or a weight file; None if it has none. Raises CheckpointError for an invalid one.

        metadata: that of the weight file if it is already open, so that it is not opened again.
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
                stored = metadata.get(METADATA_KEY) if metadata is not None and place == path else _stored(place)
                if stored is not None:
                    return cls.from_json(stored)
            except (OSError, ValueError) as error:
                raise CheckpointError(str(error) if str(place) in str(error) else f"{place}: {error}") from error
        return None


RELEASED_BASE = Recipe(
    steps=50, guidance=4.0, sampler="euler", schedule="base", reference_budget=1024, output_budget=1024
)
"""Recipe of Skywork/Unipic3, and the default for weights without a recipe."""

RELEASED_FEW_STEP = Recipe(
    steps=8, guidance=1.0, sampler="consistency", schedule="few_step", reference_budget=1024, output_budget=1024
)
"""Recipe of Skywork/Unipic3-Consistency-Model and Skywork/Unipic3-DMD: guidance is distilled into the weights, so 1.0
needs no unconditional pass."""

STEP_LORA = Recipe(steps=8, guidance=1.0, sampler="euler", schedule="fixed_shift", shift=3.0)
"""Recipe of Lightning and other step LoRAs for Qwen-Image: the schedule that they were distilled with."""

MOST_FEW_STEPS = 16
"""Largest number in a name that counts sampling steps; larger ones are training steps."""

WEIGHT_ENDINGS = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt", ".gguf")

_FEW_STEP_WORD = re.compile(r"dmd|cm|lcm|consistency(model)?")
_STEP_COUNT = re.compile(
    r"(?<![a-z0-9])([0-9]{1,2})steps?(?![a-z0-9])"  # a word of its own
    r"|(?<![0-9])([0-9]{1,2})steps?(?![a-z]|[^a-z0-9]*[0-9])"
    r"|(?<![a-z0-9])([0-9]{1,2})[^a-z0-9]+steps?(?![a-z]|[^a-z0-9]*[0-9])"
)
"""8step, dmd8steps, 8-steps. Not v2-step1000, epoch3-step1200, rank16-steps: that number is of the word before, and a
number after "step" counts training."""
_STEP_FOLDER = re.compile(r"(step|checkpoint)[-_]?\d+")
_NEUTRAL_WORDS = {
    *("diffusion", "pytorch", "model", "models", "transformer", "unet", "dit", "network", "weights", "checkpoint"),
    *("ema", "final", "last", "latest", "of", "qwen", "image", "edit", "scaled", "bf", "fp", "e", "m", "fn", "index"),
    *map(str, range(100)),
    *(f"{n:05d}" for n in range(100)),
}
"""Words of file names that name a file's content or dtype and not its training."""


def released_recipe(path: PathLike) -> Recipe | None:
    """Guess the recipe of released weights by the name of their folder or file; None for other names.

    Anyone may use such a name, so a stored recipe has precedence.
    """
    path = Path(path)
    alone = path.is_dir() and not (path / "transformer").is_dir() and (path / "ema_transformer").is_dir()
    if path.name == "ema_transformer" or alone:
        return RELEASED_FEW_STEP
    names = _candidate_names(path.absolute())
    family = any("unipic" in name for name in names)
    for name in names:
        words = _words(name)
        steps = _counted_steps(name) or (RELEASED_FEW_STEP.steps if _few_step_kind(words) else None)
        if steps and (family or _only_few_step(words)):
            return replace(RELEASED_FEW_STEP, steps=steps)
        if "base" in words and family:
            break
    return RELEASED_BASE if any("unipic3" in _letters(name) for name in names) else None


def step_lora_recipe(path: PathLike) -> Recipe | None:
    """Guess the recipe of a step LoRA without one by its file name; None for other names.

    Step LoRAs such as Qwen-Image-Edit-Lightning-4steps use Euler, a shift of 3 at every size, no stretch, no guidance.
    "lightning" alone may be a picture's subject, so it counts beside "qwen" only.
    """
    name = Path(path).stem.lower()
    words = _words(name)
    steps = _counted_steps(name)
    if _few_step_kind(words) and "unipic" in name:
        known = replace(RELEASED_FEW_STEP, reference_budget=None, output_budget=None)
    elif steps or {"lightning", "qwen"} <= set(words):
        known = STEP_LORA
    else:
        return None
    return replace(known, steps=steps or known.steps, made={RECIPE_FROM: "name"})


def _candidate_names(path: Path) -> list[str]:
    """Names by which weights may be recognised, in lower case: the file's, then its model folder's.

    The model folder counts for a transformer's folder, for a checkpoint step<N> of the release's trainers, and for a
    file whose name has neutral words only; a snapshot in the Hugging Face cache (models--OWNER--NAME/snapshots/HASH)
    counts under its repository's name. Folders farther up do not count.
    """
    names, place = [path.name.lower()], path
    if path.suffix.lower() in WEIGHT_ENDINGS:
        names, place = [path.stem.lower()], path.parent
        if place.name in TRANSFORMER_FOLDERS or set(_words(names[0])) <= _NEUTRAL_WORDS or "unipic" in names[0]:
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
    """Remove all but letters and digits: UniPic-3.0 and unipic_3 then begin with unipic3."""
    return re.sub(r"[^a-z0-9]", "", name)


def _without_model(name: str) -> str:
    """Replace the model's name in a lower-case name by a space: unipic3dmd -> " dmd"."""
    return re.sub(r"unipic[-_. ]*3?(\.0)?(?![0-9])", " ", name)


def _words(name: str) -> list[str]:
    """Split a lower-case name into words and numbers, without the model's name."""
    return re.findall(r"[a-z]+|[0-9]+", _without_model(name))


def _few_step_kind(words: list[str]) -> bool:
    return any(_FEW_STEP_WORD.fullmatch(word) for word in words)


def _counted_steps(name: str) -> int | None:
    """Number of sampling steps in a lower-case name; None if absent or of training steps."""
    counts = (int(match[match.lastindex or 0]) for match in _STEP_COUNT.finditer(_without_model(name)))
    return next((n for n in counts if 1 <= n <= MOST_FEW_STEPS), None)


def _only_few_step(words: list[str]) -> bool:
    """True for a name that is a single few-step word, such as "DMD", the folder of the release's trainer."""
    return len(words) == 1 and _few_step_kind(words)


def recipe_of(path: PathLike, metadata: Mapping[str, str] | None = None) -> Recipe:
    """Recipe of weights: the stored one over the one guessed by their name. metadata: as for `Recipe.read`."""
    return (released_recipe(path) or Recipe()).merge(Recipe.read(path, metadata))


def _folders(path: Path) -> list[Path]:
    """Folders that may hold the recipe.json of a path, nearest first; a file's folder only if it has a config.json."""
    if path.is_file():
        return [path.parent] if (path.parent / "config.json").is_file() else []
    folders = [path, *(path / name for name in TRANSFORMER_FOLDERS)]
    return [*folders, path.parent] if path.name in TRANSFORMER_FOLDERS else folders


def _stored(place: Path) -> Any:
    """Read the table of a recipe.json, or the JSON text in a safetensors file's metadata; None if there is none."""
    if place.name == FILE_NAME:
        return read_json(place) if place.is_file() else None
    return read_safetensors(place)[1].get(METADATA_KEY) if place.suffix in (".safetensors", ".sft") else None


def _checked_value(name: str, value: Any) -> Any:
    """Return the value of a field, numbers in their final type; raise CheckpointError for one out of range."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in _CHOICES:
        valid, expected = value in _CHOICES[name], " or ".join(map(repr, _CHOICES[name]))
    elif name in LIMITS:
        least, most = LIMITS[name]
        valid = number and least <= value <= most and value == int(value)
        expected = f"a whole number from {least} to {most}"
        value = int(value) if valid else value
    elif name == "guidance":
        valid, expected = number and 0 <= value <= MAX_GUIDANCE, f"a number from 0 to {MAX_GUIDANCE:g}"
        value = float(value) if valid else value
    elif name == "shift":
        valid, expected = number and 0 < value <= MAX_SHIFT, f"a number above 0, up to {MAX_SHIFT:g}"
        value = float(value) if valid else value
    elif name == "made":
        valid, expected = isinstance(value, dict), "a JSON object"
    else:
        valid, expected = isinstance(value, str) and bool(value), "a text"
    if not valid:
        raise CheckpointError(f"the recipe's {name} should be {expected}, got {repr(value)[:60]}; write it again")
    return value
