"""Networks of a distillation by role: student, teacher, fake score, EMA.

In adapter mode they share one frozen base with LoRA adapters (none for the teacher); in full mode each is a separate
network. Each role has a network config, so attention form and time modulation switch together with the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from unipic_core.conditioning.sequence import PackedLatents, TextCond
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.weights.lora import read_lora
from unipic_core.weights.lora_layers import LoRALayer

from ..config.run import AdapterConfig, ConfigError
from .adapters import (
    ADAPTED,
    adapter_parameters,
    adapter_ranks,
    check_patterns,
    check_rank,
    file_layer,
    initialise,
    load_layer,
    peft_config,
)
from .frozen import place
from .sharding import whole
from .types import EMA, STUDENT, TEACHER, NamedParameters


@dataclass(frozen=True)
class RoleSetup:
    """Adapter and network config of a role. adapter: its name; None: the base without adapter."""

    adapter: str | None
    network_config: MMDiTConfig


class AdapterRoles(nn.Module):
    """One frozen base; every role but the teacher is an adapter over it: LoRA, DoRA, LoKr or LoHa.

    trained: roles that train; the EMA is added. network_configs: configs of roles that differ from the base's. sharded:
    of a base on the meta device, shards and fills it when it is placed: (network, device, adapters=parameters).
    """

    def __init__(
        self,
        base: MMDiT,
        adapter: AdapterConfig,
        trained: Sequence[str],
        seed: int,
        network_configs: Mapping[str, MMDiTConfig] | None = None,
        sharded: Callable[..., None] | None = None,
    ) -> None:
        super().__init__()
        self.sharded = sharded
        self.network = base.requires_grad_(False)
        self._trained = tuple(trained)
        adapters = (*trained, EMA)
        ranks = adapter_ranks((name for name, _ in base.named_modules()), adapter)
        if not ranks:
            raise ConfigError(
                f"network.adapter.targets: expected suffixes of layer names, got {', '.join(adapter.targets)}, which "
                "match none that adapter.exclude leaves"
            )
        check_patterns(ranks, base, adapter)
        check_rank(base, ranks)
        by_role = {role: (network_configs or {}).get(role, base.config) for role in (*adapters, TEACHER)}
        self.setups = {role: RoleSetup(None if role == TEACHER else role, by_role[role]) for role in by_role}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
            for name in adapters:
                inject_adapter_in_model(peft_config(adapter, ranks), cast(Any, base), adapter_name=name)
        self.layers: dict[str, Any] = {n: m for n, m in base.named_modules() if isinstance(m, ADAPTED)}
        initialise(self.layers, adapters, seed)
        self.alpha = adapter.alpha
        self.dropout = adapter.dropout > 0
        copy_parameters(self.parameters_of(STUDENT), self.parameters_of(EMA))
        for name in adapters:
            for _, p in self.parameters_of(name):
                p.requires_grad_(name in trained)
        self.switch(STUDENT)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.setups)

    def forward(self, role: str, latents: PackedLatents, t: Tensor | float, text: TextCond) -> Tensor:
        # no dropout without gradient: such evaluations must agree with each other and with the sampler
        self.switch(role, training=torch.is_grad_enabled())
        v = self.network(latents, t, text)
        if v.requires_grad:
            # gradient checkpointing recomputes blocks in the backward pass, which needs the same adapter and dropout
            v.register_hook(lambda grad: self.switch(role, training=True))
        return v

    def switch(self, role: str, training: bool = False) -> None:
        """Activate adapter, attention form and time modulation of a role. training: with dropout."""
        setup = self.setups[role]
        self.network.config = setup.network_config
        for layer in self.layers.values():
            # not by peft's methods, which freeze inactive adapters: their backward pass may be pending, and
            # forward-mode differentiation does not support that
            layer._disable_adapters = setup.adapter is None
            layer._active_adapter = setup.adapter or STUDENT
        if self.dropout:
            self.network.train(training)

    def trained(self, role: str) -> NamedParameters:
        return self.parameters_of(role) if role in self._trained else []

    def parameters_of(self, role: str) -> NamedParameters:
        return [] if role == TEACHER else adapter_parameters(self.layers, role)

    def config_of(self, role: str) -> MMDiTConfig:
        return self.setups[role].network_config

    def adapter(self, role: str) -> dict[str, LoRALayer]:
        """A role's adapter layer by layer, for `save_adapter`."""
        return {name: file_layer(layer, role, self.alpha) for name, layer in self.layers.items()}

    def start_from(self, path: Path, roles: Sequence[str]) -> None:
        """Load an adapter file into these roles' adapters. Raises ConfigError if its layers, kind or ranks differ."""
        lora = read_lora(path)
        file_layers, layers = set(lora.layers), set(self.layers)
        if file_layers != layers:
            different = sorted(file_layers ^ layers)
            raise ConfigError(
                f"{path} must have the {len(layers)} layers of network.adapter.targets, got {len(file_layers)}, of "
                "which "
                f"{len(different)} differ, first {different[0]}; change adapter.targets"
            )
        for name, layer in lora.layers.items():
            for role in roles:
                try:
                    load_layer(self.layers[name], role, layer)
                except ValueError as error:
                    raise ConfigError(
                        f"{path} does not fit network.adapter: in {name} expected {error}; "
                        "change adapter.type, rank, ranks or factor to those of the file"
                    ) from None

    def place(self, device: torch.device) -> None:
        if self.sharded is None:
            place(self.network, device)
            return
        adapters = [p for role in self.names for _, p in self.parameters_of(role)]
        self.sharded(self.network, device, adapters=adapters)


class FullRoles(nn.Module):
    """One network per role; those in `trained` train, all others are frozen.

    sharded: of networks on the meta device, shards and fills them when they are placed: role -> (network, device).
    """

    def __init__(
        self,
        networks: Mapping[str, MMDiT],
        trained: Sequence[str],
        sharded: Mapping[str, Callable[[MMDiT, torch.device], None]] | None = None,
    ) -> None:
        super().__init__()
        self.sharded = sharded
        self.networks = nn.ModuleDict(networks)
        self._trained = tuple(trained)
        for role, network in networks.items():
            network.requires_grad_(role in trained)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.networks)

    def forward(self, role: str, latents: PackedLatents, t: Tensor | float, text: TextCond) -> Tensor:
        return self.networks[role](latents, t, text)

    def trained(self, role: str) -> NamedParameters:
        return self.parameters_of(role) if role in self._trained else []

    def parameters_of(self, role: str) -> NamedParameters:
        return list(self.networks[role].named_parameters())

    def config_of(self, role: str) -> MMDiTConfig:
        return self.network(role).config

    def network(self, role: str) -> MMDiT:
        return cast(MMDiT, self.networks[role])

    def state(self, role: str, gather_here: bool = True) -> dict[str, Tensor]:
        """Full weights of a role in main memory; {} with gather_here False.

        With sharded networks every process must call this, as gathering is collective.
        """
        weights: dict[str, Tensor] = {}
        for name, w in self.networks[role].state_dict().items():
            tensor = whole(w.detach())
            if gather_here:
                weights[name] = tensor.cpu()
        return weights

    def place(self, device: torch.device) -> None:
        if self.sharded is None:
            self.to(device)
            return
        for role, shard in self.sharded.items():  # block by block: a whole network may not fit on the device
            shard(self.network(role), device)


def copy_parameters(source: NamedParameters, target: NamedParameters) -> None:
    with torch.no_grad():
        for (_, a), (_, b) in zip(source, target, strict=True):
            b.copy_(a)
