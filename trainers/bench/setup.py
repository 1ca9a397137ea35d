"""Judge of a run: server or recording, question templates, weights of MICo-Bench."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from unipic_core.replacing import write_json

from ..digests import digest
from ..judges.vlm import Asker, Client, JudgeConfig, JudgeError, Recorder, Replay, load_template, read_judge, read_lines
from ..judges.vlm.templates import Template
from ..judges.vlm.transfer import pictures_per_case
from .aggregates import NO_WEIGHT
from .cases import TEMPLATES, Case, Plan
from .mico_weights import read_weights

NAMED_SETTINGS = {
    "passes": "{} passes",
    "temperature": "temperature {:g}",
    "seed": "seed {}",
    "image_max_side": "{} pixels",
    "extra": "{}",
    "logprobs": "log-probabilities {}",
}
"""Form of each setting of JudgeConfig.changed_settings in a judge's name."""

Weights = Mapping[str, float] | Literal["judge", "one"]
"""Weights W of MICo-Bench: by case, asked of the judge, or 1."""


@dataclass(frozen=True)
class JudgeSetup:
    """Judge of a run: server or recording, question templates, and MICo-Bench's weights.

    templates: by task, if a checkout has a text per task. weights: None for the other benchmarks.
    """

    asker: Asker
    template: Template
    templates: Mapping[str, Template]
    weights: Weights | None

    @cached_property
    def name(self) -> str:
        """Name of the judge in scores.jsonl: all that its scores depend on beside the pictures."""
        config = self.asker.config
        texts, settings = named_texts(self.templates), named_settings(config)
        return ", ".join([config.model, self.template.title, *texts, *settings, *named_weights(self.weights)])

    def template_of(self, case: Case) -> Template:
        """Template of the case's task, or of the run."""
        return self.templates.get(case.task, self.template)

    def questions_and_pictures(self, case: Case) -> tuple[int, int]:
        """Numbers of questions and pictures of one case, at most."""
        config = self.asker.config
        kinds = case.extra.get("kinds", ())
        counts = pictures_per_case(self.template_of(case), len(case.sources), config.max_images, kinds)
        questions, pictures = (config.passes * count for count in counts)
        if self.weights == "judge":
            return questions + len(case.sources), pictures + 2 * len(case.sources)
        return questions, pictures


def named_settings(config: JudgeConfig) -> list[str]:
    """Settings that differ from their defaults and change answers, such as "3 passes"."""
    return [NAMED_SETTINGS[name].format(value) for name, value in config.changed_settings().items()]


def named_texts(templates: Mapping[str, Template]) -> list[str]:
    """Digest of the templates of a user's folder, whose texts may change without a new version; [] for bundled ones."""
    if all(template.source == "bundled" for template in templates.values()):
        return []
    return [f"texts {digest({task: asdict(template) for task, template in templates.items()})[:8]}"]


def named_weights(weights: Weights | None) -> list[str]:
    """Source of MICo-Bench's W; [] for the other benchmarks."""
    if weights is None:
        return []
    named = {"judge": "W by the judge", "one": "W = 1"}
    return [named[weights] if isinstance(weights, str) else f"W from files {digest(dict(weights))[:8]}"]


def check_options(args: argparse.Namespace, bench: str) -> None:
    """Refuse options of ``score`` that would have no effect. Raises ValueError."""
    with_judge = ("record", "template", "templates", "controls", "weights", "w_judge", "w_one", "enforce_cap")
    given = [name for name in with_judge if getattr(args, name)]
    if given and not args.judge and not args.replay:
        raise ValueError(f"{option(given[0])} needs a judge; add --judge FILE.yaml or --replay FILE")
    if args.record and args.replay:
        raise ValueError("expected --record or --replay, got both; a replay asks nothing that could be recorded")
    weights = [name for name in ("weights", "w_judge", "w_one") if getattr(args, name)]
    if len(weights) > 1:
        raise ValueError(f"expected one kind of weights, got {' and '.join(map(option, weights))}; remove one")
    if weights and bench != "mico":
        raise ValueError(f"{option(weights[0])} is for the bench mico, this run is of {bench}; remove it")


def option(name: str) -> str:
    """Option of the command line by its name in the parsed arguments."""
    return f"--{name.replace('_', '-')}"


def open_judge(args: argparse.Namespace, plan: Plan) -> JudgeSetup:
    """Open the server or the recording, the question templates, and the weights. Raises ValueError."""
    weights = open_weights(args) if plan.bench == "mico" else None
    config = read_judge(args.judge) if args.judge else None
    name = args.template or (config.template if config else None) or TEMPLATES[plan.bench]
    tasks = sorted({case.task for case in plan.cases})
    texts = {task: capped(load_template(name, args.templates, task), args.enforce_cap) for task in tasks}
    return JudgeSetup(open_asker(args, config), texts[tasks[0]], texts, weights)


def open_weights(args: argparse.Namespace) -> Weights:
    """Weights of MICo-Bench. Raises ValueError if no option says where they come from."""
    if args.w_one:
        return "one"
    if args.w_judge:
        return "judge"
    if args.weights is None:
        raise ValueError(NO_WEIGHT)
    return read_weights(args.weights)


def open_asker(args: argparse.Namespace, config: JudgeConfig | None) -> Asker:
    """Open the recording of --replay, or the server of ``config``, recorded with --record. Raises JudgeError."""
    if args.replay:
        return Replay(args.replay, config)
    assert config is not None  # without --replay a judge has a file of settings
    client = Client(config)
    return Recorder(client, args.record) if args.record else client


def capped(template: Template, enforce: bool) -> Template:
    """With ``enforce``, no mark of a case is higher than its first, as ImgEdit-Bench asks of the judge.

    Raises ValueError for templates whose answers are not lines of marks.
    """
    if not enforce:
        return template
    if any(question.kind != "lines" for question in template.questions):
        raise ValueError(f"--enforce-cap is for answers in lines of marks, as of imgedit; {template.name} has none")
    questions = tuple(replace(question, combine="capped_mean") for question in template.questions)
    return replace(template, version=f"{template.version}, capped", questions=questions)


def read_rows(path: Path, *keys: str) -> Iterator[dict[str, Any]]:
    """Read rows with a score and texts under these keys; none without the file. Raises JudgeError for others."""
    for number, row in enumerate(read_lines(path) if path.exists() else (), 1):
        score = row.get("score", "")
        if not all(isinstance(row.get(key), str) for key in keys) or not isinstance(score, (int, float, type(None))):
            raise JudgeError(f"{path}, line {number} is no row of scores; remove the line or the file")
        yield row


def read_by_judge(path: Path) -> dict[str, Any]:
    """Read a JSON object by name of the judge; {} without the file. Raises JudgeError for a damaged one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(one, dict) for one in values.values()):
        raise JudgeError(f"{path} is damaged; remove it and score again")
    return values


def write_by_judge(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object by name of the judge."""
    write_json(path, dict(values), indent=1)
