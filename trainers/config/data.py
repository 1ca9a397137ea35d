"""Sections of a run config about data: sources, their cache, endless scenes, held-out rows."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields

from .parse import ConfigError, at_least, displayed, one_of, within

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class ScenesConfig:
    """Endless scenes of data.kind "scenes", drawn by worker processes during training.

    mixture: weight per task (default: the composition set's). buffer: number of scenes that are shuffled and batched
    together. uses: passes over each scene, each with a new order of its references and new wording.
    shapes: weight per aspect ratio of the targets, width x height, as "3x4" (default: all square).
    """

    mixture: dict[str, float] = field(default_factory=dict)
    buffer: int = 512
    uses: int = 2
    shapes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(self, 1, "buffer", "uses")
        for name in ("mixture", "shapes"):
            weights: dict[str, float] = getattr(self, name)
            if weights and not (min(weights.values()) >= 0 < sum(weights.values())):
                raise ConfigError(f"data.scenes.{name} must hold weights from 0, one above 0; got {weights}")
        for shape in self.shapes:
            parts = re.fullmatch("([1-9][0-9]?)x([1-9][0-9]?)", shape)
            if not parts or not 0.5 <= int(parts[1]) / int(parts[2]) <= 2:
                raise ConfigError(f"data.scenes.shapes must hold ratios from 1x2 to 2x1, such as 3x4; got {shape!r}")


OF_ROWS = ("images", "samples", "bad_rows", "alternate")
"""Keys of DataConfig about a limited number of rows, which endless scenes are not."""


@dataclass(frozen=True)
class DataConfig:
    """Data source, and the folder of its cache (`python -m trainers.cache`).

    kind: "nano" (composition set, scenes 0 .. samples - 1 of `seed`), "scenes" (the same without end, drawn during
    training: no folder, no cache), "jsonl" (rows of the release's format), "folder" (numbered images with caption
    files), "datasets" (a Hugging Face data set saved on disk), "parquet" or "webdataset" (tars).
    path: file, folder or, of tars, a pattern; images: root of relative image paths (default: the folder of path);
    controls: of kind folder, folders of the references, relative to path (default: subfolders that are named so).
    text_storage: text embeddings in the cache in "bf16" or "fp8" (half the space; the error is printed), or "live":
    the frozen encoder stays in memory and computes them when they are needed.
    sources: several sets, each with a cache of its own, in place of folder, kind and path; they take the other keys of
    this section where they have none. alternate: "none" (every batch mixes the sources), or optimizer steps that
    alternate between the "sources", or between the "tasks" text to image and editing.
    samples: 0 = all. size: a target has at most size^2 pixels; reference_budget: all references of a row together have
    at most reference_budget^2 pixels. bad_rows: "skip" rows that cannot be used and list them in report.json, or
    "stop" at the first.
    """

    folder: str = ""
    kind: str = "nano"
    path: str | None = None
    images: str | None = None
    samples: int = 0
    seed: int = 0
    size: int = 128
    reference_budget: int = 128
    samples_per_shard: int = 1024
    workers: int = 1
    bad_rows: str = "skip"
    text_storage: str = "bf16"
    controls: tuple[str, ...] = ()
    alternate: str = "none"
    sources: tuple[SourceConfig, ...] = ()
    scenes: ScenesConfig | None = None

    def __post_init__(self) -> None:
        one_of(self, "kind", ("nano", "scenes", "jsonl", "folder", "datasets", "parquet", "webdataset"))
        one_of(self, "alternate", ("none", "sources", "tasks"))
        within(self, 0, LARGEST_SEED, "seed")
        one_of(self, "bad_rows", ("skip", "stop"))
        one_of(self, "text_storage", ("bf16", "fp8", "live"))
        if self.size % 32:
            raise ConfigError(f"size must be a multiple of 32 pixels, got {self.size}")
        at_least(self, 0, "samples", "workers")
        at_least(self, 1, "samples_per_shard")
        at_least(self, 32, "size", "reference_budget")
        if self.sources:
            self._check_sources()
        else:
            self._check_kind()

    @property
    def parts(self) -> tuple[DataConfig, ...]:
        """The sources, or this one set."""
        return self.sources or (self,)

    def _check_sources(self) -> None:
        for name in ("folder", "path"):
            if getattr(self, name):
                raise ConfigError(f"data.{name} belongs into each of data.sources, got {getattr(self, name)!r} beside")
        folders = [source.folder for source in self.sources]
        if twice := [folder for folder in folders if folders.count(folder) > 1]:
            raise ConfigError(f"each of data.sources needs a folder of its own, got {twice[0]} twice")
        weighted = [source for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            raise ConfigError("data.sources: expected a weight for every source or for none, got one for some")
        repeats = any(source.repeats > 1 for source in self.sources)
        if weighted and repeats:
            raise ConfigError("data.sources: weights say how often a source comes; remove repeats, or the weights")
        if self.alternate == "tasks" and (weighted or repeats):
            raise ConfigError("data.alternate: tasks takes every row once; remove weight and repeats of data.sources")

    def _check_endless(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in OF_ROWS and value != f.default:
                raise ConfigError(
                    f"data.{f.name} is for cached rows, got {displayed(value)} with kind scenes; remove it"
                )
        if self.text_storage == "fp8":
            raise ConfigError("data.text_storage fp8 is for cached rows; the embeddings of scenes are computed live")

    def _check_kind(self) -> None:
        if self.alternate == "sources":
            raise ConfigError("data.alternate: sources needs data.sources, several sets to alternate between")
        if self.kind == "scenes":
            self._check_endless()
        if self.controls and self.kind != "folder":
            raise ConfigError(f"data.controls goes with data.kind folder, got kind {self.kind}")
        if (self.kind == "scenes") == bool(self.folder):
            raise ConfigError(f"data.folder is for every kind but scenes; got kind {self.kind}, folder {self.folder!r}")
        if self.kind != "scenes" and self.scenes is not None:
            raise ConfigError(f"data.scenes goes with data.kind scenes, got kind {self.kind}")
        if self.kind == "scenes" and self.scenes is None:
            object.__setattr__(self, "scenes", ScenesConfig())
        if (self.kind in ("nano", "scenes")) == (self.path is not None):
            raise ConfigError(
                f"data.path is needed for every kind but nano and scenes; got kind {self.kind}, path {self.path}"
            )
        if self.kind == "nano" and (self.samples < 1 or self.samples % self.samples_per_shard):
            raise ConfigError(
                f"data.samples must be a multiple of samples_per_shard ({self.samples_per_shard}), got {self.samples}"
            )


@dataclass(frozen=True)
class SourceConfig(DataConfig):
    """One of several sets. repeats: how often an epoch has each of its rows; weight: its share of the samples, beside
    the other sources' weights and whatever their sizes, instead of its rows times repeats."""

    repeats: int = 1
    weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "repeats")
        if self.weight is not None and not self.weight > 0:
            raise ConfigError(f"weight must be above 0, got {self.weight}")
        if self.sources or self.kind == "scenes":
            raise ConfigError("data.sources takes cached sets of one kind each, got sources or scenes in one")


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out rows: their loss is logged, and the previews show them.

    share: of the rows of `data`, from 0 (none) to 0.5. data: separate data set with its own cache instead of a share;
    missing keys default to those of `data`.
    every: steps between validations (plus one at the start and one at the end). rows: at most this many rows, evenly
    spaced over all held-out rows. draws: fixed pairs of time and noise per row.
    """

    share: float = 0.0
    data: DataConfig | None = None
    every: int = 500
    rows: int = 256
    draws: int = 1

    def __post_init__(self) -> None:
        within(self, 0, 0.5, "share")
        at_least(self, 1, "every", "rows", "draws")
        if self.share and self.data is not None:
            raise ConfigError("validation takes either share or data, got both; remove one")
        if self.data is not None and self.data.kind == "scenes":
            raise ConfigError(
                "validation.data needs cached rows, got kind scenes, which is endless; choose another kind"
            )

    @property
    def holds_out(self) -> bool:
        return bool(self.share) or self.data is not None
