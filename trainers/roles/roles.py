"""Networks of a distillation by role: student, teacher, fake score, EMA.

In adapter mode they share one frozen base with LoRA adapters (none for the teacher); in full mode each is a separate
network. Each role has a network config, so attention form and time modulation switch together with the weights.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from unipic_core.conditioning.sequence import PackedLatents, TextCond
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.weights.lora import read_lora

from ..config.run import AdapterConfig, ConfigError
from .frozen import place
from .sharding import shard, whole
from .types import EMA, STUDENT, TEACHER, NamedParameters


@dataclass(frozen=True)
class RoleSetup:
    """Adapter and network config of a role. adapter: name of its LoRA; None: the base without adapter."""

    adapter: str | None
    network_config: MMDiTConfig


class AdapterRoles(nn.Module):
    """One frozen base; every role but the teacher is a LoRA over it.

    trained: roles that train; the EMA is added. network_configs: configs of roles that differ from the base's.
    """

    def __init__(
        self,
        base: MMDiT,
        adapter: AdapterConfig,
        trained: Sequence[str],
        seed: int,
        network_configs: Mapping[str, MMDiTConfig] | None = None,
    ) -> None:
        super().__init__()
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
                inject_adapter_in_model(lora_config(adapter, ranks), cast(Any, base), adapter_name=name)
        self.layers: dict[str, Any] = {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer)}
        initialise(self, adapters, seed)
        self.scales = {name: adapter.alpha / rank for name, rank in ranks.items()}
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
        if role == TEACHER:
            return []
        pairs: NamedParameters = []
        for name, layer in self.layers.items():
            pairs.append((f"{name}.lora_A.weight", layer.lora_A[role].weight))
            pairs.append((f"{name}.lora_B.weight", layer.lora_B[role].weight))
        return pairs

    def config_of(self, role: str) -> MMDiTConfig:
        return self.setups[role].network_config

    def lora(self, role: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Map each layer to (down [r, in], up [out, r]) for `save_lora`."""
        return {n: (m.lora_A[role].weight, m.lora_B[role].weight) for n, m in self.layers.items()}

    def start_from(self, path: Path, roles: Sequence[str]) -> None:
        """Load a LoRA file into these roles' adapters. Raises ConfigError if its layers or ranks differ."""
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
            if set(layer.parts) != {"down", "up"}:
                raise ConfigError(
                    f"{path} must be a plain LoRA to train on, got a layer {name} of {', '.join(sorted(layer.parts))}"
                )
            for role in roles:
                down, up = self.layers[name].lora_A[role].weight, self.layers[name].lora_B[role].weight
                if layer.rank != down.shape[0]:
                    raise ConfigError(
                        f"network.adapter.rank: expected {layer.rank}, the rank of {path}, got {down.shape[0]}"
                    )
                down.data.copy_(layer.parts["down"])
                up.data.copy_(layer.parts["up"].float() * (layer.scale / self.scales[name]))

    def place(self, device: torch.device) -> None:
        place(self.network, device)


def initialise(roles: AdapterRoles, names: Sequence[str], seed: int) -> None:
    """Initialise LoRA weights in float32, whatever the base is stored in: lower precision would round updates away."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        for key, p in roles.parameters_of(name):
            p.data = torch.zeros(p.shape)
            if "lora_A" in key:
                nn.init.kaiming_uniform_(p.data, a=5**0.5, generator=generator)


def adapter_ranks(names: Iterable[str], adapter: AdapterConfig) -> dict[str, int]:
    """Rank of each of these layers that gets an adapter."""
    pattern = re.compile(targets_of(adapter))
    return {n: adapter.rank_of(n) for n in names if pattern.fullmatch(n) and not adapter.excludes(n)}


def check_patterns(ranks: Mapping[str, int], base: MMDiT, adapter: AdapterConfig) -> None:
    """Raise ConfigError for a pattern that matches no layer: a rank or an exclusion that would do nothing."""
    for pattern in adapter.ranks:
        if not any(fnmatchcase(name, pattern) for name in ranks):
            raise ConfigError(f"network.adapter.ranks: {pattern} matches no layer with an adapter")
    for pattern in adapter.exclude:
        if not any(fnmatchcase(name, pattern) for name, _ in base.named_modules()):
            raise ConfigError(f"network.adapter.exclude: {pattern} matches no layer of the network")


def check_rank(base: MMDiT, ranks: Mapping[str, int]) -> None:
    """Raise ConfigError for a rank above the smaller dimension of its layer."""
    for name, rank in ranks.items():
        layer = cast(Any, base.get_submodule(name))
        width = min(layer.in_features, layer.out_features)
        if rank > width:
            raise ConfigError(
                f"network.adapter.rank: expected at least 1 and at most the layer's width ({width}), got {rank}"
            )


def targets_of(adapter: AdapterConfig) -> str:
    """Regular expression for the names of the layers with an adapter."""
    suffixes = "|".join(re.escape(suffix) for suffix in adapter.layers)
    return rf"transformer_blocks\.\d+\.(.*\.)?({suffixes})"


def lora_config(adapter: AdapterConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """Convert to peft's config, with each layer by its name."""
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=cast(Any, adapter.alpha),
        lora_dropout=adapter.dropout,
        init_lora_weights=False,
        target_modules="|".join(map(re.escape, ranks)),
        rank_pattern={f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != adapter.rank},
    )


class FullRoles(nn.Module):
    """One network per role; those in `trained` train, all others are frozen.

    sources: of networks on the meta device, which are sharded over all processes (FSDP2) and filled when they are
    placed: role -> (parameter name -> tensor).
    """

    def __init__(
        self,
        networks: Mapping[str, MMDiT],
        trained: Sequence[str],
        sources: Mapping[str, Callable[[str], Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.sources = sources
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
        if self.sources is None:
            self.to(device)
            return
        for role, source in self.sources.items():  # block by block: a whole network may not fit on the device
            shard(self.network(role), device, source)


def copy_parameters(source: NamedParameters, target: NamedParameters) -> None:
    with torch.no_grad():
        for (_, a), (_, b) in zip(source, target, strict=True):
            b.copy_(a)
