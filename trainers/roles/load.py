"""From a config to the roles of a run: which weights are loaded, how often, and in which form they are held."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from unipic_core.model.attention import attention_named
from unipic_core.model.config import FULL
from unipic_core.model.mmdit import MMDiT
from unipic_core.weights.lora import read_lora
from unipic_core.weights.recipe import recipe_of
from unipic_core.weights.transformer import load_transformer

from ..config.run import ConfigError, NetworkConfig
from .frozen import load_frozen
from .roles import AdapterRoles, FullRoles
from .types import EMA, STUDENT, TEACHER, Roles


def load_roles(config: NetworkConfig, trained: Sequence[str], frozen: Sequence[str], seed: int) -> Roles:
    """The roles that a method asks for; EMA always comes with the student.

    In adapter mode one base carries them all, and the teacher costs nothing.
    """
    check_form(config)
    if config.adapter is not None:
        base = load_frozen(config)
        own = base.config.with_attention_form(student_form(config))
        roles = AdapterRoles(base, config.adapter, trained, seed, {STUDENT: own, EMA: own})
        if config.student:
            roles.start_from(Path(config.student), (STUDENT, EMA))
        return roles
    networks = {role: load_network(config, role) for role in (*trained, EMA, *frozen)}
    return FullRoles(networks, trained, config.shard)


def check_form(config: NetworkConfig) -> None:
    """ConfigError where a student in the full form could not say so: a recipe merged over a causal one stays causal."""
    base = config.transformer or config.model
    if config.attention_form == FULL and (form := recipe_of(base).causal_attention_form):
        raise ConfigError(
            f"network.attention_form is {FULL}, but {base} is made for {form}, and so would be read what is exported; "
            "leave the key out, or start from weights of the full form"
        )


def student_form(config: NetworkConfig) -> str | None:
    """The attention form that the student is given: the config's, else that of the LoRA it starts from."""
    if config.attention_form is None and config.adapter is not None and config.student:
        recipe = read_lora(config.student).recipe
        return None if recipe is None else recipe.causal_attention_form
    return config.attention_form


def load_network(config: NetworkConfig, role: str) -> MMDiT:
    """A network of its own. Weights that train are kept in float32: bfloat16 would round small steps away."""
    start = config.student if role in (STUDENT, EMA) else None
    dtype = torch.bfloat16 if config.weights == "bf16" and role == TEACHER else torch.float32
    path = start or config.transformer or config.model
    network = load_transformer(path, dtype=dtype, attention=attention_named(config.attention))
    network.gradient_checkpointing = config.gradient_checkpointing
    if role in (STUDENT, EMA):
        network.config = network.config.with_attention_form(student_form(config))
    return network
