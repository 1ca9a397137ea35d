"""Optimizers by name, their learning rate schedule, and the weights at which a run is evaluated."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adafactor, AdamW, Optimizer

from ..config.methods import SCHEDULE_FREE, OptimizerConfig
from ..config.parse import ConfigError
from ..roles.types import NamedParameters
from .muon import Muon, is_hidden_matrix

Groups = list[dict[str, Any]]
"""Parameter groups of an optimizer."""


def make_optimizers(trainable: NamedParameters, config: OptimizerConfig) -> list[Optimizer]:
    """Create the optimizer `config.kind`, and with muon_lr > 0 Muon for the hidden matrices.

    Biases and norms have no weight decay. Raises ConfigError for a package that is not installed, and for adamw8bit on
    a CPU.
    """
    muon = [p for n, p in trainable if config.muon_lr and is_hidden_matrix(n, p)]
    muon_ids = {id(p) for p in muon}
    rest = [p for _, p in trainable if id(p) not in muon_ids]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = []
    if rest:
        optimizers.append(MAKERS[config.kind]([g for g in groups if g["params"]], config))
    if muon:
        optimizers.append(Muon(muon, lr=config.muon_lr, weight_decay=config.weight_decay))
    return optimizers


def _adamw(groups: Groups, config: OptimizerConfig) -> Optimizer:
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def _adamw8bit(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """bitsandbytes' AdamW8bit: states in 8 bits, with kernels for GPUs."""
    if any(p.device.type == "cpu" for group in groups for p in group["params"]):
        raise ConfigError("optimizer.kind adamw8bit needs a GPU, and this run is on a CPU; choose adamw or adafactor")
    make = _class_of("bitsandbytes.optim", "AdamW8bit", config, "quant")
    return make(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def _adafactor(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """torch's Adafactor: second moments as one row and one column per matrix, updates relative to a tensor's size."""
    return Adafactor(groups, lr=config.lr)


def _prodigy(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """Prodigy (arXiv 2306.06101): it estimates the learning rate, which config.lr and the schedule multiply."""
    make = _class_of("prodigyopt", "Prodigy", config, "optimizers")
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "use_bias_correction": True}
    with redirect_stdout(io.StringIO()):  # it prints that weight decay is decoupled
        return make(groups, **options, safeguard_warmup=config.warmup_steps > 0)


def _schedule_free(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """Schedule-free AdamW (arXiv 2405.15682) in training mode; `evaluated` gives the weights to evaluate."""
    make = _class_of("schedulefree", "AdamWScheduleFree", config, "optimizers")
    optimizer = make(groups, lr=config.lr, betas=config.betas, eps=config.eps)  # `lr_factor` warms it up
    optimizer.train()
    return optimizer


MAKERS: dict[str, Callable[[Groups, OptimizerConfig], Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    SCHEDULE_FREE: _schedule_free,
}
"""optimizer.kind -> its maker."""


def _class_of(module: str, name: str, config: OptimizerConfig, extra: str) -> Any:
    """Import an optimizer class. Raises ConfigError with the command that installs its package."""
    try:
        return vars(importlib.import_module(module))[name]
    except ImportError as error:
        raise ConfigError(
            f"optimizer.kind {config.kind} needs the package {module.partition('.')[0]}; "
            f'pip install "comfyui-unipic[{extra}]", or choose adamw'
        ) from error


PROGRESS = frozenset(
    {"k", "d", "d_max", "d_numerator", "d_denom", "d_hat", "weight_sum", "lr_max", "scheduled_lr", "train_mode"}
)
"""Values in the parameter groups of Prodigy and schedule-free AdamW that are state, not options."""


@contextmanager
def evaluated(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Put the weights in place at which a run is evaluated; only schedule-free AdamW trains at other ones.

    It computes gradients at y = (1 - beta1) z + beta1 x and is evaluated at the average x. Its own eval() and train()
    round on the way there and back; here y is put back as it was, so that previews and checkpoints do not change a run.
    """
    replaced: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for optimizer in optimizers:
            for group in (group for group in optimizer.param_groups if "weight_sum" in group):
                for p in (p for p in group["params"] if "z" in optimizer.state[p]):
                    replaced.append((p, p.clone()))
                    p.lerp_(optimizer.state[p]["z"], 1 - 1 / group["betas"][0])
    try:
        yield
    finally:
        with torch.no_grad():
            for p, y in replaced:
                p.copy_(y)


def learning_rate(optimizer: Optimizer) -> float:
    """Current learning rate; of Prodigy times its estimate d."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) * float(group.get("d", 1.0))


def lr_factor(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """Learning rate factor by step: linear warm-up, then cosine decay to final_lr_ratio (schedule_free: none)."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.kind == SCHEDULE_FREE:
            return 1.0
        progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine

    return factor
