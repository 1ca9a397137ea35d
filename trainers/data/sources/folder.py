"""Captioned pictures in a folder, as LoRA trainers use them, with references beside them or in folders of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set
from pathlib import Path

from unipic_core.conditioning.picture_files import ENDINGS

from ...config.run import ConfigError, DataConfig
from ..rows import BadRow, Record
from .base import PictureRows
from .captions import decode_text

CAPTION = ".txt"
NUMBERED = re.compile(r"(.+)[_-]([0-9]{1,4})")
CONTROLS = re.compile(
    r"(controls?|conditions?|conditioning|references?|refs?|inputs?|sources?)[_-]?[0-9]*", re.IGNORECASE
)
"""Names of subfolders that hold references."""
MASKS = ("mask", "masks")
"""Names of subfolders that hold masks."""
MASK = re.compile(r"(.+)[_-]mask", re.IGNORECASE)
ANY_NAME = re.compile(r"(.+)")

Pictures = dict[str, list[Path]]
"""Name without its ending -> the files of that name."""


class Folder(PictureRows):
    """Captioned pictures in one folder (subfolders are read only for references):

        0001.png                 the target, in any supported format
        0001.txt                 its instruction
        0001_1.png, 0001_2.png   its references, in numerical order; without any the row is text to image
        0001_mask.png            its mask, optional; or 0001.png in a subfolder masks

    Numbers may start at 0, have leading zeros, and follow a hyphen. NAME_N is a reference only if a picture or caption
    NAME exists: a folder of shot_1.png + shot_1.txt, shot_2.png + shot_2.txt holds two targets. References may also lie
    in folders of their own (`data.controls`, or a subfolder named control, controls, references, ...): NAME.png or
    NAME_1.png, NAME_2.png in one folder, or NAME.png in each of several, in the order of their names. A target whose
    references are not certain is skipped with the reason.
    """

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        if not self.path.is_dir():
            raise ConfigError(f"data.path: expected a folder for data.kind folder, got the file {self.path}")
        self.root = self.path
        self.captions = {p.stem: p for p in sorted(self.path.iterdir()) if p.suffix.lower() == CAPTION}
        self.pictures = pictures_in(self.path)
        self.references = numbered(self.pictures, {*self.pictures, *self.captions})
        self.controls = [(folder, pictures_in(folder)) for folder in control_folders(self.path, data.controls)]
        folders = [p for p in sorted(self.path.iterdir()) if p.is_dir() and not self._is_control(p)]
        self.mask_folders = [(p, pictures_in(p)) for p in folders if p.name.lower() in MASKS]
        reference_names = {name for names in self.references.values() for _, name in names}
        names = (self.captions.keys() | self.pictures.keys()) - reference_names
        self.masks = {m[1]: name for name in self.pictures if (m := MASK.fullmatch(name)) and m[1] in names}
        self.targets = sorted(names - (set(self.masks.values()) - self.captions.keys()), key=natural)
        self.beside = strangers(self.targets, self.captions)
        self.in_controls = [(numbered(p, set(self.targets)), p) for _, p in self.controls]
        self.unread = unread_files(self.path, self.pictures, (NUMBERED, MASK), names)
        for folder, pictures in self.controls:
            self.unread |= unread_files(folder, pictures, (NUMBERED,), names)
        for folder, pictures in self.mask_folders:
            self.unread |= unread_files(folder, pictures, (ANY_NAME,), names)
        self.count = len(self.targets)

    @property
    def note(self) -> str:
        """Rows, and the pictures of other folders that belong to none."""
        unread = [p.name for p in sorted(self.path.iterdir()) if p.is_dir() and not self._is_read(p) and pictures_in(p)]
        notes = [super().note, *(f"the subfolder {name} is not read" for name in unread)]
        for (folder, pictures), (of_targets, _) in zip(self.controls, self.in_controls, strict=True):
            used = {name for names in of_targets.values() for _, name in names} | (set(self.targets) & set(pictures))
            if lost := sorted(set(pictures) - used):
                notes.append(f"{len(lost)} pictures of {folder.name} belong to no target, first {lost[0]}")
        for folder, pictures in self.mask_folders:
            if lost := sorted(set(pictures) - set(self.targets)):
                notes.append(f"{len(lost)} masks in {folder.name} belong to no target, first {lost[0]}")
        return "; ".join(notes)

    def _is_control(self, path: Path) -> bool:
        return any(path == folder for folder, _ in self.controls)

    def _is_read(self, path: Path) -> bool:
        return self._is_control(path) or any(path == folder for folder, _ in self.mask_folders)

    def name(self, i: int) -> str:
        return self.targets[i]

    def read(self, i: int) -> Record:
        name = self.targets[i]
        if name in self.unread:
            raise BadRow(f"{self.unread[name]} is not read as a picture; save it as PNG or JPEG, or remove it")
        references = self._references(name)
        if name not in self.captions:
            raise BadRow(f"no instruction: {name}.txt does not exist")
        try:
            content = self.captions[name].read_bytes()
        except OSError as error:
            raise BadRow(f"{name}.txt cannot be read ({error})") from None
        prompt = decode_text(content, f"{name}.txt").strip()
        return Record(only_picture(self.pictures, name), references, prompt, self._mask(name))

    def _mask(self, name: str) -> Path | None:
        """The target's mask, if it has one. Raises BadRow where it is not certain."""
        beside = self.masks.get(name)
        if beside in self.captions:
            raise BadRow(f"{beside} has a caption, so it may be a mask or a target; remove {beside}.txt or rename it")
        if beside in self.references:
            raise BadRow(f"{beside} has a numbered picture beside it ({self.references[beside][0][1]}); rename one")
        places = [(pictures, name, f" in {p.name}") for p, pictures in self.mask_folders if name in pictures]
        if beside is not None:
            places.append((self.pictures, beside, ""))
        if len(places) > 1:
            raise BadRow(f"it has several masks: {', '.join(f'{one}{where}' for _, one, where in places)}; keep one")
        return only_picture(*places[0]) if places else None

    def _references(self, name: str) -> tuple[Path, ...]:
        """The target's references in order. Raises BadRow where they are not certain."""
        beside = self.references.get(name, [])
        check_numbers(beside, self.captions)
        if nested := [(two, one) for _, one in beside for _, two in self.references.get(one, [])]:
            raise BadRow(f"{nested[0][0]} may belong to {name} or to {nested[0][1]}, itself a reference; rename it")
        if name in self.beside:
            other = self.beside[name]
            raise BadRow(
                f"{other} has no caption and no number, so it may belong to {name}; rename, caption or move it"
            )
        if not self.controls:
            return tuple(only_picture(self.pictures, reference) for _, reference in beside)
        if beside:
            where = self.controls[0][0].name
            raise BadRow(f"it has references beside it ({beside[0][1]}) and a folder of references ({where}); keep one")
        if len(self.controls) == 1:
            return self._from_one_folder(name)
        return tuple(only_picture(pictures, name, f" in {folder.name}") for folder, pictures in self.controls)

    def _from_one_folder(self, name: str) -> tuple[Path, ...]:
        folder, pictures = self.controls[0]
        several = self.in_controls[0][0].get(name, [])
        if several and name in pictures:
            raise BadRow(f"{folder.name} has {name} and {several[0][1]}; keep the one or the numbered ones")
        check_numbers(several, {})
        names = [reference for _, reference in several] or [name]
        return tuple(only_picture(pictures, one, f" in {folder.name}") for one in names)


