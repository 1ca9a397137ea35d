"""Load the roles of a run from its config."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from unipic_core.model.attention import attention_named
from unipic_core.model.config import FULL
from unipic_core.model.mmdit import MMDiT
from unipic_core.weights.lora import read_lora
from unipic_core.weights.recipe import recipe_of
from unipic_core.weights.transformer import load_transformer, open_transformer

from ..config.run import ConfigError, NetworkConfig
from .frozen import load_frozen, shard_frozen
from .roles import AdapterRoles, FullRoles
from .sharding import GatheredOperations, Sharding, shard
from .types import EMA, STUDENT, TEACHER, Roles


def load_roles(
    config: NetworkConfig, trained: Sequence[str], frozen: Sequence[str], seed: int, precision: str = "no"
) -> Roles:
    """Load the roles that a method needs; the EMA is always added to the student. precision: of the run.

    In adapter mode one base is shared by all roles, and the teacher needs no memory.
    """
    check_attention_form(config)
    if config.adapter is not None:
        base = load_frozen(config)
        student_config = base.config.with_attention_form(student_attention_form(config))
        network_configs = {STUDENT: student_config, EMA: student_config}
        sharded = None
        if config.shard:
            source = open_transformer(config.transformer or config.model).weights.get
            sharded = partial(shard_frozen, sharding=Sharding(config.shard_over), read=source)
        roles = AdapterRoles(base, config.adapter, trained, seed, network_configs, sharded)
        if config.student:
            roles.start_from(Path(config.student), (STUDENT, EMA))
        return roles
    everyone = (*trained, EMA, *frozen)
    sharding = sharding_of(config, precision) if config.shard else None
    networks = {role: load_network(config, role, sharding) for role in everyone}
    if sharding is None:
        return FullRoles(networks, trained)
    sources = {role: open_transformer(start_of(config, role)).weights.get for role in everyone}
    return FullRoles(networks, trained, {r: partial(shard, sharding=sharding, tensor_of=s) for r, s in sources.items()})


def sharding_of(config: NetworkConfig, precision: str) -> Sharding:
    """How the networks of full-parameter training are sharded."""
    gather = precision if config.gather == "auto" else config.gather
    return Sharding(config.shard_over, torch.bfloat16 if gather == "bf16" else None)


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


def load_network(config: NetworkConfig, role: str, sharding: Sharding | None = None) -> MMDiT:
    """Load the network of one role, with `sharding` on the meta device: it is filled when it is sharded.

    Trained weights are float32: bfloat16 would round small updates away.
    """
    path = start_of(config, role)
    dtype = torch.bfloat16 if config.weights == "bf16" and role == TEACHER else torch.float32
    opened = open_transformer(path)
    gathers = sharding is not None and sharding.gather is not None
    network = load_transformer(
        opened,
        dtype=dtype,
        device="cpu" if sharding is None else "meta",
        operations=GatheredOperations if gathers else nn,
        attention=attention_named(config.attention),
    )
    if gathers and dtype == torch.float32:
        network.compute_dtype = dtype  # not that of the gathered weights: it would round the inputs
    network.gradient_checkpointing = config.gradient_checkpointing
    if role in (STUDENT, EMA):
        network.config = network.config.with_attention_form(student_attention_form(config))
    return network
