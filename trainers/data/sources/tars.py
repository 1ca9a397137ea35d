"""Rows in WebDataset tars: files of one name, which differ after its first dot, are one row.

0001.jpg                       target; also 0001.target.png, 0001.output_image.png
0001.txt                       instruction; also 0001.json with the key instruction, caption or prompt
0001.0.jpg, 0001.1.jpg         references, by number; also 0001.input_0.png, 0001.reference_1.png, 0001.ref1.jpg
0001.mask.png                  mask of the target, optional; also 0001.target_mask.png, 0001.output.mask.png
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from unipic_core.conditioning.picture_files import ENDINGS

from ...config.run import ConfigError, DataConfig
from ..rows import BadRow, Record
from .base import PictureRows
from .captions import decode_text

PICTURE = rf"(?:{'|'.join(ending[1:] for ending in ENDINGS)})"
NUMBERED = r"(?:(?:input|input_images?|image|ref|reference|references|control|cond)[._-]?)?([0-9]{1,4})"
MASKING = r"(?:(?:target|output|output_image)[._-])?mask"
TARGET = re.compile(rf"(?:(?:target|output|output_image)\.)?{PICTURE}", re.IGNORECASE)
REFERENCE = re.compile(rf"{NUMBERED}\.{PICTURE}", re.IGNORECASE)
MASK = re.compile(rf"{MASKING}\.{PICTURE}", re.IGNORECASE)
ANY_PICTURE = re.compile(rf"(?:.*\.)?{PICTURE}", re.IGNORECASE)
REFERENCE_OR_MASK = re.compile(rf"(?:{NUMBERED}|{MASKING})\.[^.]*", re.IGNORECASE)
"""Files that are named as a reference or a mask, whatever their ending."""

LABEL = re.compile(
    r"(?:.*\.)?(?:txt|text|caption|transcript|jsn|jsonl?|ya?ml|xml|csv|tsv|html|md"
    r"|cls2?|class|count|index|inx|id|key|uid|url|meta|info|score)",
    re.IGNORECASE,
)
"""Texts, labels and numbers that tars carry beside the pictures; of these txt and json are read."""

ARRAY = re.compile(
    r"(?:.*\.)?(?:np[yz]|pth?|ten|tb|mp|msg|cbor|pyd|pickle|pkl|safetensors|wav|flac|mp3|ogg|mp4|webm|mov)",
    re.IGNORECASE,
)
"""Arrays, sound and film that tars carry beside the pictures; one named as a reference or a mask may be meant as it."""

PROMPT_KEYS = ("instruction", "caption", "prompt")


class Member(NamedTuple):
    """A file of a row: its name after the row's, and where its bytes are in the tar."""

    field: str
    offset: int
    size: int


class TarRow(NamedTuple):
    tar: Path
    name: str
    members: tuple[Member, ...]


class Tars(PictureRows):
    """WebDataset tars: their headers are read once, pictures and texts from where they lie."""

    needs_path = False

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        self.tars = tar_files(str(data.path))
        self.rows: list[TarRow] = []
        for tar in tqdm(self.tars, unit=" tars", desc="tars", leave=False, disable=len(self.tars) < 2):
            self.rows += tar_rows(tar)
            if data.samples and len(self.rows) >= data.samples:
                break
        self.count = len(self.rows)

    def name(self, i: int) -> str:
        return f"{self.rows[i].name} in {self.rows[i].tar.name}"

    def read(self, i: int) -> Record:
        return read_tar_row(self.rows[i])


def tar_files(path: str) -> list[Path]:
    """The tars of a folder, of a pattern (`train-{000..127}.tar`, `train-*.tar`), or the one file; ConfigError."""
    if Path(path).is_dir():
        tars = sorted(Path(path).glob("*.tar"))
    else:
        tars = [Path(name) for one in expanded(path) for name in (sorted(glob.glob(one)) if "*" in one else [one])]
    missing = [tar for tar in tars if not tar.is_file()]
    if missing or not tars:
        raise ConfigError(
            f"data.path: expected tars, a folder of them or a pattern as train-{{000..127}}.tar, got {path}; "
            + (f"{missing[0]} does not exist" if missing else "there is no tar")
        )
    return tars