def pictures_in(folder: Path) -> Pictures:
    """The pictures of a folder by name; its subfolders are not read."""
    pictures: Pictures = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in ENDINGS and not path.name.startswith("."):
            pictures.setdefault(path.stem, []).append(path)
    return pictures


def unread_files(
    folder: Path, pictures: Pictures, patterns: Sequence[re.Pattern[str]], targets: Set[str]
) -> dict[str, str]:
    """Map targets to a file that is named as their reference or mask, is no picture, and has none beside it."""
    unread = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (*ENDINGS, CAPTION) or path.name.startswith(".") or path.stem in pictures:
            continue
        found = [name[1] for pattern in patterns if (name := pattern.fullmatch(path.stem)) and name[1] in targets]
        if found and path.is_file():
            unread[found[0]] = path.name
    return unread


def control_folders(path: Path, asked: Sequence[str]) -> list[Path]:
    """Folders of references: those of the config (relative to `path`), else subfolders that are named so."""
    if not asked:
        return sorted(
            (p for p in path.iterdir() if p.is_dir() and CONTROLS.fullmatch(p.name)), key=lambda p: natural(p.name)
        )
    folders = [path / name for name in asked]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ConfigError(f"data.controls: expected folders of references, got {missing[0]}, which is none")
    return folders


def numbered(pictures: Pictures, targets: set[str]) -> dict[str, list[tuple[int, str]]]:
    """Map targets to the pictures NAME_1, NAME_2, ... as (number, name), in order."""
    references: dict[str, list[tuple[int, str]]] = {}
    for name in pictures:
        parts = NUMBERED.fullmatch(name)
        if parts and parts[1] in targets:
            references.setdefault(parts[1], []).append((int(parts[2]), name))
    return {target: sorted(names) for target, names in references.items()}


def check_numbers(references: Sequence[tuple[int, str]], captions: Iterable[str]) -> None:
    """Raise BadRow for references whose order or use is ambiguous."""
    numbers = [number for number, _ in references]
    for _, name in references:
        if name in captions:
            raise BadRow(f"{name} has a caption, so it may be a reference or a target; remove {name}.txt or rename")
    start = min(numbers, default=1)
    if start > 1 or numbers != list(range(start, start + len(numbers))):
        missing = sorted(set(range(min(start, 1), max(numbers) + 1)) - set(numbers))
        why = f"number {missing[0]} is missing" if missing else "a number occurs twice"
        raise BadRow(f"expected references numbered without gaps, got {numbers}: {why}")


def strangers(targets: Sequence[str], captions: Iterable[str]) -> dict[str, str]:
    """Map captioned targets to a picture NAME-something that has no caption: another trainer's reference or mask."""
    found: dict[str, str] = {}
    captioned = set(captions)
    for name in targets:
        if name not in captioned:
            ends = [m.start() for m in re.finditer(r"[_\-. ]", name)]
            for base in (name[:end] for end in reversed(ends)):
                if base in captioned:
                    found.setdefault(base, name)
                    break
    return found


def only_picture(pictures: Pictures, name: str, where: str = "") -> Path:
    paths = pictures.get(name, [])
    if len(paths) != 1:
        raise BadRow(f"expected one picture named {name}{where}, got {len(paths)}")
    return paths[0]


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Natural sorting key: 2 before 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]+)", name)]
