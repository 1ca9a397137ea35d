"""Assignment of sources to slots: an exact search over the sources of one picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import CurateError
from .rules import MOST_SOURCES, Rules


@dataclass(frozen=True)
class Seat:
    """Slots of one source, and the person (index of the source) whose slots they are; None: the scene's."""

    slots: tuple[str, ...]
    person: int | None = None


@dataclass(frozen=True)
class Solution:
    """One seat per source, or the rules that forbid the picture (`broken`)."""

    seats: tuple[Seat, ...] = ()
    broken: tuple[str, ...] = ()

    @property
    def possible(self) -> bool:
        """True if no rule forbids the picture."""
        return not self.broken


def solve(rules: Rules, categories: Sequence[str], turn: int = 0) -> Solution:
    """Assign 1 to 6 sources to slots. Exact: if any assignment exists, one is returned.

    turn: rotates the order in which alternatives are tried, so that a mug is not always in the left hand. Raises
    CurateError for an unknown category or more than six sources.
    """
    if not 1 <= len(categories) <= MOST_SOURCES:
        raise CurateError(f"expected 1 to {MOST_SOURCES} sources, got {len(categories)}")
    for name in categories:
        if name not in rules.categories:
            raise CurateError(f"there is no category {name!r}; known: {', '.join(sorted(rules.categories))}")
    if broken := (*_pair_rules(rules, categories), *_count_rules(rules, categories)):
        return Solution(broken=broken)
    seats = _search(rules, categories, turn, None)
    return Solution(seats=seats) if seats else Solution(broken=_lacking(rules, categories))


def _pair_rules(rules: Rules, categories: Sequence[str]) -> Iterator[str]:
    for i, one in enumerate(categories):
        for other in categories[:i]:
            if frozenset((one, other)) in rules.forbidden:
                yield f"forbid {' + '.join(sorted((one, other)))}"
    for needed in rules.require:
        if needed.category in categories and needed.beside not in categories:
            yield f"require {needed.category} with {needed.beside}"


def _count_rules(rules: Rules, categories: Sequence[str]) -> Iterator[str]:
    for name, number in Counter(categories).items():
        most = rules.categories[name].count
        if most is not None and number > most:
            yield f"count {name} {most}"
    persons = sum(rules.categories[name].person for name in categories)
    if persons > rules.persons_max:
        yield f"persons_max {rules.persons_max}"
    if persons < rules.persons_min:
        yield f"persons_min {rules.persons_min}"


Place = tuple[int | None, str]
"""A slot of one person (by source index), or of the scene (None)."""


def _search(rules: Rules, categories: Sequence[str], turn: int, unlimited: str | None) -> tuple[Seat, ...] | None:
    """Backtracking over the sources, persons first; `unlimited` names a slot whose capacity is ignored."""
    persons = [i for i, name in enumerate(categories) if rules.categories[name].person]
    order = persons + [i for i in range(len(categories)) if i not in persons]
    taken: Counter[Place] = Counter()
    seats: dict[int, Seat] = {}

    def fits(place: Place) -> bool:
        person, slot = place
        capacity = rules.scene_slots[slot] if person is None else rules.slots[slot]
        return slot == unlimited or taken[place] < capacity

    def seat(at: int) -> bool:
        if at == len(order):
            return True
        source = order[at]
        options = list(_options(rules, categories[source], source, persons))
        start = turn % len(options) if options else 0
        for slots, person in options[start:] + options[:start]:
            places = [(None if slot in rules.scene_slots else person, slot) for slot in slots]
            if not all(fits(place) for place in places) or len(set(places)) < len(places):
                continue
            taken.update(places)
            seats[source] = Seat(tuple(slots), person)
            if seat(at + 1):
                return True
            taken.subtract(places)
        return False

    return tuple(seats[i] for i in range(len(categories))) if seat(0) else None


def _options(rules: Rules, name: str, source: int, persons: Sequence[int]) -> Iterator[tuple[list[str], int | None]]:
    """Yield the (slots, person) that a source can take."""
    category = rules.categories[name]
    for way in category.ways:
        if category.person:
            yield way, source
        elif any(slot in rules.slots for slot in way):
            yield from ((way, person) for person in persons)
        else:
            yield way, None


def _lacking(rules: Rules, categories: Sequence[str]) -> tuple[str, ...]:
    """Slots that would make the picture possible if their capacity were unlimited."""
    names = [*rules.slots, *rules.scene_slots]
    alone = tuple(f"slot {name}" for name in names if _search(rules, categories, 0, name))
    persons = any(rules.categories[name].person for name in categories)
    return alone or (("slots together",) if persons else ("no person whose slots they could take",))
