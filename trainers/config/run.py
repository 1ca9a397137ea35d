"""Run configs: YAML parsed into frozen dataclasses. An unknown key or a wrong type raises an error that names it."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from unipic_core.model.attention import TRAINABLE
from unipic_core.model.config import ATTENTION_FORMS
from unipic_core.weights.recipe import LIMITS, MAX_GUIDANCE

from .data import LARGEST_SEED
from .data import DataConfig as DataConfig
from .data import ScenesConfig as ScenesConfig
from .data import ValidationConfig as ValidationConfig
from .methods import SCHEDULE_FREE, ConsistencyMethod, DMDMethod, JointMethod, OptimizerConfig, SFTMethod, VAEMethod
from .parse import ConfigError as ConfigError
from .parse import above, at_least, displayed, one_of, override, parse, within
from .stages import stage_values
from .yaml_reader import read_yaml_mapping

Section = typing.TypeVar("Section")

# --- sections of the methods that train the network -------------------------------------------------------------------

TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "mlp": ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    "modulation": ("img_mod.1", "txt_mod.1"),
}
"""Layer group -> suffixes of the layer names."""


@dataclass(frozen=True)
class AdapterConfig:
    """Adapters. type: "lora", "dora", "lokr" or "loha".

    targets: layer groups (TARGETS) or suffixes of layer names, inside the blocks.
    exclude: patterns of layer names without an adapter, such as "transformer_blocks.0.*" (* stands for anything).
    ranks: pattern -> rank of the layers that it matches, the first that does; others have `rank`. alpha holds for all,
    so a layer's adapter is scaled by alpha over its own rank. factor: of LoKr, the largest size of a weight's smaller
    Kronecker factor; 0: as near to a square root as possible.
    """

    type: str = "lora"
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention", "mlp")
    exclude: tuple[str, ...] = ()
    ranks: dict[str, int] = field(default_factory=dict)
    factor: int = 0

    def __post_init__(self) -> None:
        one_of(self, "type", ("lora", "dora", "lokr", "loha"))
        at_least(self, 1, "rank")
        at_least(self, 0, "factor")
        if self.factor and self.type != "lokr":
            raise ConfigError(f"factor is for type lokr, got type {self.type}; remove it")
        if self.dropout and self.type in ("lokr", "loha"):
            raise ConfigError(f"dropout is for types lora and dora, got type {self.type}; remove it")
        above(self, 0, "alpha")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter.dropout must be from 0 to below 1, got {self.dropout}")
        for pattern, rank in self.ranks.items():
            if rank < 1:
                raise ConfigError(f"adapter.ranks must be at least 1, got {rank} for {pattern}; or exclude the layers")

    def rank_of(self, layer: str) -> int:
        """Rank of the adapter of a layer, by its name."""
        return next((rank for pattern, rank in self.ranks.items() if fnmatchcase(layer, pattern)), self.rank)

    def excludes(self, layer: str) -> bool:
        return any(fnmatchcase(layer, pattern) for pattern in self.exclude)

    @property
    def layers(self) -> tuple[str, ...]:
        """Suffixes of the names of the layers with an adapter."""
        return tuple(suffix for target in self.targets for suffix in TARGETS.get(target, (target,)))


@dataclass(frozen=True)
class NetworkConfig:
    """Trained network and its starting weights.

    model: pipeline folder (the release, or from `python -m trainers.nano`). transformer: other network weights.
    adapter: LoRAs over one frozen base shared by all roles; absent: full-parameter training, one network per role.
    student: starting weights of the student instead of the base: a LoRA, or without adapters network weights.
    attention_form: the student's attention form; absent: that of its starting weights. Teacher and fake score keep the
    base's.
    weights: storage type of the base in memory; fp8 and nf4 only with adapters. block_swap: number of last blocks that
    stay in main memory and are copied to the GPU on use. shard: shard networks over processes (FSDP2): those that train
    with their gradients and optimizer states, or the frozen base of adapters, which stay whole in every process.
    shard_over: number of neighbouring processes that share one copy, such as those of a machine (0: all processes).
    gather: dtype in which the weights of trained networks are sent, "fp32" or "bf16"; auto: bf16 where precision is.
    """

    model: str
    transformer: str | None = None
    student: str | None = None
    adapter: AdapterConfig | None = None
    weights: str = "fp32"
    attention: str = "sdpa"
    attention_form: str | None = None
    gradient_checkpointing: bool = False
    block_swap: int = 0
    shard: bool = False
    shard_over: int = 0
    gather: str = "auto"

    def __post_init__(self) -> None:
        one_of(self, "weights", ("fp32", "bf16", "fp8", "nf4"))
        one_of(self, "attention", TRAINABLE)
        if self.attention_form is not None:
            one_of(self, "attention_form", ATTENTION_FORMS)
        at_least(self, 0, "block_swap")
        if self.adapter is None and (self.weights in ("fp8", "nf4") or self.block_swap):
            raise ConfigError("weights fp8, weights nf4 and block_swap need a frozen base; add an adapter section")
        if self.adapter is not None and self.adapter.type == "dora":
            if self.weights in ("fp8", "nf4") or self.block_swap:
                raise ConfigError(
                    "adapter.type dora needs the values of the base's weights on the device: use weights fp32 or bf16 "
                    "without block_swap, or another type"
                )
        elif self.adapter is not None and self.adapter.type != "lora" and self.weights == "nf4":
            raise ConfigError(
                f"adapter.type {self.adapter.type} cannot be used with weights nf4; use fp8, or type lora"
            )
        self._check_sharding()

    def _check_sharding(self) -> None:
        one_of(self, "gather", ("auto", "fp32", "bf16"))
        at_least(self, 0, "shard_over")
        if not self.shard:
            for key, value, default in (("shard_over", self.shard_over, 0), ("gather", self.gather, "auto")):
                if value != default:
                    raise ConfigError(f"{key} is for sharded networks, got {value}; set shard to true, or remove it")
        if self.shard_over == 1:
            raise ConfigError("shard_over must be at least 2, or 0 for all processes, got 1; set shard to false")
        if self.shard and self.block_swap:
            raise ConfigError("block_swap cannot be used with shard, got both; set block_swap to 0, or shard to false")
        if self.shard and self.adapter is not None and self.adapter.type == "dora":
            raise ConfigError("adapter.type dora needs whole weights of the base, got shard true; use another type")
        if self.adapter is not None and self.gather != "auto":
            raise ConfigError(
                f"gather is for trained networks, got {self.gather} with adapters, whose base is sent as it is stored "
                "(weights); remove it"
            )

    @property
    def shards_trained(self) -> bool:
        """True if the trained parameters are sharded, not only the frozen base of adapters."""
        return self.shard and self.adapter is None


@dataclass(frozen=True)
class PreviewSample:
    """User-defined preview: up to six pictures and a prompt."""

    images: tuple[str, ...]
    prompt: str


@dataclass(frozen=True)
class PreviewConfig:
    """Sample grid, drawn with fixed seeds. own: user-defined previews; otherwise `samples` samples of the data.

    steps, guidance: of the sampler; absent: the exported recipe's.
    """

    samples: int = 6
    own: tuple[PreviewSample, ...] = ()
    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "samples", "steps")
        at_least(self, 0, "guidance")


@dataclass(frozen=True)
class RecipeConfig:
    """Sampling settings that the exported recipe has in place of the method's, or of the base's with sft."""

    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        within(self, *LIMITS["steps"], "steps")
        within(self, 0, MAX_GUIDANCE, "guidance")


EXPORT_KINDS = ("lora", "merged", "folder")
"""Export formats in the order in which they are written: LoRA, one file, diffusers folder."""

NETWORK_SECTIONS = ("network", "data", "preview", "recipe", "validation")
SECTIONS: dict[str, tuple[str, ...]] = {
    "vae": ("vae",),
    "sft": (*NETWORK_SECTIONS, "sft"),
    "consistency": (*NETWORK_SECTIONS, "consistency"),
    "dmd": (*NETWORK_SECTIONS, "dmd"),
    "joint": (*NETWORK_SECTIONS, "joint", "consistency", "dmd"),
}
"""Method -> sections that its config may have."""


@dataclass(frozen=True)
class RunConfig:
    """Config of one run. Sections that the method does not use are None; the others are present, with defaults.

    export: formats of EXPORT_KINDS to write (a LoRA only with adapters); "raw" adds each without the moving average.
    bad_samples: "stop" at a cached sample whose data or loss are not finite, or "skip" it, name it and count it.
    trackers: "tensorboard", "wandb".
    stages: configs of the stages of a run, each with its name in `stage`; `steps` are theirs together.
    """

    method: str
    output: str
    seed: int = 0
    steps: int = 1000
    batch_size: int = 32
    accumulation: int = 1
    max_tokens: int = 0
    precision: str = "no"
    ema_decay: float = 0.999
    log_every: int = 10
    save_every: int = 500
    save_minutes: float = 0.0
    sample_every: int = 500
    keep_checkpoints: int = 2
    export: tuple[str, ...] = (*EXPORT_KINDS, "raw")
    bad_samples: str = "stop"
    trackers: tuple[str, ...] = ("tensorboard",)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    network: NetworkConfig | None = None
    data: DataConfig | None = None
    preview: PreviewConfig | None = None
    recipe: RecipeConfig | None = None
    validation: ValidationConfig | None = None
    vae: VAEMethod | None = None
    sft: SFTMethod | None = None
    consistency: ConsistencyMethod | None = None
    dmd: DMDMethod | None = None
    joint: JointMethod | None = None
    stage: str = ""
    stages: tuple[RunConfig, ...] = ()

    def __post_init__(self) -> None:
        one_of(self, "method", SECTIONS)
        counts = ("steps", "batch_size", "accumulation", "log_every", "save_every", "sample_every", "keep_checkpoints")
        at_least(self, 1, *counts)
        at_least(self, 0, "max_tokens", "save_minutes")
        within(self, 0, LARGEST_SEED, "seed")
        one_of(self, "precision", ("no", "bf16"))
        within(self, 0, 1, "ema_decay")
        one_of(self, "bad_samples", ("stop", "skip"))
        if odd := set(self.trackers) - {"tensorboard", "wandb"}:
            raise ConfigError(f"trackers must be of tensorboard and wandb, got {displayed(sorted(odd)[0])}")
        if self.bad_samples == "skip" and (self.data is None or self.data.kind == "scenes"):
            raise ConfigError("bad_samples: skip needs cached rows, which this run has not; use stop")
        if self.data is not None and self.data.kind == "scenes":
            self._check_scenes()
        if self.dmd is not None and self.dmd.fake_warmup_steps >= self.steps:
            raise ConfigError(
                f"dmd.fake_warmup_steps must be below steps, or no step trains the student, got "
                f"{self.dmd.fake_warmup_steps} of {self.steps}"
            )
        if self.joint is not None and self.consistency is not None and self.consistency.mask is not None:
            raise ConfigError(
                "consistency.mask cannot be used in method joint, whose DMD part trains on samples of the student, "
                "which have no masks; remove it or use method consistency"
            )
        self._check_validation()
        self._check_export()
        if self.sft is not None and self.sft.train_text_encoder and self.network and self.network.shards_trained:
            raise ConfigError(
                "sft.train_text_encoder trains a whole encoder beside the network, which network.shard splits over "
                "processes; set shard to false, or train the encoder in a run of its own first"
            )
        if self.network is not None and self.network.gather == "bf16" and self.precision != "bf16":
            raise ConfigError(f"network.gather bf16 needs precision bf16, got precision {self.precision}")
        self._check_optimizers()
        adapter = None if self.network is None else self.network.adapter
        if adapter is not None and adapter.type == "loha" and self.consistency and self.consistency.tangent == "jvp":
            raise ConfigError(
                "consistency.tangent jvp cannot be used with adapter.type loha, whose product in peft has no forward "
                "derivative; use tangent difference, or another type"
            )

    @property
    def encodes_live(self) -> bool:
        """True if a frozen text encoder stays in memory, because some data have no embeddings in a cache."""
        held_out = self.validation.data if self.validation is not None else None
        parts = [part for data in (self.data, held_out) if data is not None for part in data.parts]
        return any(part.kind == "scenes" or part.text_storage == "live" for part in parts)

    def _check_scenes(self) -> None:
        if self.max_tokens:
            raise ConfigError("max_tokens is for cached rows, got data.kind scenes; set a smaller batch_size")
        if self.preview is not None and self.preview.own:
            raise ConfigError(
                "preview.own needs cached rows, got data.kind scenes, which shows drawn scenes; remove it"
            )

    def _check_optimizers(self) -> None:
        for options in (self.optimizer, *([self.dmd.optimizer] if self.dmd else [])):
            if self.network is not None and self.network.shards_trained:
                if options.muon_lr:
                    raise ConfigError(
                        "muon_lr needs whole matrices, which network.shard splits over processes; set muon_lr to 0"
                    )
                if options.kind != "adamw":
                    raise ConfigError(
                        f"{options.kind} does not support tensors that network.shard splits over processes; use adamw"
                    )
            if options.kind != SCHEDULE_FREE:
                continue
            if self.dmd is not None:
                raise ConfigError(
                    f"{SCHEDULE_FREE} trains at other weights than it is evaluated at, and method {self.method} "
                    "evaluates student and fake score during training; use another optimizer.kind"
                )
            if self.ema_decay:
                raise ConfigError(f"ema_decay must be 0 with {SCHEDULE_FREE}, itself an average, got {self.ema_decay}")
            if self.stage:
                raise ConfigError(f"{SCHEDULE_FREE} cannot go on from another stage's weights; use adamw, or no stages")

    def _check_export(self) -> None:
        choices = (*EXPORT_KINDS, "raw")
        for kind in self.export:
            if kind not in choices:
                raise ConfigError(f"export must be of {', '.join(choices)}, got {displayed(kind)}")
        if self.network is None:
            if set(self.export) != set(choices):
                raise ConfigError(
                    "export is for methods that train the network, got method vae, which exports a VAE folder; remove "
                    "export"
                )
            return
        possible = EXPORT_KINDS if self.network.adapter is not None else EXPORT_KINDS[1:]
        if not set(self.export) & set(possible):
            raise ConfigError(f"export must name one of {', '.join(possible)} for this run, got {list(self.export)}")
        if self.sft is not None and self.sft.train_text_encoder and "folder" not in self.export:
            raise ConfigError("export must name folder, which holds the text encoder that is trained jointly")

    def _check_validation(self) -> None:
        if self.validation is None or self.data is None:
            return
        if self.data.kind == "scenes" and self.validation.holds_out:
            raise ConfigError("validation needs cached rows, got data.kind scenes, which is endless; remove validation")
        held_out = self.validation.data.parts if self.validation.data is not None else ()
        if both := {Path(part.folder) for part in held_out} & {Path(part.folder) for part in self.data.parts}:
            raise ConfigError(
                f"validation.data.folder must be another folder than data.folder, got {both.pop()} for both"
            )


def required(section: Section | None) -> Section:
    """Narrow the type of a section that the config's method requires."""
    if section is None:
        raise ConfigError("a section that the method requires is missing; build configs with parse_run")
    return section


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a YAML config and apply overrides, `key=value` or `section.key=value`. Raises ConfigError."""
    data = read_yaml_mapping(Path(path))
    for change in overrides:
        override(data, change)
    return parse_run(data)


def parse_run(data: dict[str, Any]) -> RunConfig:
    """Check nested plain values as a run config. Raises ConfigError that names the key."""
    if not data.get("stages"):
        return parse_one({k: v for k, v in data.items() if k != "stages"})
    stages = []
    for i, values in enumerate(stage_values(data)):
        try:
            stages.append(parse_one(values))
        except ConfigError as error:
            raise ConfigError(f"stages[{i}]: {error}") from None
    check_trained(stages)
    last = stages[-1]
    return dataclasses.replace(
        last, output=str(data["output"]), stage="", steps=sum(s.steps for s in stages), stages=tuple(stages)
    )


def check_trained(stages: typing.Sequence[RunConfig]) -> None:
    """Raise ConfigError if a stage trains other parameters than the first, whose weights it could not take over."""
    for key, of in TRAINED.items():
        for i, stage in enumerate(stages):
            if of(stage) != of(stages[0]):
                raise ConfigError(
                    f"stages[{i}] trains other parameters than the first stage: {key} must be the same in all stages; "
                    "train it as a run of its own from the export, network.model"
                )


TRAINED: dict[str, typing.Callable[[RunConfig], object]] = {
    "sft.train_text_encoder": lambda run: run.sft and run.sft.train_text_encoder,
    "sft.correspondence.blocks": lambda run: run.sft and run.sft.correspondence and run.sft.correspondence.blocks,
}
"""Keys that decide which parameters are trained, and their values; the network's are the same in all stages."""


