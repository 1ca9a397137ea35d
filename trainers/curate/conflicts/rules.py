"""Conflict rules of a YAML file: slots with capacities, the slots of each category, and forbidden pairs.

slots are counted once per person (head, feet, hands), scene_slots once per picture (table, background). A category is
drawn into the slots that it `uses`, or into one of the lists of `uses_one_of`; all slots of one list belong to the same
person. A `person: true` category uses slots of that person (one who already holds a prop has no free hands).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unipic_core.conditioning.reference_sizes import MAX_REFERENCES

from ...config.yaml_reader import ConfigError, read_yaml_mapping
from ..errors import CurateError

MOST_SOURCES = MAX_REFERENCES
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]{0,63}$")]
Slots = Annotated[list[Name], Field(min_length=1, max_length=8)]
M = TypeVar("M", bound=BaseModel)
Count = Annotated[int, Field(ge=1, le=MOST_SOURCES)]


class Strict(BaseModel):
    """Base model: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Category(Strict):
    """One category. count: largest number in a picture."""

    uses: Slots | None = None
    uses_one_of: Annotated[list[Slots], Field(min_length=1, max_length=8)] | None = None
    person: bool = False
    count: Count | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Category:
        if self.person and self.uses_one_of:
            raise ValueError("a person's slots are written with uses")
        if not self.person and (self.uses is None) == (self.uses_one_of is None):
            raise ValueError("expected either uses or uses_one_of")
        return self

    @property
    def ways(self) -> list[list[str]]:
        """Alternatives of the category, each a list of slots."""
        return self.uses_one_of or ([self.uses] if self.uses else [[]])


class Requirement(Strict):
    """`category` is drawn only together with the category `with`."""

    category: Name
    beside: Name = Field(alias="with")


class Rules(Strict):
    """All rules of a file. phrases: slot -> phrase of the instruction, with {} for the item."""

    slots: dict[Name, Count]
    scene_slots: dict[Name, Count] = {}
    categories: Annotated[dict[Name, Category], Field(min_length=1, max_length=400)]
    forbid: list[Annotated[list[Name], Field(min_length=2, max_length=2)]] = []
    require: list[Requirement] = []
    persons_min: Annotated[int, Field(ge=0, le=MOST_SOURCES)] = 0
    persons_max: Annotated[int, Field(ge=0, le=MOST_SOURCES)] = MOST_SOURCES
    phrases: dict[Name, Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$", max_length=200)]] = {}

    @model_validator(mode="after")
    def _names(self) -> Rules:
        known = set(self.slots) | set(self.scene_slots)
        _check_known("slot", (slot for c in self.categories.values() for way in c.ways for slot in way), known)
        _check_known("slot of phrases", self.phrases, known)
        pairs = [name for pair in self.forbid for name in pair]
        needed = [name for r in self.require for name in (r.category, r.beside)]
        _check_known("category", (*pairs, *needed), set(self.categories))
        if both := set(self.slots) & set(self.scene_slots):
            raise ValueError(f"the slot {min(both)!r} stands in slots and in scene_slots")
        if self.persons_min > self.persons_max:
            raise ValueError(f"persons_min {self.persons_min} is above persons_max {self.persons_max}")
        return self

    @property
    def forbidden(self) -> frozenset[frozenset[str]]:
        """Forbidden pairs; a set of one for a category that excludes a second one of itself."""
        return frozenset(frozenset(pair) for pair in self.forbid)

    @property
    def person_categories(self) -> list[str]:
        """Categories that bring the slots of a person."""
        return [name for name, category in self.categories.items() if category.person]


def _check_known(role: str, names: Iterable[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"there is no {role} {name!r}; known: {', '.join(sorted(known))}")


def read_rules(path: Path) -> Rules:
    """Read conflict rules from a YAML file. Raises CurateError that names the first fault."""
    try:
        values = read_yaml_mapping(path)
    except ConfigError as error:
        raise CurateError(str(error)) from None
    return validated(Rules, values, str(path))


def validated(model: type[M], values: dict[str, Any], where: str) -> M:
    """Validate values as a model. Raises CurateError, one sentence with the key, the fault and the value."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        fault = first["msg"].removeprefix("Value error, ")
        value = repr(first["input"])
        got = "" if first["type"] == "missing" else f"; got {value if len(value) < 80 else value[:77] + '...'}"
        raise CurateError(f"{where}: {key + ': ' if key else ''}{fault}{got}") from None
