"""The roles of a distillation by name, and what every set of roles can do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from unipic_core.conditioning.sequence import PackedLatents, TextCond
from unipic_core.model.config import MMDiTConfig

from ..config.run import ConfigError, RunConfig

Named = list[tuple[str, nn.Parameter]]
"""Parameters under their names."""

STUDENT, TEACHER, FAKE_SCORE, EMA = "student", "teacher", "fake_score", "ema"


class Roles(Protocol):
    """Networks by role."""

    def __call__(self, role: str, latents: PackedLatents, t: Tensor | float, text: TextCond) -> Tensor:
        """The role's velocity [B, N_O, 4C]."""

    @property
    def names(self) -> frozenset[str]:
        """The roles that there are."""

    def trained(self, role: str) -> Named:
        """What an update of the role changes; nothing for a frozen one."""

    def parameters_of(self, role: str) -> Named:
        """The parameters that make the role, in the same order for the student and its EMA."""

    def config_of(self, role: str) -> MMDiTConfig:
        """What the role's network runs with; its attention form may be the role's own."""

    def place(self, device: torch.device) -> None: ...


def roles_of(config: RunConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The roles that train in a run and those that are frozen; EMA comes with the student."""
    distil = config.consistency is not None and config.consistency.asks_teacher
    trained = (STUDENT,) if config.dmd is None else (STUDENT, FAKE_SCORE)
    return trained, (TEACHER,) if distil or config.dmd is not None else ()


def require(roles: Roles, trained: Iterable[str], frozen: Iterable[str]) -> None:
    """ConfigError unless exactly these roles train, and the frozen ones are there."""
    for role in (*trained, *frozen):
        if role not in roles.names:
            have = ", ".join(sorted(roles.names))
            raise ConfigError(f"this method needs the role {role}; it was given {have}")
    for role in trained:
        if not roles.trained(role):
            raise ConfigError(f"the role {role} must train in this method, but it is frozen")
    for role in sorted(roles.names.difference(trained)):
        if roles.trained(role):
            raise ConfigError(f"the role {role} must be frozen in this method, but it trains")
