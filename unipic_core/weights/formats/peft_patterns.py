"""Patterns of layer names in peft's adapter settings, read as peft reads them; strangers write them.

Python's `re` takes exponential time on patterns such as (a+)+b or a?a?a?... So only plain ones are understood: names,
classes of characters, a few repeated characters and a few groups, which are never repeated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import LoRAError

MAX_LENGTH = 200
"""Most characters of a pattern, and of a name that is compared with patterns."""

MOST_CHOICES = 3
"""Most groups and repeated characters of a pattern: the time grows with the length of a name to this power."""

_CHARACTER = r"(?:[\w-]|\\?\.|\\d|\\w|\[\^?[\w.-]+\])[*+?]?"
_GROUP = rf"\((?:\?:)?(?:{_CHARACTER}|\|)*\)"
_UNDERSTOOD = re.compile(rf"(?:{_CHARACTER}|{_GROUP}|[|^$])*")


class LayerPatterns:
    """Values by patterns of layer names, as peft's alpha_pattern: a name has the value of the first that matches.

    A pattern matches a name or its end after a dot (`get_pattern_key` of peft). Raises LoRAError for one that is not
    understood.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = [(_compiled(pattern), value) for pattern, value in values.items()]

    def value(self, name: str) -> float | None:
        """Value of the first pattern that matches; None if none does."""
        if len(name) > MAX_LENGTH:
            return None
        return next((value for pattern, value in self._values if pattern.match(name)), None)


def _compiled(pattern: str) -> re.Pattern[str]:
    choices = len(re.findall(r"[*+?(]", pattern.replace("(?:", "(")))
    if len(pattern) > MAX_LENGTH or choices > MOST_CHOICES or not _UNDERSTOOD.fullmatch(pattern):
        raise LoRAError(
            f"the pattern {pattern[:60]!r} is not understood: expected at most {MAX_LENGTH} characters of names and "
            f"classes, with at most {MOST_CHOICES} of *, +, ? and groups"
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise LoRAError(f"the pattern {pattern[:60]!r} is not understood: {error}") from None
