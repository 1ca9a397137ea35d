"""Load the roles of a run from its config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from unipic_core.model.attention import attention_named
from unipic_core.model.config import FULL
from unipic_core.model.mmdit import MMDiT
from unipic_core.weights.lora import read_lora
from unipic_core.weights.recipe import recipe_of
from unipic_core.weights.transformer import load_transformer, open_transformer

from ..config.run import ConfigError, NetworkConfig
from .frozen import load_frozen
from .roles import AdapterRoles, FullRoles
from .types import EMA, STUDENT, TEACHER, Roles


def load_roles(config: NetworkConfig, trained: Sequence[str], frozen: Sequence[str], seed: int) -> Roles:
    """Load the roles that a method needs; the EMA is always added to the student.

    In adapter mode one base is shared by all roles, and the teacher needs no memory.
    """
    check_attention_form(config)
    if config.adapter is not None:
        base = load_frozen(config)
        student_config = base.config.with_attention_form(student_attention_form(config))
        roles = AdapterRoles(base, config.adapter, trained, seed, {STUDENT: student_config, EMA: student_config})
        if config.student:
            roles.start_from(Path(config.student), (STUDENT, EMA))
        return roles
    everyone = (*trained, EMA, *frozen)
    networks = {role: load_network(config, role) for role in everyone}
    sources = (
        {role: open_transformer(start_of(config, role)).weights.get for role in everyone} if config.shard else None
    )
    return FullRoles(networks, trained, sources)


def check_attention_form(config: NetworkConfig) -> None:
    """Raise ConfigError for a full student of a causal base: its recipe, merged over the base's, would stay causal."""
    base = config.transformer or config.model
    if config.attention_form == FULL and (base_form := recipe_of(base).causal_attention_form):
        raise ConfigError(
            f"network.attention_form: expected {base_form}, the form of {base}, got {FULL}, which exported files could "
            "not "
            "declare; leave the key out, or start from weights of the full form"
        )


def student_attention_form(config: NetworkConfig) -> str | None:
    """The student's attention form: the config's, else that of its starting LoRA, else None (the base's)."""
    if config.attention_form is None and config.adapter is not None and config.student:
        recipe = read_lora(config.student).recipe
        return None if recipe is None else recipe.causal_attention_form
    return config.attention_form


def start_of(config: NetworkConfig, role: str) -> str:
    """Path of the weights that a role's network starts from."""
    student = config.student if role in (STUDENT, EMA) else None
    return student or config.transformer or config.model


def load_network(config: NetworkConfig, role: str) -> MMDiT:
    """Load the network of one role. Trained weights are float32: bfloat16 would round small updates away."""
    path = start_of(config, role)
    dtype = torch.bfloat16 if config.weights == "bf16" and role == TEACHER else torch.float32
    opened = open_transformer(path)
    device = "meta" if config.shard else "cpu"  # filled when it is sharded
    network = load_transformer(opened, dtype=dtype, device=device, attention=attention_named(config.attention))
    network.gradient_checkpointing = config.gradient_checkpointing
    if role in (STUDENT, EMA):
        network.config = network.config.with_attention_form(student_attention_form(config))
    return network