def parse_one(data: dict[str, Any]) -> RunConfig:
    """`parse_run` of a config without stages."""
    method = data.get("method")
    if not isinstance(method, str) or method not in SECTIONS:
        raise ConfigError(f"method must be one of {', '.join(SECTIONS)}, got {displayed(method)}")
    all_sections = {name for sections in SECTIONS.values() for name in sections}
    for name in sorted((all_sections - set(SECTIONS[method])) & set(data)):
        raise ConfigError(f"the section {name} is not for method {method}, which has {', '.join(SECTIONS[method])}")
    for name in sorted(all_sections & set(data)):
        if not isinstance(data[name], dict):
            raise ConfigError(f"the section {name} must hold keys and values, got {displayed(data[name])}")
    sections = {**{name: {} for name in SECTIONS[method]}, **data}
    if isinstance(sections.get("data"), dict):
        sections["data"] = with_source_defaults(sections["data"])
    validation_data = sections.get("validation", {}).get("data")
    if isinstance(validation_data, dict):
        of_set = ("folder", "path", "kind") if validation_data.get("sources") else ()
        shared = {k: v for k, v in sections["data"].items() if k not in ("sources", "alternate", *of_set)}
        merged = {**shared, **validation_data}
        sections["validation"] = {**sections["validation"], "data": with_source_defaults(merged)}
    return parse(RunConfig, sections, "config")


def with_source_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """The data section with its keys in each of `sources` that lacks them."""
    sources = data.get("sources")
    if not sources:
        return data
    if not isinstance(sources, (list, tuple)) or not all(isinstance(source, dict) for source in sources):
        raise ConfigError(f"data.sources must be a list of sections of keys and values, got {displayed(sources)}")
    common = {k: v for k, v in data.items() if k not in ("sources", "alternate", "folder", "path", "kind")}
    return {**data, "sources": [{**common, **source} for source in sources]}


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Convert to plain values, as stored in checkpoints; a run of stages stores one in each."""
    return {k: v for k, v in dataclasses.asdict(config).items() if v is not None and k != "stages"}
