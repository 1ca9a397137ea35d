"""From a config to the roles of a run: which weights are loaded, how often, and in which form they are held."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from unipic_core.attention import BACKENDS
from unipic_core.checkpoints import load_transformer
from unipic_core.mmdit import MMDiT

from .config import NetworkConfig
from .frozen import load_frozen
from .roles import EMA, STUDENT, TEACHER, AdapterRoles, FullRoles, Roles


def load_roles(config: NetworkConfig, trained: Sequence[str], frozen: Sequence[str], seed: int) -> Roles:
    """The roles that a method asks for; EMA always comes with the student.

    In adapter mode one base carries them all, and the teacher costs nothing.
    """
    if config.adapter is not None:
        roles = AdapterRoles(load_frozen(config), config.adapter, trained, seed)
        if config.student:
            roles.start_from(Path(config.student), (STUDENT, EMA))
        return roles
    networks = {role: load_network(config, role) for role in (*trained, EMA, *frozen)}
    return FullRoles(networks, trained, config.shard)


def load_network(config: NetworkConfig, role: str) -> MMDiT:
    """A network of its own. Weights that train are kept in float32: bfloat16 would round small steps away."""
    start = config.student if role in (STUDENT, EMA) else None
    dtype = torch.bfloat16 if config.weights == "bf16" and role == TEACHER else torch.float32
    path = start or config.transformer or config.model
    network = load_transformer(path, dtype=dtype, attention=BACKENDS[config.attention])
    network.gradient_checkpointing = config.gradient_checkpointing
    return network
