"""Picture numbers in a prompt, such as "image 2" or "the second photo", compared with the references given."""

from __future__ import annotations

import re
from collections.abc import Iterator

PICTURE_WORD = r"(?:image|picture|photo|pic|img|reference|ref)"
"""Regular expression of the words for a picture."""

_N = r"\d{1,4}(?!\d)"
"""A number; those of more digits name no picture."""

_JOIN = r"\s*(?:,\s*and|,\s*or|,|&|\+|and|or|with|to|through|[-–])\s*"
_AFTER = r"(?=\s*(?:[.,;:!?)\"']|$))"

_NUMBERED = re.compile(rf"\b{PICTURE_WORD}[\s_#-]*(?:no\.?\s*)?({_N}(?:{_JOIN}{_N}{_AFTER})?)\b", re.IGNORECASE)
"""image 1, Image_2, photo #3; "image 1 and 2", except before a noun as in "image 1 and 2 dogs"."""
_LISTED = re.compile(rf"\b{PICTURE_WORD}s[\s_#-]*({_N}(?:{_JOIN}{_N})*)\b", re.IGNORECASE)
"""images 1, 2 and 3; pictures 1-3."""
_RANGE = re.compile(r"(\d+)\s*(?:to|through|[-–])\s*(\d+)", re.IGNORECASE)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_ORDINAL = re.compile(
    rf"\b({'|'.join(_ORDINALS)}|last|{_N}(?:st|nd|rd|th))\s+(?:reference\s+|input\s+|given\s+)?{PICTURE_WORD}\b",
    re.IGNORECASE,
)
_ALL = re.compile(
    rf"\b(?:both|all|each|every)\s+(?:of\s+)?(?:the\s+|these\s+)?(?:\w+\s+)?{PICTURE_WORD}s?\b", re.IGNORECASE
)
_DIGITS = "零一二三四五六七八九"
_CHINESE = re.compile(rf"(?:图片|图像|照片|图)\s*({_N}|[{_DIGITS}])|第\s*({_N}|[{_DIGITS}])\s*[张幅个]")
_CHINESE_ALL = re.compile(r"(?:所有|全部|两|每)张?(?:的)?(?:图|照片)")
_MOST = 99
"""Largest picture number; larger ones are years or sizes."""


def named_pictures(prompt: str, count: int) -> set[int]:
    """Extract the picture numbers from an English or Chinese prompt. count: number of references."""
    named: set[int] = set()
    for numbers in (*_NUMBERED.findall(prompt), *_LISTED.findall(prompt)):
        for first, last in _RANGE.findall(numbers):
            named |= set(range(int(first), min(int(last), _MOST) + 1))
        named |= {int(number) for number in re.findall(r"\d+", numbers)}
    for word in map(str.lower, _ORDINAL.findall(prompt)):
        named.add(count if word == "last" else _ordinal(word))
    for digits in ("".join(groups) for groups in _CHINESE.findall(prompt)):
        named.add(_DIGITS.index(digits) if digits in _DIGITS else int(digits))
    if _ALL.search(prompt) or _CHINESE_ALL.search(prompt):
        named |= set(range(1, count + 1))
    return {number for number in named if number <= _MOST}


def mentions(text: str) -> list[tuple[int, int]]:
    """(place in the text, number) of each picture named by a number, in order; of "images 1 and 2" the first."""
    found = [(match.start(), match[1]) for match in _NUMBERED.finditer(text)]
    found += [(match.start(), match[1] or match[2]) for match in _CHINESE.finditer(text)]
    return sorted((place, _number(digits)) for place, digits in found)


def _number(digits: str) -> int:
    """Number that begins a text, in digits or as one Chinese numeral."""
    leading = re.match(r"\d+", digits)
    return int(leading[0]) if leading else _DIGITS.index(digits[0])


def _ordinal(word: str) -> int:
    return _ORDINALS.index(word) + 1 if word in _ORDINALS else int(word[:-2])


def number_cautions(prompt: str, count: int) -> Iterator[str]:
    """Warn of numbers in the prompt without a reference, and of references that a prompt with numbers leaves out.

    count: number of references.
    """
    named = named_pictures(prompt, count)
    absent = sorted(named - set(range(1, count + 1)))
    if absent:
        present = {0: "there is no picture", 1: "there is one picture"}.get(count, f"there are {count} pictures")
        yield f"the prompt names {_listed(absent)}, and {present}"
    unnamed = sorted(set(range(1, count + 1)) - named)
    if named and unnamed:
        yield f"the prompt never names {_listed(unnamed)}"


def _listed(numbers: list[int]) -> str:
    return " and ".join(f"image {number}" for number in numbers)
