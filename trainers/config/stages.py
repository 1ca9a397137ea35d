"""Stages of one run: each is the config with other values, and goes on from the weights of the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .parse import ConfigError, displayed

FIXED = ("method", "output", "network", "seed", "stages", "stage")
"""Keys that no stage may change."""


def stage_values(data: Mapping[str, object]) -> list[dict[str, Any]]:
    """The plain config of each stage of `data["stages"]`. Raises ConfigError that names the stage."""
    stages = data["stages"]
    if not isinstance(stages, (list, tuple)) or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError(f"stages must be a list of sections of keys and values, got {displayed(stages)}")
    if "steps" in data:
        raise ConfigError("steps belongs into each of stages; remove it beside them")
    common = {k: v for k, v in data.items() if k != "stages"}
    made = [stage_of(common, stage, i) for i, stage in enumerate(stages)]
    names = [values["stage"] for values in made]
    if len(set(names)) < len(names):
        raise ConfigError(f"stages need different names or reference budgets, got {', '.join(names)}")
    check_folders(made)
    return made


def stage_of(common: Mapping[str, Any], stage: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Stage i: `common` with the stage's values over it."""
    if fixed := sorted(set(FIXED) & set(stage)):
        raise ConfigError(f"stages[{i}] cannot change {fixed[0]}; it is the same in all stages")
    if "steps" not in stage:
        raise ConfigError(f"stages[{i}] needs steps")
    values = merged(common, {k: v for k, v in stage.items() if k != "name"})
    data, of_stage = section_of(values, i), section_of(stage, i)
    for key, others in (("sources", ("folder", "path", "kind")), ("folder", ("sources", "alternate"))):
        if key in of_stage:  # one set in place of several, or several in place of one
            data = {k: v for k, v in data.items() if k not in others or k in of_stage}
    name = str(stage.get("name", data.get("reference_budget", i + 1)))
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"stages[{i}].name must be of letters, digits, - and _, got {displayed(name)}")
    return {**values, "data": data, "stage": name, "output": f"{common.get('output')}/stage-{i + 1}-{name}"}


def section_of(stage: Mapping[str, Any], i: int) -> Mapping[str, Any]:
    """The data section of stage i. Raises ConfigError if it is none."""
    data = stage.get("data", {})
    if not isinstance(data, dict):
        raise ConfigError(f"stages[{i}].data must be a section of keys and values, got {displayed(data)}")
    sources = data.get("sources") or ()
    if not isinstance(sources, (list, tuple)) or not all(isinstance(source, dict) for source in sources):
        raise ConfigError(f"stages[{i}].data.sources must be a list of sections, got {displayed(sources)}")
    return data


def merged(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, Any]:
    """Nested tables, with the values of `above` over those of `below`."""
    both = {**below}
    for key, value in above.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def check_folders(stages: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError for stages of different sizes that name one cache."""
    sizes: dict[str, tuple[str, Any]] = {}
    for stage in stages:
        data = stage.get("data", {})
        for source in data.get("sources") or [data]:
            if source.get("kind") == "scenes":  # without a cache
                continue
            folder = source.get("folder")
            size = tuple(source.get(key, data.get(key)) for key in ("size", "reference_budget"))
            name, first = sizes.setdefault(str(folder), (stage["stage"], size))
            if first != size:
                raise ConfigError(
                    f"stage {stage['stage']} needs a cache of its own: {folder} is that of stage {name}, at size and "
                    f"reference_budget {first[0]} and {first[1]}, not {size[0]} and {size[1]}; give it data.folder"
                )
