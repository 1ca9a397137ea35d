"""Question templates: versioned YAML files. The bundled ones are written for this project.

Scores are comparable with published ones only with the benchmark's texts: ``--templates DIR`` reads them from a user's
checkout, as text files NAME.QUESTION.txt or as string constants of vie_prompts.py, which is never executed.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from ...config.yaml_reader import ConfigError, read_yaml_mapping
from .errors import JudgeError, one_line
from .values import Combine, Kind

FOLDER = Path(__file__).parent / "templates"
PLACEHOLDERS = ("<instruction>", "{prompt}", "<edit_prompt>")
"""The instruction in the texts of the benchmarks."""

SOURCE_KINDS = ("subject", "style", "lighting", "background")
ROLES = ("sources", "source", "reference", "output", "sources_row", *SOURCE_KINDS)
"""sources: every source; source: the first, or the one of the question; sources_row: all in one picture; subject,
style, lighting, background: every source of that kind, if there are any."""


@dataclass(frozen=True)
class QuestionTemplate:
    """Question of a template. rules: constant text, sent first; then the labelled pictures; then ask.

    ``{instruction}``, ``{count}``, ``{caption}`` and ``{answers}`` are filled in. answers: names of the numbers; needs:
    answer -> kind of source without which it is left out. per_source: asked once per source. constants: names in
    vie_prompts.py. task_texts: file of a checkout with a text per task.
    """

    id: str
    kind: Kind
    pictures: tuple[str, ...]
    rules: str
    ask: str
    answers: tuple[str, ...] = ("score",)
    low: float = 0.0
    high: float = 10.0
    combine: Combine = "min"
    per_source: bool = False
    per_source_answers: bool = False
    needs: Mapping[str, str] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    task_texts: str = ""
    text_file: bool = False


@dataclass(frozen=True)
class Template:
    """Questions about a case. overall: combination of their values, each scaled to 0..10, into the case's score."""

    name: str
    version: str
    questions: tuple[QuestionTemplate, ...]
    overall: Combine = "geometric"
    grounded: bool = False
    source: str = "bundled"

    @property
    def title(self) -> str:
        """Name, version and origin, part of a judge's name."""
        return f"{self.name} {self.version} ({self.source})"


def bundled_templates() -> list[str]:
    """Names of the bundled templates."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_template(name: str, folder: Path | None = None, task: str = "") -> Template:
    """Load a template by name; ``folder`` replaces its texts (those of ``task``), or all of it. Raises JudgeError."""
    path = folder / f"{name}.yaml" if folder and (folder / f"{name}.yaml").is_file() else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise JudgeError(f"template: expected one of {', '.join(bundled_templates())}, got {one_line(name, 60)!r}")
    template = read_template(path)
    if folder is None:
        return template
    if path.parent == folder:
        return replace(template, source=str(folder))
    return _with_texts(template, folder, task)


def read_template(path: Path) -> Template:
    """Read and check a template file. Raises JudgeError that names the key."""
    try:
        values = read_yaml_mapping(path)
        questions = tuple(_question(one) for one in values["questions"])
        template = Template(
            path.stem,
            str(values["version"]),
            questions,
            values.get("overall", "geometric"),
            bool(values.get("grounded", False)),
        )
    except KeyError as error:
        raise JudgeError(f"{path} is not a template: the key {error} is missing") from None
    except (ConfigError, TypeError, AttributeError) as error:
        raise JudgeError(f"{path} is not a template: {one_line(error, 120)}") from None
    if not questions or template.overall not in get_args(Combine):
        raise JudgeError(f"{path} needs questions, and overall must be one of {', '.join(get_args(Combine))}")
    return template


def _question(values: Mapping[str, Any]) -> QuestionTemplate:
    values = dict(values)
    for name in ("pictures", "answers", "constants"):
        if name in values:
            values[name] = tuple(values[name])
    unknown = sorted(set(values) - {one.name for one in fields(QuestionTemplate)})
    if unknown:
        raise TypeError(f"unknown key {unknown[0]!r} of a question")
    for name in ("id", "kind", "pictures", "rules", "ask"):
        values[name]  # raises KeyError
    question = QuestionTemplate(**values)
    if question.kind not in get_args(Kind) or question.combine not in get_args(Combine):
        raise TypeError(f"question {question.id!r} has kind {question.kind!r} and combine {question.combine!r}")
    roles = [role for role in (*question.pictures, *question.needs.values()) if role not in ROLES]
    if roles:
        raise TypeError(f"question {question.id!r} shows {roles[0]!r}; known: {', '.join(ROLES)}")
    return question


def _with_texts(template: Template, folder: Path, task: str) -> Template:
    """Replace the texts of a template by those of a checkout. Raises JudgeError if one is missing."""
    constants = _constants(folder)
    questions = []
    for question in template.questions:
        file = folder / f"{template.name}.{question.id}.txt"
        if file.is_file():
            text = file.read_text(encoding="utf-8")
        elif question.constants and all(name in constants for name in question.constants):
            text = "\n".join(constants[name] for name in question.constants)
        elif question.task_texts and (folder / question.task_texts).is_file():
            text = _task_text(folder / question.task_texts, task)
        else:
            raise JudgeError(
                f"{folder} has no text for question {question.id!r} of {template.name}: expected {file.name}"
                + (f", or vie_prompts.py with {', '.join(question.constants)}" if question.constants else "")
                + (f", or {question.task_texts} with a text per task" if question.task_texts else "")
            )
        for placeholder in PLACEHOLDERS:
            text = text.replace(placeholder, "{instruction}")
        questions.append(replace(question, rules="", ask=text, text_file=True))
    return replace(template, questions=tuple(questions), source=f"texts of {folder}")


def _task_text(path: Path, task: str) -> str:
    """Text of a task in a JSON object. Raises JudgeError."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))[task]
    except (OSError, ValueError, KeyError, TypeError):
        name = one_line(task, 60)
        raise JudgeError(f"{path} has no text for {name!r}; expected a JSON object of texts by task") from None
    return str(text)


def _constants(folder: Path) -> dict[str, str]:
    """String constants of the first vie_prompts.py under ``folder``, from its syntax tree."""
    files = sorted(folder.rglob("vie_prompts.py"))
    if not files:
        return {}
    try:
        tree = ast.parse(files[0].read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise JudgeError(f"{files[0]} cannot be read: {one_line(error)}") from None
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
