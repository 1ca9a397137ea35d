"""Cases of a benchmark: sources, instruction, and the path of a system's picture.

Own cases and MultiCom-Bench are JSON lines {id, instruction, sources, truth?, task?}; GEdit-Bench is a
gedit.jsonl with its fields and input_image as a path; MICo-Bench is its checkout with the pictures beside it or in
data/MICo-Bench; ImgEdit-Bench is its basic_edit.json and OmniRef-Bench one of its lists, with the pictures beside it.
Pictures outside the folder of their list are refused: such lists are shared, and what they name is opened and sent to a
judge.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unipic_core.conditioning.reference_sizes import MAX_REFERENCES
from unipic_core.errors import printable
from unipic_core.replacing import replacing, write_json

from ..judges.scene_plan import Plan as Scenes
from ..judges.vlm import JudgeError, read_lines
from ..nano.emoji import SUBSET, Bank
from ..nano.render import render

BENCHES = ("own", "nano", "mico", "gedit", "imgedit", "multicom", "omniref")
MICO_TASKS = ("mico_bench_object_centric", "mico_bench_human_centric", "mico_bench_hoi", "mico_bench_dere")
TEMPLATES = {
    "own": "compose",
    "nano": "compose",
    "mico": "reference",
    "gedit": "edit",
    "imgedit": "imgedit",
    "multicom": "composition3",
    "omniref": "omniref",
}
"""Benchmark -> question template, unless --template or the judge's settings name another."""

OMNIREF_FOLDERS = {
    "transfer_subjects": "subject",
    "style": "style",
    "lighting": "lighting",
    "background": "background",
    "skeleton": "pose",
    "reference": "pose",
}
"""Folder of a reference in OmniRef-Bench -> its kind."""


@dataclass(frozen=True)
class Case:
    """Case of a benchmark. result: path of the picture in a system's folder.

    extra: language and intersection of GEdit-Bench; persons, the sources that show one, of MICo-Bench; kinds of the
    sources, of OmniRef-Bench.
    """

    id: str
    task: str
    instruction: str
    sources: tuple[str, ...]
    truth: str | None
    result: str
    extra: Mapping[str, Any]


def read_cases(
    bench: str, root: Path | None, n: int | None, seed: int, out: Path, size: int = Scenes.size
) -> tuple[list[Case], list[str]]:
    """Read the first ``n`` cases, and the ids of cases with more than six sources; writes nothing. Raises ValueError.

    size: side of drawn scenes in pixels, whose pictures ``draw_inputs`` writes into ``out``.
    """
    if n is not None and n < 1:
        raise ValueError(f"--n: expected at least 1 case, got {n}")
    if bench == "nano":
        return drawn_cases(n or 12, seed, out, size), []
    if root is None:
        raise ValueError(f"--root is missing; give the files of {bench}")
    if bench == "mico":
        cases = [_mico(root, task, row) for task in MICO_TASKS for row in _rows(root / f"{task}.jsonl")]
    elif bench == "gedit":
        cases = [_gedit(root, row) for row in _rows(root / "gedit.jsonl")]
    elif bench == "imgedit":
        cases = [_imgedit(root, key, row) for key, row in _object(root / "basic_edit.json").items()]
    elif bench == "omniref":
        cases = [_omniref(root.parent, row) for row in _list(root)]
    else:
        cases = [_own(root.parent, number, row) for number, row in enumerate(_rows(root))]
    left_out = [case.id for case in cases if len(case.sources) > MAX_REFERENCES]
    covered = [case for case in cases if case.id not in left_out][:n]
    if not covered:
        raise ValueError(f"{root} has no cases of at most {MAX_REFERENCES} sources; choose another --root")
    _check_names(covered, root)
    for case in covered:
        _check_characters(case)
    return covered, left_out


def _check_names(cases: Sequence[Case], root: Path) -> None:
    """Raise ValueError for two cases with one id, or with one path of their pictures, such as "a b" and "a_b"."""
    ids: set[str] = set()
    id_of: dict[str, str] = {}
    for case in cases:
        if case.id in ids:
            raise ValueError(f"{root} has two cases with the id {printable(case.id)!r}; each needs another")
        ids.add(case.id)
        other = id_of.setdefault(case.result, case.id)
        if other != case.id:
            raise ValueError(
                f"{root}: the pictures of the cases {printable(other)!r} and {printable(case.id)!r} would have one "
                "name; rename one"
            )


def _check_characters(case: Case) -> None:
    """Raise ValueError for half characters (lone surrogates), which neither a file nor a page can hold."""
    for text in (case.id, case.task, case.instruction, *case.sources, case.truth or ""):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"case {printable(case.id)}: {printable(text)[:60]!r} holds half a character; write it anew"
            ) from None


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(read_lines(path))


