"""Category x category matrix of a rules file as text and picture, and the share of allowed sets."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .rules import MOST_SOURCES, Rules
from .solve import solve

CELL, LEFT, TOP = 18, 170, 150
FREE, BLOCKED = (112, 182, 128), (214, 96, 88)


def pair_reason(rules: Rules, one: str, other: str) -> str:
    """Reason why two categories cannot share a picture, or ""; persons and required categories may be added."""
    pair = [one, other]
    for needed in rules.require:
        if needed.category in pair and needed.beside not in pair:
            pair.append(needed.beside)
    persons = rules.person_categories
    present = sum(rules.categories[name].person for name in pair)
    reasons = []
    for added in (0, *range(1, rules.persons_max - present + 1)):
        for person in persons or [""]:
            sources = pair + [person] * added
            if len(sources) > MOST_SOURCES:
                continue
            solution = solve(rules, sources)
            if solution.possible:
                return ""
            reasons.append(", ".join(solution.broken))
        if not persons:
            break
    always = reasons[0].startswith(("forbid", "count"))  # whatever is added
    return reasons[0] if always else reasons[-1]


def conflict_matrix(rules: Rules) -> dict[tuple[str, str], str]:
    """Map (category, category) to a reason, "" if they can share a picture; symmetric."""
    names = list(rules.categories)
    matrix = {}
    for i, one in enumerate(names):
        for other in names[: i + 1]:
            matrix[one, other] = matrix[other, one] = pair_reason(rules, one, other)
    return matrix


def reachable_share(rules: Rules, count: int, seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """Share of random sets of `count` sources with each category that the rules allow; 0: a starved category."""
    names = list(rules.categories)
    rng = np.random.default_rng([seed, count])
    drawn, allowed = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for draw in range(draws):
        chosen = [names[draw % len(names)], *(names[i] for i in rng.integers(len(names), size=count - 1))]
        drawn[chosen[0]] += 1
        allowed[chosen[0]] += solve(rules, chosen).possible
    return {name: allowed[name] / drawn[name] if drawn[name] else 0.0 for name in names}


def describe(rules: Rules) -> str:
    """Text: the matrix ("x": never together), the reasons, and the share of allowed sets per category."""
    names, matrix = list(rules.categories), conflict_matrix(rules)
    wide = max(len(name) for name in names) + 4
    lines = [" " * wide + " ".join(f"{i + 1:>2}" for i in range(len(names)))]
    for i, one in enumerate(names):
        cells = " ".join(" x" if matrix[one, other] else " ." for other in names)
        lines.append(f"{i + 1:>2} {one}".ljust(wide) + cells)
    reasons = sorted(
        {f"{one} + {other}: {reason}" for (one, other), reason in matrix.items() if reason and one <= other}
    )
    free = sum(not reason for reason in matrix.values()) / len(matrix)
    lines += ["", f"{free:.0%} of the pairs can be drawn", *reasons, "", "share of random sets that the rules allow:"]
    shares = [reachable_share(rules, count) for count in range(2, MOST_SOURCES + 1)]
    lines.append(" " * wide + " ".join(f"{count:>5}" for count in range(2, MOST_SOURCES + 1)))
    for name in names:
        starved = "" if any(share[name] for share in shares) else "  starved: no set with it was possible"
        lines.append(name.ljust(wide) + " ".join(f"{share[name]:5.0%}" for share in shares) + starved)
    return "\n".join(lines)


def draw_matrix(rules: Rules) -> Image.Image:
    """Draw the matrix: green cells can share a picture, red ones cannot."""
    names, matrix = list(rules.categories), conflict_matrix(rules)
    side = CELL * len(names)
    sheet = Image.new("RGB", (LEFT + side + 8, TOP + side + 8), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, one in enumerate(names):
        label = Image.new("RGB", (TOP - 6, CELL), "white")
        ImageDraw.Draw(label).text((0, 2), one[:22], fill="black", font=font)
        sheet.paste(label.rotate(90, expand=True), (LEFT + i * CELL, 0))
        pen.text((4, TOP + i * CELL + 2), one[:26], fill="black", font=font)
        for j, other in enumerate(names):
            box = (LEFT + j * CELL, TOP + i * CELL, LEFT + (j + 1) * CELL - 2, TOP + (i + 1) * CELL - 2)
            pen.rectangle(box, fill=BLOCKED if matrix[one, other] else FREE)
    return sheet
