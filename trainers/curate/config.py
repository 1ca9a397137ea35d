"""STAGES.yaml as frozen dataclasses: ingest, filter, pair or decompose, prompt, synthesise, check, export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..config.parse import ConfigError, at_least, one_of, parse, within
from ..config.yaml_reader import read_yaml_mapping
from ..judges.vlm import JudgeError, ServerConfig
from .conflicts.rules import MOST_SOURCES
from .errors import CurateError

SUBJECTS = ("person", "object", "background", "photograph")
"""Kinds of source pictures."""

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class IngestConfig:
    """One set of source pictures.

    kind: "folder" (pictures below `path`; the subfolder's name is the category, unless `category` is set), "jsonl"
    (rows {image, category, name?, subject?, group?, parts?}, paths below the file's folder), "drawn" (pictures of the
    composition set with transparency: numbers of `persons`, `objects`, `backgrounds`), or "drawn_scenes" (`samples`
    drawn photographs with their parts, for decompose).
    subject: person, object, background or photograph. size: side of drawn pictures in pixels.
    """

    kind: str
    path: str | None = None
    category: str | None = None
    subject: str = "object"
    persons: int = 0
    objects: int = 0
    backgrounds: int = 0
    samples: int = 0
    size: int = 256
    split: str = "train"

    def __post_init__(self) -> None:
        one_of(self, "kind", ("folder", "jsonl", "drawn", "drawn_scenes"))
        one_of(self, "subject", SUBJECTS)
        one_of(self, "split", ("train", "heldout", "all"))
        at_least(self, 0, "persons", "objects", "backgrounds", "samples")
        within(self, 32, 2048, "size")
        if self.kind.startswith("drawn") == (self.path is not None):
            raise ConfigError(f"path is for the kinds folder and jsonl; got kind {self.kind}, path {self.path!r}")
        if self.kind == "drawn" and not self.persons + self.objects + self.backgrounds:
            raise ConfigError("kind drawn needs persons, objects or backgrounds: how many pictures to draw")
        if self.kind == "drawn_scenes" and not self.samples:
            raise ConfigError("kind drawn_scenes needs samples: how many photographs to draw")


@dataclass(frozen=True)
class FilterConfig:
    """Thresholds of one filter; None: its default. subjects: apply it to these alone (default: the filter's)."""

    least: float | None = None
    most: float | None = None
    subjects: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = (*SUBJECTS, "target")
        for subject in self.subjects:
            if subject not in known:
                raise ConfigError(f"subjects must be of {', '.join(known)}, got {subject!r}")


@dataclass(frozen=True)
class FiltersConfig:
    """Filters of a stage: name -> thresholds, `{}` for the defaults, in the order in which reasons are given."""

    filters: dict[str, FilterConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class PairConfig:
    """Composition rows: sets of sources that the conflict rules allow.

    rules: a YAML file of conflict rules, or "people" or "drawn" (bundled). rows: how many. counts: number of sources ->
    weight. always: categories that every row has. tries: proposals per source before a row is given up.
    """

    rules: str
    rows: int
    counts: dict[int, float] = field(default_factory=lambda: {2: 1.0, 3: 1.0})
    always: tuple[str, ...] = ()
    tries: int = 100

    def __post_init__(self) -> None:
        at_least(self, 1, "rows", "tries")
        if not self.counts or min(self.counts.values()) < 0 or not sum(self.counts.values()) > 0:
            raise ConfigError(f"counts must hold weights from 0, one above 0; got {self.counts}")
        for count in self.counts:
            if not 1 <= count <= MOST_SOURCES:
                raise ConfigError(f"counts must be from 1 to {MOST_SOURCES} sources, got {count}")


@dataclass(frozen=True)
class DecomposeConfig:
    """De&Re: each part of a photograph as a clean source; the photograph stays as the reference of quality.

    kind: "drawn" (exact, of drawn_scenes), "pipeline" or "endpoint" (an editing model extracts each part). Parts are
    the rows' `parts`, or asked of the judge. model, steps: of the pipeline.
    """

    kind: str = "drawn"
    model: str | None = None
    steps: int = 8
    size: int = 1024

    def __post_init__(self) -> None:
        _check_maker(self)


@dataclass(frozen=True)
class PromptConfig:
    """Source of the instructions: "templates" (phrases of the rules), "drawn" (wording of the composition set) or
    "endpoint" (the judge).
    """

    kind: str = "templates"

    def __post_init__(self) -> None:
        one_of(self, "kind", ("templates", "drawn", "endpoint"))


@dataclass(frozen=True)
class SynthesiseConfig:
    """Targets. kind: "drawn" (compositor), "pipeline" (`model`, a folder of weights) or "endpoint" (`images:`).

    attempts: a row whose target fails the check is synthesised again with another seed, at most so often in all.
    """

    kind: str = "drawn"
    model: str | None = None
    steps: int = 8
    guidance: float | None = None
    size: int = 256
    attempts: int = 3

    def __post_init__(self) -> None:
        _check_maker(self)
        within(self, 1, 10, "attempts")


@dataclass(frozen=True)
class ImagesConfig(ServerConfig):
    """Server with an images API that edits several pictures (POST base_url/images/edits).

    size: "1024x1024", or None for the server's default. extra: more form fields. price_per_call: for --dry-run, in your
    currency.
    """

    section: ClassVar[str] = "images"

    timeout: float = 300.0
    concurrency: int = 2
    size: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    price_per_call: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers(price_per_call=0.0)

    def picture_settings(self) -> list[Any]:
        """Settings on which pictures depend, beside the server; defaults of `extra` and `image_max_side` left out, so
        that paid pictures of earlier versions stay valid."""
        defaults = ImagesConfig(self.base_url, self.model)
        values = {"extra": dict(self.extra), "image_max_side": self.image_max_side}
        changed = {name: value for name, value in values.items() if value != getattr(defaults, name)}
        return [self.model, self.size, *([changed] if changed else [])]


@dataclass(frozen=True)
class ExportConfig:
    """Format of an export: "jsonl" (this project's rows), "webdataset" (tars, a parquet table), "mico" (MICo-150K)."""

    kind: str = "jsonl"
    rows_per_tar: int = 1024

    def __post_init__(self) -> None:
        one_of(self, "kind", ("jsonl", "webdataset", "mico"))
        at_least(self, 1, "rows_per_tar")


@dataclass(frozen=True)
class Stages:
    """Stages of a run, the keys of STAGES.yaml. out: folder of the run.

    judge: settings of a judge (trainers/judges/vlm), or `{replay: FILE}`; `record: FILE` beside the settings writes its
    answers down. images: the server of synthesis by endpoint. workers: processes of filters and synthesis; 0: none
    beside this one.
    """

    out: str
    ingest: tuple[IngestConfig, ...]
    filter: FiltersConfig = field(default_factory=FiltersConfig)
    pair: PairConfig | None = None
    decompose: DecomposeConfig | None = None
    prompt: PromptConfig = field(default_factory=PromptConfig)
    synthesise: SynthesiseConfig | None = None
    check: FiltersConfig = field(default_factory=FiltersConfig)
    export: tuple[ExportConfig, ...] = (ExportConfig(),)
    judge: dict[str, Any] = field(default_factory=dict)
    images: ImagesConfig | None = None
    seed: int = 1
    rows_per_shard: int = 1024
    workers: int = 1

    def __post_init__(self) -> None:
        at_least(self, 1, "rows_per_shard")
        within(self, 0, 256, "workers")
        within(self, 0, LARGEST_SEED, "seed")
        if not self.ingest:
            raise ConfigError("ingest needs at least one set of pictures")
        if self.pair is not None and self.decompose is not None:
            raise ConfigError("a run takes either pair or decompose, got both; remove one")
        composes = self.pair is not None or self.decompose is not None
        if composes != (self.synthesise is not None):
            raise ConfigError("pair (or decompose) and synthesise go together, got one of them")
        for section, uses in (("decompose", self.decompose), ("synthesise", self.synthesise)):
            if uses is not None and uses.kind == "endpoint" and self.images is None:
                raise ConfigError(f"{section}.kind endpoint needs the section images with base_url and model")
        if self.prompt.kind == "endpoint" and not self.judge:
            raise ConfigError("prompt.kind endpoint needs the section judge with base_url and model")

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.out)


def _check_maker(config: DecomposeConfig | SynthesiseConfig) -> None:
    one_of(config, "kind", ("drawn", "pipeline", "endpoint"))
    at_least(config, 1, "steps")
    within(config, 32, 4096, "size")
    if (config.kind == "pipeline") != (config.model is not None):
        raise ConfigError(f"model goes with kind pipeline, got kind {config.kind}, model {config.model!r}")


def read_stages(path: Path) -> Stages:
    """Read STAGES.yaml. Raises CurateError that names the key."""
    try:
        values = read_yaml_mapping(path)
        for section in ("filter", "check"):  # the filters stand directly below their stage
            if isinstance(values.get(section), dict):
                names = values[section]
                values[section] = {"filters": {k: {} if v is None else v for k, v in names.items()}}
        stages: Stages = parse(Stages, values, "config")
    except (ConfigError, JudgeError) as error:
        text = str(error).replace(".filters", "")
        raise CurateError(text if str(path) in text else f"{path}: {text}") from None
    return stages
