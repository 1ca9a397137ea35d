"""Single-token answers from log-probabilities: P(yes), and the expected digit.

The judge's uncertainty becomes part of the score, so near-equal pictures are not tied (as in Flow-Factory's judges).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .question import TokenChoice

MIN_MASS = 0.5
"""Smallest probability of the allowed answers in total; below it the text is parsed instead."""


def after_thinking(tokens: Sequence[TokenChoice]) -> Sequence[TokenChoice]:
    """Tokens after a thinking model's reasoning; all of them without any."""
    for index in range(len(tokens) - 1, -1, -1):
        if "</think" in tokens[index].token or tokens[index].token.strip() == "think>":
            return tokens[index + 1 :]
    return tokens


def answer_probabilities(tokens: Sequence[TokenChoice], answers: Sequence[str]) -> dict[str, float] | None:
    """Normalised probabilities of the answers at the first generated one; None if unclear."""
    for choice in after_thinking(tokens):
        if _word(choice.token) not in answers:
            continue
        mass = dict.fromkeys(answers, 0.0)
        for token, logprob in choice.alternatives.items():
            word = _word(token)
            if word in mass:
                mass[word] += math.exp(min(logprob, 0.0))
        total = sum(mass.values())
        return {word: share / total for word, share in mass.items()} if total >= MIN_MASS else None
    return None


def _word(token: str) -> str:
    return token.strip(" \t\r\n\"'.*Ġ▁").lower()


def yes_probability(tokens: Sequence[TokenChoice]) -> float | None:
    """P(yes) / (P(yes) + P(no)), or None."""
    probabilities = answer_probabilities(tokens, ("yes", "no"))
    return None if probabilities is None else probabilities["yes"]


def expected_digit(tokens: Sequence[TokenChoice], low: int = 0, high: int = 9) -> float | None:
    """Mean of the digits low..high under their probabilities, or None. Raises ValueError for more than one digit."""
    if not 0 <= low < high <= 9:
        raise ValueError(f"digits must be in 0..9, got {low}..{high}")
    probabilities = answer_probabilities(tokens, [str(digit) for digit in range(low, high + 1)])
    return None if probabilities is None else sum(int(digit) * share for digit, share in probabilities.items())
