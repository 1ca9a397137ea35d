"""Template instruction of one picture: every source by its number, with the phrase of its slot."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import CurateError
from .rules import Rules
from .solve import Seat

FRAMES = ("Show {}.", "Create a picture of {}.", "Compose {}.", "Make one picture with {}.", "I want to see {}.")


def instruction(
    rules: Rules, categories: Sequence[str], seats: Sequence[Seat], names: Sequence[str] = (), frame: str = FRAMES[0]
) -> str:
    """Write an instruction such as "Show the person from image 1 wearing the hat from image 2."

    An item follows the person whose slot it takes; items of the scene follow all persons. names: nouns of the sources
    (default: their categories); frame: of FRAMES. Raises CurateError without a seat for each source.
    """
    if not seats or len(seats) != len(categories):
        raise CurateError(f"expected one seat for each of {len(categories)} sources, got {len(seats)}")
    nouns = [f"the {name} from image {i}" for i, name in enumerate(names or categories, 1)]
    persons = [i for i, name in enumerate(categories) if rules.categories[name].person]
    other = "with {}" if persons else "{}"
    phrased = [rules.phrases.get(seat.slots[0], other) if seat.slots else "{}" for seat in seats]
    groups = []
    for person in persons:
        things = [phrased[i].format(nouns[i]) for i, seat in enumerate(seats) if seat.person == person and i != person]
        groups.append(" ".join([nouns[person], " and ".join(things)]).strip())
    scene = [phrased[i].format(nouns[i]) for i, seat in enumerate(seats) if seat.person is None]
    return frame.format(", ".join([*([" and ".join(groups)] if groups else []), *scene]))