def expanded(pattern: str) -> list[str]:
    """Numbered names of a pattern with {first..last}, as shells and WebDataset write it."""
    parts = re.fullmatch(r"(.*?)\{([0-9]+)\.\.([0-9]+)\}(.*)", pattern)
    if not parts:
        return [pattern]
    start, first, last, end = parts.groups()
    return [f"{start}{n:0{len(first)}d}{rest}" for n in range(int(first), int(last) + 1) for rest in expanded(end)]


def tar_rows(tar: Path) -> Iterator[TarRow]:
    """The rows of a tar, in order, from its headers alone. Raises ConfigError for what is no plain tar."""
    name = ""
    members: list[Member] = []
    try:
        with tarfile.open(tar, "r:") as opened:
            for info in opened:
                if not info.isfile():
                    continue
                folder, _, file = info.name.rpartition("/")
                base, _, field = file.partition(".")
                own = f"{folder}/{base}" if folder else base
                if own != name and members:
                    yield TarRow(tar, name, tuple(members))
                    members = []
                name = own
                members.append(Member(field, info.offset_data, info.size))
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"{tar} is not an uncompressed tar ({error}); unpack or repack it") from None
    if members:
        yield TarRow(tar, name, tuple(members))


def read_member(row: TarRow, member: Member) -> bytes:
    with open(row.tar, "rb") as file:
        file.seek(member.offset)
        content = file.read(member.size)
    if len(content) < member.size:
        raise BadRow(f"{row.tar.name} ends within {row.name}.{member.field}")
    return content


def read_tar_row(row: TarRow) -> Record:
    """Raises BadRow for a row whose pictures cannot be paired with certainty."""
    targets = [m for m in row.members if TARGET.fullmatch(m.field)]
    numbered = sorted((int(r[1]), m) for m in row.members if (r := REFERENCE.fullmatch(m.field)))
    masks = [m for m in row.members if MASK.fullmatch(m.field)]
    known = {*targets, *masks, *(m for _, m in numbered)}
    for member in row.members:
        if member not in known:
            check_extra(row, member)
    if len(targets) != 1:
        names = ", ".join(f"{row.name}.{m.field}" for m in targets) or "none"
        raise BadRow(f"expected one target {row.name}.png (or jpg, ...), got {names}")
    if len(masks) > 1:
        raise BadRow(f"expected one mask, got {', '.join(f'{row.name}.{m.field}' for m in masks)}; remove the others")
    numbers = [number for number, _ in numbered]
    if numbers and numbers != list(range(min(numbers[0], 1), min(numbers[0], 1) + len(numbers))):
        raise BadRow(f"expected references numbered without gaps from 0 or 1, got {numbers}")
    references = tuple(read_member(row, m) for _, m in numbered)
    mask = read_member(row, masks[0]) if masks else None
    return Record(read_member(row, targets[0]), references, _prompt(row), mask)


def check_extra(row: TarRow, member: Member) -> None:
    """Raise BadRow for a file beside the row's pictures that may be meant as one of them."""
    name = f"{row.name}.{member.field}".rstrip(".")
    if ANY_PICTURE.fullmatch(member.field):
        raise BadRow(f"{name} is neither target, mask nor numbered reference; rename or remove it")
    is_array = ARRAY.fullmatch(member.field) and not REFERENCE_OR_MASK.fullmatch(member.field)
    if not is_array and not LABEL.fullmatch(member.field):
        raise BadRow(f"{name} is read neither as a picture nor as a label; save it as PNG or JPEG, or remove it")


def _prompt(row: TarRow) -> str:
    by_field = {m.field.lower(): m for m in row.members}
    if "txt" in by_field:
        return decode_text(read_member(row, by_field["txt"]), f"{row.name}.txt").strip()
    if "json" not in by_field:
        raise BadRow(f"no instruction: there is neither {row.name}.txt nor {row.name}.json")
    try:
        values = json.loads(decode_text(read_member(row, by_field["json"]), f"{row.name}.json"))
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{row.name}.json is not valid JSON ({error})") from None
    texts = [values[key] for key in PROMPT_KEYS if isinstance(values, dict) and key in values]
    if len(texts) != 1:
        raise BadRow(f"{row.name}.json: expected one of the keys {', '.join(PROMPT_KEYS)}, got {len(texts)} of them")
    return texts[0]
