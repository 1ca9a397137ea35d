"""Boxes by rules, from words that give a numbered picture a place: "image 2 left of image 1", "图2放在图1的右边"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .influence import GRID, Region
from .picture_numbers import mentions

HALF, NEAR, FAR = GRID / 2, GRID * 0.3, GRID * 0.7
LEFT, RIGHT = Region(0, 0, HALF, GRID), Region(HALF, 0, GRID, GRID)
TOP, BOTTOM = Region(0, 0, GRID, HALF), Region(0, HALF, GRID, GRID)
BEHIND, FRONT = Region(0, 0, GRID, FAR), Region(0, NEAR, GRID, GRID)
MIDDLE = Region(GRID / 4, GRID / 4, GRID * 3 / 4, GRID * 3 / 4)

_CLAUSE = re.compile(r"[.,;:!?。，；：！？\n]+")


@dataclass(frozen=True)
class _Rule:
    """Words, the box of the picture that they place, and that of the picture beside which they place it."""

    words: re.Pattern[str]
    placed: Region
    beside: Region | None


def _rule(words: str, placed: Region, beside: Region | None = None) -> _Rule:
    return _Rule(re.compile(words, re.IGNORECASE), placed, beside)


_RULES = (
    _rule(r"\bleft of\b", LEFT, RIGHT),
    _rule(r"\bright of\b", RIGHT, LEFT),
    _rule(r"\b(?:above|on top of|over)\b", TOP, BOTTOM),
    _rule(r"\b(?:below|under|underneath|beneath)\b", BOTTOM, TOP),
    _rule(r"\bin front of\b", FRONT, BEHIND),
    _rule(r"\bbehind\b", BEHIND, FRONT),
    _rule(r"\b(?:on|at|in|to) the left\b(?! of)|\bleft (?:side|half)\b", LEFT),
    _rule(r"\b(?:on|at|in|to) the right\b(?! of)|\bright (?:side|half)\b", RIGHT),
    _rule(r"\b(?:at|in|on) the (?:top\b(?! of)|upper\b)", TOP),
    _rule(r"\b(?:at|in|on) the (?:bottom|lower)\b", BOTTOM),
    _rule(r"\bin the (?:middle|centre|center)\b", MIDDLE),
)
_CHINESE_RULES = (
    _rule("左边|左侧|左方", LEFT, RIGHT),
    _rule("右边|右侧|右方", RIGHT, LEFT),
    _rule("上面|上方|上边", TOP, BOTTOM),
    _rule("下面|下方|下边", BOTTOM, TOP),
    _rule("前面|前方|前边", FRONT, BEHIND),
    _rule("后面|后方|后边", BEHIND, FRONT),
    _rule("中间|中央", MIDDLE),
)


def ruled_regions(prompt: str, count: int) -> dict[int, Region]:
    """Number of a picture, from 1 -> its region, for the pictures that the prompt gives a place.

    count: number of references; others are left out. Several places of one picture are cut with each other.
    """
    regions: dict[int, Region] = {}
    for clause in _CLAUSE.split(prompt):
        for number, region in (*_placed(clause), *_placed_in_chinese(clause)):
            if 1 <= number <= count:
                regions[number] = _cut(regions.get(number, region), region)
    return regions


def _placed(clause: str) -> Iterator[tuple[int, Region]]:
    """English words stand behind the picture that they place, and before the one beside it."""
    named = mentions(clause)
    for rule in _RULES:
        for found in rule.words.finditer(clause):
            before = [number for place, number in named if place < found.start()]
            after = [number for place, number in named if place >= found.end()]
            if rule.beside is None:
                yield from ((number, rule.placed) for number in (before[-1:] or after[:1]))
            elif before and after:
                yield from ((before[-1], rule.placed), (after[0], rule.beside))


def _placed_in_chinese(clause: str) -> Iterator[tuple[int, Region]]:
    """Chinese words stand behind both pictures: the placed one, then the one beside it."""
    named = mentions(clause)
    for rule in _CHINESE_RULES:
        for found in rule.words.finditer(clause):
            before = [number for place, number in named if place < found.start()]
            if len(before) > 1 and rule.beside is not None:
                yield from ((before[-2], rule.placed), (before[-1], rule.beside))
            else:
                yield from ((number, rule.placed) for number in before[-1:])


def _cut(a: Region, b: Region) -> Region:
    """The part that two regions share; the second one where they share none."""
    left, top = max(a.left, b.left), max(a.top, b.top)
    right, bottom = min(a.right, b.right), min(a.bottom, b.bottom)
    return Region(left, top, right, bottom) if left < right and top < bottom else b
