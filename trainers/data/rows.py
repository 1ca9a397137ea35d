"""From a record (paths or bytes of pictures, and a text) to the uint8 arrays that are encoded, or to what is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from unipic_core.conditioning.images import load_image, resize_for_vision, resize_references
from unipic_core.conditioning.picture_files import MAX_PIXELS, open_picture
from unipic_core.conditioning.prompt import special_token_in
from unipic_core.conditioning.reference_sizes import MAX_REFERENCES, REFERENCE_MULTIPLE, Size
from unipic_core.conditioning.sequence import nearest_multiple
from unipic_core.errors import UniPicError

MAX_ASPECT = 10.0
"""Pictures longer than this for their width are left out."""

LONGEST_INSTRUCTION = 8000
"""Bytes; beyond this an instruction is more than the encoder's positions may hold."""

Picture = Path | bytes
"""A file, or a file's content."""


class BadRow(UniPicError):
    """A sample that cannot be used; the message says why."""


@dataclass(frozen=True)
class Row:
    """One sample before encoding: pictures as uint8 arrays [H, W, 3]."""

    target: np.ndarray
    references: tuple[np.ndarray, ...]
    vision: tuple[np.ndarray, ...]
    prompt: str

    @property
    def shapes(self) -> str:
        sizes = [self.target.shape, *(r.shape for r in self.references)]
        return "_".join(f"{s[1]}x{s[0]}" for s in sizes)


@dataclass(frozen=True)
class Record:
    """What a data set says of one sample, with its pictures unread."""

    target: Picture
    references: tuple[Picture, ...]
    prompt: str

    def __post_init__(self) -> None:
        check_prompt(self.prompt, len(self.references))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return (self.target, *self.references)


def check_prompt(prompt: object, num_references: int) -> None:
    """BadRow if the encoder would not take it."""
    if num_references > MAX_REFERENCES:
        raise BadRow(f"{num_references} references, at most {MAX_REFERENCES} can be composed")
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRow("no instruction")
    try:
        if len(prompt.encode()) > LONGEST_INSTRUCTION:
            raise BadRow(f"the instruction is longer than {LONGEST_INSTRUCTION} bytes")
    except UnicodeEncodeError:
        raise BadRow("the instruction is not valid Unicode") from None
    if mark := special_token_in(prompt):
        raise BadRow(f"the instruction contains {mark}, a mark of the template")


def check_pictures(record: Record) -> str:
    """Digest of the prompt and of the pictures' bytes, of which only the headers are decoded; BadRow."""
    parts = [record.prompt]
    for picture in record.pictures:
        check_size(header_size(picture), picture)
        parts += identity_of(picture)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def identity_of(picture: Picture) -> list[str]:
    """The name, and a digest of the content: an edited picture may keep its name and byte count."""
    content = picture if isinstance(picture, bytes) else picture.read_bytes()
    return [name_of(picture), hashlib.blake2b(content, digest_size=16).hexdigest()]


def header_size(picture: Picture) -> Size:
    """(width, height) without decoding; BadRow if the file is missing or no picture."""
    if isinstance(picture, Path) and not picture.exists():
        raise BadRow(f"there is no picture {name_of(picture)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_picture(_opened(picture)) as image:
                return image.size
    except UniPicError as error:
        raise BadRow(f"{name_of(picture)} cannot be read as a picture: {error}") from None


def check_size(size: Size, picture: Picture) -> None:
    width, height = size
    asked = f"{name_of(picture)} is {width}x{height}"
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadRow(f"{asked}, an aspect over {MAX_ASPECT:g}")
    if width * height > MAX_PIXELS:
        raise BadRow(f"{asked}, over {MAX_PIXELS // 10**6} million pixels")


def name_of(picture: Picture) -> str:
    return picture.name if isinstance(picture, Path) else "a picture of the data set"


def _opened(picture: Picture) -> Path | io.BytesIO:
    return picture if isinstance(picture, Path) else io.BytesIO(picture)


def read_picture(picture: Picture) -> Image.Image:
    """8-bit RGB, upright, on white; BadRow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # animations: the first frame of each, without a word each
            image = load_image(_opened(picture))
    except UniPicError as error:
        raise BadRow(str(error)) from None
    check_size(image.size, picture)
    return image


def target_size(size: Size, budget: int) -> Size:
    """(width, height) for a target: its own, shrunk to budget^2 pixels if it has more, then to multiples of 32.

    32 is what the default output is rounded to; 16 would be possible, but gives four times as many shapes, and batches
    are of one shape.
    """
    width, height = size
    r = min(1.0, budget / (width * height) ** 0.5)
    return nearest_multiple(width * r, REFERENCE_MULTIPLE), nearest_multiple(height * r, REFERENCE_MULTIPLE)


def read_record(record: Record, size: int, reference_budget: int) -> Row:
    """Decode and resize; BadRow."""
    target = read_picture(record.target)
    target = target.resize(target_size(target.size, size), Image.Resampling.BICUBIC)
    return make_row(target, [read_picture(r) for r in record.references], record.prompt, reference_budget)


def make_row(target: Image.Image, references: Sequence[Image.Image], prompt: str, reference_budget: int) -> Row:
    """The references at the sizes of the shared budget; the target stays as it is."""
    resized = resize_references(references, reference_budget)
    return Row(
        np.asarray(target),
        tuple(np.asarray(r) for r in resized),
        tuple(np.asarray(resize_for_vision(r)) for r in resized),
        prompt,
    )