def _object(path: Path) -> dict[str, dict[str, Any]]:
    """Read a JSON object of objects. Raises JudgeError."""
    values = _json(path)
    if not isinstance(values, dict) or not all(isinstance(one, dict) for one in values.values()):
        raise JudgeError(f"{path} is not a JSON object of cases")
    return values


def _list(path: Path) -> list[dict[str, Any]]:
    """Read a JSON list of objects. Raises JudgeError."""
    values = _json(path)
    if not isinstance(values, list) or not all(isinstance(one, dict) for one in values):
        raise JudgeError(f"{path} is not a JSON list of cases")
    return values


def _json(path: Path) -> Any:
    """Read JSON; None if it is none. Raises JudgeError for an unreadable file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JudgeError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        return None


def _picture(folder: Path, name: object) -> str:
    """Absolute path of a picture that a list names, inside ``folder``. Raises ValueError for any other place."""
    path = folder / str(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"picture {str(name)[:80]!r} is outside {folder}; put the pictures into that folder")
    return os.path.abspath(path)


def _text(row: Mapping[str, object], name: str) -> str:
    """Text or number of a row. Raises ValueError for a missing one."""
    value = row.get(name)
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(f"a case has no {name!r}, a text: {str(row)[:80]}; add it")
    return str(value)


def file_name(text: str) -> str:
    """Make a safe file name: characters that could leave the folder become underscores."""
    return re.sub(r"[^\w.-]", "_", text).lstrip(".") or "_"


def _own(folder: Path, number: int, row: Mapping[str, object]) -> Case:
    sources = row.get("sources")
    if not isinstance(sources, list) or not sources:
        raise ValueError(f"case {number}: expected 'sources', a list of pictures, got {sources!r}")
    name = str(row.get("id", number))
    task = str(row.get("task") or ("2-3 sources" if len(sources) <= 3 else "4-6 sources"))
    truth = _picture(folder, row["truth"]) if row.get("truth") else None
    paths = tuple(_picture(folder, one) for one in sources)
    return Case(name, task, _text(row, "instruction"), paths, truth, f"{file_name(task)}/{file_name(name)}.png", {})


def _mico(root: Path, task: str, row: Mapping[str, Any]) -> Case:
    name = str(row["idx"] if row.get("idx") is not None else _text(row, "ed_idx"))
    instruction = str(row.get("refined_prompt") or _text(row, "prompt"))
    pictures = root / "data" / "MICo-Bench"
    pictures = pictures if pictures.is_dir() else root
    sources = tuple(_picture(pictures, one) for one in row.get("input", ()))
    truth = _picture(pictures, _text(row, "reference"))
    extra = {"persons": list(row.get("human_indices", ()))}
    return Case(f"{task}/{name}", task, instruction, sources, truth, f"{task}/{file_name(name)}.png", extra)


def _gedit(root: Path, row: Mapping[str, object]) -> Case:
    key, group, language = _text(row, "key"), _text(row, "task_type"), _text(row, "instruction_language")
    extra = {"language": language, "intersection": bool(row.get("Intersection_exist"))}
    source = _picture(root, _text(row, "input_image"))
    result = f"fullset/{file_name(group)}/{file_name(language)}/{file_name(key)}.png"
    return Case(f"{language}/{key}", group, _text(row, "instruction"), (source,), None, result, extra)


def _imgedit(root: Path, key: str, row: Mapping[str, object]) -> Case:
    source = _picture(root, _text(row, "id"))
    return Case(key, _text(row, "edit_type"), _text(row, "prompt"), (source,), None, f"{file_name(key)}.png", {})


def _omniref(folder: Path, row: Mapping[str, Any]) -> Case:
    """Case of OmniRef-Bench, by its ``index``; the folder of each reference says its kind."""
    name, names = _text(row, "index"), row.get("edit_image")
    if not isinstance(names, list) or not names:
        raise ValueError(f"case {name}: expected 'edit_image', a list of pictures, got {names!r}")
    folders = [Path(str(one)).parent.name for one in names]
    unknown = [one for one in folders if one not in OMNIREF_FOLDERS]
    if unknown:
        raise ValueError(
            f"case {name}: a reference in {unknown[0]!r} has no kind; expected {', '.join(OMNIREF_FOLDERS)}"
        )
    kinds = [OMNIREF_FOLDERS[one] for one in folders]
    sources = tuple(_picture(folder, one) for one in names)
    category = _text(row, "category")
    return Case(name, category, _text(row, "prompt"), sources, None, f"{file_name(name)}.png", {"kinds": kinds})


def drawn_scenes(n: int, seed: int, size: int) -> tuple[Bank, Scenes]:
    """Unseen assets at the resolution of this size, and scenes of them."""
    return Bank.open(size=size), Scenes(max(2, n), seed, progress=False, size=size)


def drawn_cases(n: int, seed: int, out: Path, size: int = Scenes.size) -> list[Case]:
    """Cases of scenes of unseen assets, whose sources and truth ``draw_inputs`` writes into ``out``/inputs."""
    bank, plan = drawn_scenes(n, seed, size)
    folder = Path(os.path.abspath(out)) / "inputs"
    cases = []
    for index in range(n):
        scene = plan.scene(bank, index)
        count = 1 if scene.edit else len(scene.order)
        sources = tuple(str(folder / f"{index}_{number}.png") for number in range(1, count + 1))
        truth, result = str(folder / f"{index}_truth.png"), f"{scene.task}/{index}.png"
        cases.append(Case(str(index), scene.task, scene.instruction, sources, truth, result, {"scene": index}))
    return cases


def draw_inputs(plan: Plan, anew: bool) -> None:
    """Draw the sources and truths of a run of drawn scenes: all of them ``anew``, or those that are missing."""
    bank, scenes = plan.scenes()
    for index, case in enumerate(plan.cases):
        paths = [Path(path) for path in (*case.sources, case.truth) if path]
        if not anew and all(path.exists() for path in paths):
            continue
        sample = render(bank, scenes.scene(bank, index))
        for path, picture in zip(paths, (*sample.references, sample.target), strict=True):
            if anew or not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as partial:
                    picture.save(partial)


def _with_paths(case: Case, change: Callable[[str], str]) -> Case:
    """Case with changed paths of its sources and its truth."""
    truth = None if case.truth is None else change(case.truth)
    return replace(case, sources=tuple(change(one) for one in case.sources), truth=truth)


def _place(path: str, folder: str) -> str:
    """Path relative to ``folder`` if it is inside, with forward slashes."""
    return Path(path).relative_to(folder).as_posix() if Path(path).is_relative_to(folder) else path


@dataclass(frozen=True)
class Plan:
    """Run of a benchmark, stored as bench.json: its cases, and the systems by label.

    Pictures inside the run's folder are stored by their place in it, so that the folder can be moved.
    """

    bench: str
    seed: int
    cases: tuple[Case, ...]
    not_covered: tuple[str, ...]
    systems: Mapping[str, Mapping[str, Any]]
    size: int = Scenes.size
    """Side of drawn scenes in pixels."""
    assets: str = ""
    """Digest of the assets of drawn scenes; empty in folders of earlier versions and of other benchmarks."""

    def save(self, out: Path) -> None:
        """Write bench.json."""
        folder = os.path.abspath(out)
        cases = [asdict(_with_paths(case, lambda one: _place(one, folder))) for case in self.cases]
        write_json(out / "bench.json", asdict(replace(self, cases=())) | {"cases": cases}, indent=1)

    def with_systems(self, systems: Mapping[str, Mapping[str, object]]) -> Plan:
        """Plan with further systems; those of the same label are replaced."""
        return replace(self, systems={**self.systems, **systems})

    def scenes(self) -> tuple[Bank, Scenes]:
        """Assets and scenes of a run of drawn scenes. Raises JudgeError if they were drawn from other assets."""
        bank, scenes = drawn_scenes(len(self.cases), self.seed, self.size)
        if self.assets not in ("", bank.digest):
            raise JudgeError(
                f"the scenes of this run were drawn from other assets than {bank.count}; set UNIPIC_DATA to the folder "
                f"of those (the bundled ones: {SUBSET}), or start a run in another --out"
            )
        return bank, scenes

    @classmethod
    def load(cls, out: Path) -> Plan:
        """Read bench.json. Raises JudgeError if the folder holds no run."""
        try:
            data = json.loads((out / "bench.json").read_text(encoding="utf-8"))
            folder = os.path.abspath(out)
            stored = [Case(**{**one, "sources": tuple(one["sources"])}) for one in data["cases"]]
            cases = tuple(_with_paths(case, lambda one: os.path.join(folder, one)) for case in stored)
            # Folders of earlier versions are without the last two.
            drawn = {name: data[name] for name in ("size", "assets") if name in data}
            return cls(data["bench"], data["seed"], cases, tuple(data["not_covered"]), data["systems"], **drawn)
        except (OSError, ValueError, KeyError, TypeError):
            raise JudgeError(
                f"{out} holds no run of trainers.bench; start with python -m trainers.bench run --out {out}"
            ) from None
