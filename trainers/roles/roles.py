"""The parts of a distillation, by role: student, teacher, fake score, EMA.

In adapter mode they are one frozen base with LoRA adapters (the teacher has none); in full mode each is a network of
its own. A role also has a config: with it attention form and time modulation are switched together with the weights.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from .types import EMA, STUDENT, TEACHER, Named


@dataclass(frozen=True)
class RoleSetup:
    """The adapter and the config that a role runs with. adapter: name of its LoRA; None = the base alone."""

    adapter: str | None
    config: MMDiTConfig


class AdapterRoles(nn.Module):
    """One frozen base; every role but the teacher is a LoRA over it.

    trained: the roles that train; EMA comes with the student. configs: forms of roles that differ from the base's own.
    """

    def __init__(
        self,
        base: MMDiT,
        adapter: AdapterConfig,
        trained: Sequence[str],
        seed: int,
        configs: Mapping[str, MMDiTConfig] | None = None,
    ) -> None:
        super().__init__()
        self.network = base.requires_grad_(False)
        self._trained = tuple(trained)
        adapters = (*trained, EMA)
        forms = configs or {}
        if not any(re.fullmatch(targets_of(adapter), name) for name, _ in base.named_modules()):
            raise ConfigError(f"no layer of the network ends in one of adapter.targets: {', '.join(adapter.targets)}")
        check_rank(base, adapter)
        self.forms = {r: RoleSetup(r, forms.get(r, base.config)) for r in adapters}
        self.forms[TEACHER] = RoleSetup(None, forms.get(TEACHER, base.config))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
            for name in adapters:
                inject_adapter_in_model(lora_config(adapter), cast(Any, base), adapter_name=name)
        self.layers: dict[str, Any] = {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer)}
        initialise(self, adapters, seed)
        self.scale = adapter.alpha / adapter.rank
        self.dropout = adapter.dropout > 0
        copy_parameters(self.parameters_of(STUDENT), self.parameters_of(EMA))
        for name in adapters:
            for _, p in self.parameters_of(name):
                p.requires_grad_(name in trained)
        self.switch(STUDENT)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.forms)

    def forward(self, role: str, latents: PackedLatents, t: Tensor | float, text: TextCond) -> Tensor:
        # evaluations without gradient must agree with each other, and with the sampler: no dropout there
        self.switch(role, training=torch.is_grad_enabled())
        v = self.network(latents, t, text)
        if v.requires_grad:
            # gradient checkpointing computes blocks again in the backward pass: by the same adapter, and as in training
            v.register_hook(lambda grad: self.switch(role, training=True))
        return v

    def switch(self, role: str, training: bool = False) -> None:
        """Adapter, attention form and time modulation of a role, together; and whether there is dropout."""
        form = self.forms[role]
        self.network.config = form.config
        for layer in self.layers.values():
            # not by peft's methods: they also freeze what is not active, while an update may still be on its way back,
            # and forward-mode differentiation refuses that
            layer._disable_adapters = form.adapter is None
            layer._active_adapter = form.adapter or STUDENT
        if self.dropout:
            self.network.train(training)

    def trained(self, role: str) -> Named:
        return self.parameters_of(role) if role in self._trained else []

    def parameters_of(self, role: str) -> Named:
        if role == TEACHER:
            return []
        pairs: Named = []
        for name, layer in self.layers.items():
            pairs.append((f"{name}.lora_A.weight", layer.lora_A[role].weight))
            pairs.append((f"{name}.lora_B.weight", layer.lora_B[role].weight))
        return pairs

    def config_of(self, role: str) -> MMDiTConfig:
        return self.forms[role].config

    def lora(self, role: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> (down [r, in], up [out, r]), as `save_lora` takes them."""
        return {n: (m.lora_A[role].weight, m.lora_B[role].weight) for n, m in self.layers.items()}

    def start_from(self, path: Path, roles: Sequence[str]) -> None:
        """Put a LoRA file into these roles' adapters. Raises ConfigError if its layers or ranks are others."""
        lora = read_lora(path)
        found, mine = set(lora.layers), set(self.layers)
        if found != mine:
            odd = sorted(found ^ mine)
            raise ConfigError(
                f"{path} must have the {len(mine)} layers of adapter.targets; {len(odd)} differ: {odd[0]}"
            )
        for name, layer in lora.layers.items():
            for role in roles:
                down, up = self.layers[name].lora_A[role].weight, self.layers[name].lora_B[role].weight
                if layer.rank != down.shape[0]:
                    raise ConfigError(f"{path} has rank {layer.rank}, adapter.rank is {down.shape[0]}; set it to that")
                down.data.copy_(layer.parts["down"])
                up.data.copy_(layer.parts["up"].float() * (layer.scale / self.scale))

    def place(self, device: torch.device) -> None:
        place(self.network, device)


def initialise(roles: AdapterRoles, names: Sequence[str], seed: int) -> None:
    """LoRA's start, in float32 whatever the base is stored in: small steps would be rounded away in less."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        for key, p in roles.parameters_of(name):
            p.data = torch.zeros(p.shape)
            if "lora_A" in key:
                nn.init.kaiming_uniform_(p.data, a=5**0.5, generator=generator)


def check_rank(base: MMDiT, adapter: AdapterConfig) -> None:
    """ConfigError for a rank above the smaller side of a layer that gets an adapter."""
    layers = [m for n, m in base.named_modules() if re.fullmatch(targets_of(adapter), n)]
    width = min(min(cast(Any, m).in_features, cast(Any, m).out_features) for m in layers)
    if adapter.rank > width:
        raise ConfigError(
            f"network.adapter.rank: expected at least 1 and at most the layer's width ({width}), got {adapter.rank}"
        )


def targets_of(adapter: AdapterConfig) -> str:
    """Pattern of the names of the layers in the blocks that get an adapter."""
    ends = "|".join(re.escape(end) for end in adapter.layers)
    return rf"transformer_blocks\.\d+\.(.*\.)?({ends})"


def lora_config(adapter: AdapterConfig) -> LoraConfig:
    """As peft wants it."""
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=cast(Any, adapter.alpha),
        lora_dropout=adapter.dropout,
        init_lora_weights=False,
        target_modules=targets_of(adapter),
    )


class FullRoles(nn.Module):
    """A network per role; those in `trained` train, all others are frozen. sharded: spread over all processes."""

    def __init__(self, networks: Mapping[str, MMDiT], trained: Sequence[str], sharded: bool = False) -> None:
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

    def trained(self, role: str) -> Named:
        return self.parameters_of(role) if role in self._trained else []

    def parameters_of(self, role: str) -> Named:
        return list(self.networks[role].named_parameters())

    def config_of(self, role: str) -> MMDiTConfig:
        return self.network(role).config

    def network(self, role: str) -> MMDiT:
        return cast(MMDiT, self.networks[role])

    def state(self, role: str, keep: bool = True) -> dict[str, Tensor]:
        """Every weight of a role, whole, in the main memory; where it is spread, every process must ask, and those that
        do not keep it get nothing."""
        made: dict[str, Tensor] = {}
        for name, w in self.networks[role].state_dict().items():
            tensor = whole(w.detach())
            if keep:
                made[name] = tensor.cpu()
        return made

    def place(self, device: torch.device) -> None:
        if not self.sharded:
            self.to(device)
            return
        for role in self.networks:  # each block goes to the device when it is spread: a whole network may not fit there
            shard(self.network(role), device)


def copy_parameters(source: Named, target: Named) -> None:
    with torch.no_grad():
        for (_, a), (_, b) in zip(source, target, strict=True):
            b.copy_(a)
