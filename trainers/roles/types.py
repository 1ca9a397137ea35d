"""Role names of a distillation, and the interface of role sets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from unipic_core.conditioning.sequence import PackedLatents, TextCond
from unipic_core.model.config import MMDiTConfig

from ..config.run import ConfigError, RunConfig

NamedParameters = list[tuple[str, nn.Parameter]]
"""Parameters with their names."""

STUDENT, TEACHER, FAKE_SCORE, EMA = "student", "teacher", "fake_score", "ema"


class Roles(Protocol):
    """Networks by role."""

    def __call__(self, role: str, latents: PackedLatents, t: Tensor | float, text: TextCond) -> Tensor:
        """Velocity of the role, [B, N_O, 4C]."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the available roles."""

    def trained(self, role: str) -> NamedParameters:
        """Trained parameters of the role; [] for a frozen one."""

    def parameters_of(self, role: str) -> NamedParameters:
        """All parameters of the role, in the same order for the student and its EMA."""

    def config_of(self, role: str) -> MMDiTConfig:
        """Network config of the role, with its attention form."""

    def place(self, device: torch.device) -> None: ...


def roles_of(config: RunConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (trained, frozen) roles of a run; the EMA is always added to the student."""
    distil = config.consistency is not None and config.consistency.needs_teacher
    trained = (STUDENT,) if config.dmd is None else (STUDENT, FAKE_SCORE)
    return trained, (TEACHER,) if distil or config.dmd is not None else ()


def require_roles(roles: Roles, trained: Iterable[str], frozen: Iterable[str]) -> None:
    """Raise ConfigError unless exactly these roles train and the frozen ones exist."""
    for role in (*trained, *frozen):
        if role not in roles.names:
            raise ConfigError(f"this method needs the role {role}, got {', '.join(sorted(roles.names))}")
    for role in trained:
        if not roles.trained(role):
            raise ConfigError(f"the role {role} must train in this method, but it is frozen")
    for role in sorted(roles.names.difference(trained)):
        if roles.trained(role):
            raise ConfigError(f"the role {role} must be frozen in this method, but it trains")
