"""Question templates: YAML files with a version. The bundled ones are written for this project.

Scores compare with published ones only when the benchmark's text is used: ``--templates DIR`` reads it out of a user's
checkout, as text files NAME.QUESTION.txt or as the string constants of vie_prompts.py, which is never executed.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import yaml

from .errors import JudgeError, one_line
from .values import Combine, Kind

FOLDER = Path(__file__).parent / "templates"
ROLES = ("sources", "source", "reference", "output", "sources_row")
"""sources: every source; source: the first, or the one a question is about; sources_row: all side by side in one."""


@dataclass(frozen=True)
class QuestionTemplate:
    """One question. rules: fixed text, sent first; then the pictures, each after its label; then ask.

    ``{instruction}``, ``{count}`` and ``{caption}`` are filled in. answers: names of the numbers. per_source: asked
    once per source. label: "Image {n}" where a number is wanted. constants: names in vie_prompts.py.
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
    constants: tuple[str, ...] = ()
    text_file: bool = False


@dataclass(frozen=True)
class Template:
    """``overall``: how the questions' values, each scaled to 0..10, become the case's score."""

    name: str
    version: str
    questions: tuple[QuestionTemplate, ...]
    overall: Combine = "geometric"
    grounded: bool = False
    source: str = "bundled"

    @property
    def title(self) -> str:
        return f"{self.name} {self.version} ({self.source})"


def bundled_templates() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_template(name: str, folder: Path | None = None) -> Template:
    """A template by its name; ``folder`` replaces its texts or the whole of it. Raises JudgeError."""
    path = folder / f"{name}.yaml" if folder and (folder / f"{name}.yaml").is_file() else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise JudgeError(f"there is no template {one_line(name, 60)!r}; bundled: {', '.join(bundled_templates())}")
    template = read_template(path)
    if folder is None:
        return template
    if path.parent == folder:
        return replace(template, source=str(folder))
    return _with_texts(template, folder)


def read_template(path: Path) -> Template:
    """Parse and check one file. Raises JudgeError naming the key."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        questions = tuple(_question(one) for one in values["questions"])
        template = Template(
            path.stem,
            str(values["version"]),
            questions,
            values.get("overall", "geometric"),
            bool(values.get("grounded", False)),
        )
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise JudgeError(f"{path} is not a template: {one_line(error, 120)}") from None
    if not questions or template.overall not in get_args(Combine):
        raise JudgeError(f"{path} needs questions and an overall of {', '.join(get_args(Combine))}")
    return template


def _question(values: Mapping[str, Any]) -> QuestionTemplate:
    values = dict(values)
    for name in ("pictures", "answers", "constants"):
        if name in values:
            values[name] = tuple(values[name])
    question = QuestionTemplate(**values)
    if question.kind not in get_args(Kind) or question.combine not in get_args(Combine):
        raise TypeError(f"question {question.id!r} has kind {question.kind!r} and combine {question.combine!r}")
    unknown = [role for role in question.pictures if role not in ROLES]
    if unknown:
        raise TypeError(f"question {question.id!r} shows {unknown[0]!r}; known: {', '.join(ROLES)}")
    return question


def _with_texts(template: Template, folder: Path) -> Template:
    """The template with the texts of a checkout. Raises JudgeError when it holds none of them."""
    constants = _constants(folder)
    questions = []
    for question in template.questions:
        file = folder / f"{template.name}.{question.id}.txt"
        if file.is_file():
            text = file.read_text(encoding="utf-8")
        elif question.constants and all(name in constants for name in question.constants):
            text = "\n".join(constants[name] for name in question.constants)
        else:
            raise JudgeError(
                f"{folder} has no text for question {question.id!r} of {template.name}: expected {file.name}"
                + (f", or vie_prompts.py with {', '.join(question.constants)}" if question.constants else "")
            )
        text = text.replace("<instruction>", "{instruction}").replace("{prompt}", "{instruction}")
        questions.append(replace(question, rules="", ask=text, text_file=True))
    return replace(template, questions=tuple(questions), source=f"texts of {folder}")


def _constants(folder: Path) -> dict[str, str]:
    """String constants of the first vie_prompts.py under ``folder``, read from its syntax tree."""
    found = sorted(folder.rglob("vie_prompts.py"))
    if not found:
        return {}
    try:
        tree = ast.parse(found[0].read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise JudgeError(f"{found[0]} cannot be read: {one_line(error)}") from None
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
