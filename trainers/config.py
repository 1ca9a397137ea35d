"""Run configs: YAML into frozen dataclasses. An unknown key or a wrong type is an error that names it."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unipic_core.attention import BACKENDS


class ConfigError(ValueError):
    """A config file says something that no trainer understands."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay; the defaults are the paper's SFT values.

    muon_lr: above 0, Muon trains the hidden matrices with this rate and AdamW the rest.
    """

    lr: float = 1e-4
    muon_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup_steps: int = 500
    final_lr_ratio: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class VAEMethod:
    """Train a Qwen-Image VAE from nothing: squared error + L1 + KL to a prior.

    prior: "normal" is N(0, 1); "linear" is N(principal components of the patches, prior_std^2), see latents.py.
    """

    base_dim: int = 16
    num_res_blocks: int = 1
    crop: int = 64
    l1_weight: float = 0.1
    kl_weight: float = 1e-3
    prior: str = "normal"
    prior_std: float = 0.12
    loader_workers: int = 1

    def __post_init__(self) -> None:
        _at_least(self, 1, "base_dim", "num_res_blocks")
        _one_of(self, "prior", ("normal", "linear"))
        if self.crop not in range(16, 129, 8):
            raise ConfigError(f"vae.crop must be a multiple of 8 from 16 to 128, got {self.crop}")


@dataclass(frozen=True)
class CacheConfig:
    """The composition set and where its latents are kept: samples 0 .. `samples` of (seed, index)."""

    folder: str
    samples: int
    seed: int = 0
    size: int = 128
    reference_budget: int = 128
    samples_per_shard: int = 1024
    workers: int = 1

    def __post_init__(self) -> None:
        _at_least(self, 1, "samples", "samples_per_shard")
        if self.samples % self.samples_per_shard:
            raise ConfigError(
                f"data.samples must be a multiple of samples_per_shard ({self.samples_per_shard}), got {self.samples}"
            )

    @property
    def shards(self) -> int:
        return self.samples // self.samples_per_shard


@dataclass(frozen=True)
class SFTMethod:
    """Flow matching of the network, jointly with the text encoder or with it frozen (then its embeddings are cached).

    model: a pipeline folder to start from (released, or from `python -m trainers.nano`).
    """

    model: str
    data: CacheConfig
    train_text_encoder: bool = False
    prompt_dropout: float = 0.1
    t_mean: float = 0.0
    t_std: float = 1.0
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    preview_samples: int = 6
    preview_steps: int = 20
    preview_guidance: float = 1.0

    def __post_init__(self) -> None:
        _at_least(self, 2, "preview_samples")
        _at_least(self, 1, "preview_steps")
        _one_of(self, "attention", BACKENDS)


METHODS: dict[str, type] = {"vae": VAEMethod, "sft": SFTMethod}


@dataclass(frozen=True)
class RunConfig:
    """One run. `options` is the section named like the method; everything else is shared by all methods."""

    method: str
    output: str
    options: Any
    seed: int = 0
    steps: int = 1000
    batch_size: int = 32
    accumulation: int = 1
    precision: str = "no"
    ema_decay: float = 0.999
    log_every: int = 10
    save_every: int = 500
    sample_every: int = 500
    keep_checkpoints: int = 2
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "log_every", "save_every", "sample_every", "keep_checkpoints")
        _at_least(self, 1, *counts)
        _one_of(self, "precision", ("no", "bf16"))


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ConfigError(f"{name} must be at least {least}, got {getattr(config, name)}")


def _one_of(config: Any, name: str, choices: typing.Collection[str]) -> None:
    if getattr(config, name) not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}")


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a YAML config; overrides are `key=value` or `section.key=value`."""
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    return parse_run(data)


def parse_run(data: dict[str, Any]) -> RunConfig:
    method = data.get("method")
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    data = dict(data)
    section = data.pop(method, {})
    if not isinstance(section, dict):
        raise ConfigError(f"the section {method} must hold keys and values, got {section!r}")
    options = parse(METHODS[method], section, method)
    return parse(RunConfig, {**data, "options": options}, "config")


def parse(cls: type, data: dict[str, Any], where: str) -> Any:
    """A dataclass from a mapping, strictly."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in known:
            names = ", ".join(sorted(known))
            raise ConfigError(f"unknown key {key!r} (= {data[key]!r}) in {where}; known keys: {names}")
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    needed = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING and n not in values]
    if needed:
        raise ConfigError(f"{where} needs {', '.join(needed)}")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return parse(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = typing.get_args(hint)
        inner = inner[:1] * len(value) if inner[-1:] == (...,) else inner
        if len(inner) == len(value):
            return tuple(_convert(h, v, where) for h, v in zip(inner, value, strict=True))
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(h for h in typing.get_args(hint) if h is not type(None)), value, where)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            pass
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"an override is key=value, got {override!r}")
    *sections, key = path.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{section} in the override {override!r} is a value, not a section")
    data[key] = yaml.safe_load(text)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain values, for the record that travels with checkpoints."""
    data = dataclasses.asdict(config)
    data[config.method] = data.pop("options")
    return data
