"""Patterns of layer names in peft's adapter settings, matched as peft does but in linear time: strangers write them.

Python's `re` takes exponential time on patterns such as (a+)+b. Here all ways to match are followed at once, character
by character (Thompson's construction).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

from ...errors import LoRAError

MAX_LENGTH = 200
"""Most characters of a pattern, and of a name that is compared with patterns."""

MOST_WORK = 20_000_000
"""Most characters of all names times states of all patterns: seconds at worst."""

_WORD = r"[A-Za-z0-9]+(?:[_-]+[A-Za-z0-9]+)*"
_PLAIN = re.compile(rf"\^?{_WORD}(?:\\?\.{_WORD})*\$?")
_TOKEN = re.compile(r"\(\?:|\\[dDwW]|\\[^A-Za-z0-9]|\[\^?(?:[\w.-]|\\[dw.-])+\]|[\w.()|?*+^$/-]")

_Fragment = Callable[[int], int]
"""Part of a pattern: state after it -> state before it. Called once."""

_END = 0
"""State in which the whole pattern has matched."""


class LayerPatterns:
    """Values by patterns of layer names, as peft's alpha_pattern: a name has the value of the first that matches.

    A pattern matches a name or its end after a dot. A dot between words of a pattern that is a name, as in attn.to_q,
    is a dot alone; peft's is any character. Raises LoRAError for a pattern that is too long or has signs that this
    module does not know, such as {2}.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self._plain: dict[str, tuple[int, float]] = {}
        self._others: list[tuple[int, _Automaton, float]] = []
        for place, (pattern, value) in enumerate(values.items()):
            if len(pattern) > MAX_LENGTH:
                raise LoRAError(f"expected patterns of at most {MAX_LENGTH} characters, got {len(pattern)}")
            if _PLAIN.fullmatch(pattern):
                self._plain.setdefault(pattern.replace("\\.", ".").removesuffix("$"), (place, value))
            else:
                self._others.append((place, _Automaton(pattern), value))
        self._size = sum(automaton.size for _, automaton, _ in self._others)
        self._work = 0

    def value(self, name: str) -> float | None:
        """Value of the first pattern that matches; None if none does. Raises LoRAError past MOST_WORK in all."""
        if len(name) > MAX_LENGTH:
            return None
        self._work += len(name) * self._size
        if self._work > MOST_WORK:
            raise LoRAError("expected fewer patterns for so many layers")
        named = (self._plain[key] for key in ("^" + name, *_ends(name)) if key in self._plain)
        first, value = min(named, default=(None, None))
        for place, automaton, of_pattern in self._others:
            if first is not None and place > first:
                break
            if automaton.matches(name):
                return of_pattern
        return value


def _ends(name: str) -> Iterator[str]:
    """A name and its ends after each dot."""
    yield name
    for match in re.finditer(r"\.", name):
        yield name[match.end() :]


class _Automaton:
    """States of one pattern. A state is left by a character that it takes, or freely to others."""

    def __init__(self, pattern: str) -> None:
        self._takes: list[tuple[Callable[[str], object], int] | None] = [None]
        self._free: list[dict[int, str]] = [{}]
        self._pattern, self._tokens = pattern, list[str]()
        # peft's rule: re.match(rf"(.*\.)?({pattern})$", name)
        before, whole = self._parsed(r"(.*\.)?"), self._parsed(pattern)
        self._start = self._reached(frozenset([before(whole(_END))]), "^")
        self._step = lru_cache(10_000)(self._step_uncached)

    @property
    def size(self) -> int:
        return len(self._takes)

    def matches(self, name: str) -> bool:
        states = self._start
        for character in name:
            states = self._step(states, character)
        return _END in self._reached(states, "$")

    def _step_uncached(self, states: frozenset[int], character: str) -> frozenset[int]:
        taken = (self._takes[state] for state in states)
        return self._reached(frozenset(way[1] for way in taken if way and way[0](character)), "")

    def _reached(self, states: frozenset[int], anchor: str) -> frozenset[int]:
        """States and those that they reach freely. anchor: "^" at the start of a name, "$" at its end, else ""."""
        reached, left = set(states), list(states)
        while left:
            for state, condition in self._free[left.pop()].items():
                if condition in ("", anchor) and state not in reached:
                    reached.add(state)
                    left.append(state)
        return frozenset(reached)

    # --- parsing ---

    def _parsed(self, pattern: str) -> _Fragment:
        tokens, place = [], 0
        while place < len(pattern):
            match = _TOKEN.match(pattern, place)
            if match is None:
                raise self._unknown(pattern[place])
            tokens.append(match[0])
            place = match.end()
        self._tokens = tokens[::-1]
        parsed = self._alternatives()
        if self._tokens:
            raise self._unknown(self._tokens[-1])
        return parsed

    def _unknown(self, sign: str) -> LoRAError:
        return LoRAError(f"the pattern {self._pattern[:60]!r} has {sign!r} where it is not understood")

    def _next_is(self, signs: str) -> bool:
        return bool(self._tokens) and self._tokens[-1] in signs

    def _state(self, free: dict[int, str], takes: tuple[Callable[[str], object], int] | None = None) -> int:
        self._free.append(free)
        self._takes.append(takes)
        return len(self._free) - 1

    def _alternatives(self) -> _Fragment:
        parts = [self._sequence()]
        while self._next_is("|"):
            self._tokens.pop()
            parts.append(self._sequence())
        return lambda then: self._state(dict.fromkeys((part(then) for part in parts), ""))

    def _sequence(self) -> _Fragment:
        parts = []
        while self._tokens and not self._next_is("|)"):
            parts.append(self._repeated())

        def build(then: int) -> int:
            for part in reversed(parts):
                then = part(then)
            return then

        return build

    def _repeated(self) -> _Fragment:
        part = self._atom()
        if not self._next_is("?*+"):
            return part
        sign = self._tokens.pop()
        if self._next_is("?"):  # as few as possible: another order, the same names
            self._tokens.pop()

        def build(then: int) -> int:
            after = self._state({then: ""})
            before = part(after)
            if sign in "*+":
                self._free[after][before] = ""
            return before if sign == "+" else self._state({before: "", then: ""})

        return build

    def _atom(self) -> _Fragment:
        sign = self._tokens.pop()
        if sign in ("(", "(?:"):
            inside = self._alternatives()
            if not self._next_is(")"):
                raise self._unknown(sign)
            self._tokens.pop()
            return inside
        if sign in "^$":
            return lambda then: self._state({then: sign})
        if sign in "?*+":
            raise self._unknown(sign)
        try:
            takes = re.compile(sign).fullmatch
        except re.error:
            raise self._unknown(sign) from None
        return lambda then: self._state({}, (takes, then))
