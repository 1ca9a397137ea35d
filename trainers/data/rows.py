"""Turn records (picture paths or bytes, and a prompt) into uint8 arrays for encoding, or a BadRow with the reason."""

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
from unipic_core.conditioning.sequence import PIXELS_PER_TOKEN, nearest_multiple
from unipic_core.errors import UniPicError

from ..digests import add_file

MAX_ASPECT = 10.0
"""Rows with a picture of a larger aspect ratio are skipped."""

LONGEST_INSTRUCTION = 8000
"""Bytes; a longer instruction may exceed the encoder's positions."""

Picture = Path | bytes
"""Path of a picture file, or its content."""


class BadRow(UniPicError):
    """Unusable sample; the message gives the reason."""


@dataclass(frozen=True)
class Row:
    """One sample before encoding: pictures as uint8 arrays [H, W, 3]; mask: of `token_mask`, or None."""

    target: np.ndarray
    references: tuple[np.ndarray, ...]
    vision: tuple[np.ndarray, ...]
    prompt: str
    mask: np.ndarray | None = None

    @property
    def shapes(self) -> str:
        sizes = [self.target.shape, *(r.shape for r in self.references)]
        return "_".join(f"{s[1]}x{s[0]}" for s in sizes)


@dataclass(frozen=True)
class Record:
    """One sample as its data set lists it, with unread pictures. mask: of the target's size, white where it trains."""

    target: Picture
    references: tuple[Picture, ...]
    prompt: str
    mask: Picture | None = None

    def __post_init__(self) -> None:
        check_prompt(self.prompt, len(self.references))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return (self.target, *self.references)


def check_prompt(prompt: object, num_references: int) -> None:
    """Raise BadRow for a prompt that the encoder rejects, or too many references."""
    if num_references > MAX_REFERENCES:
        raise BadRow(f"expected at most {MAX_REFERENCES} references, got {num_references}")
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
    """Digest the prompt and the bytes of pictures and mask, decoding only headers. Raises BadRow."""
    parts = [record.prompt]
    for picture in record.pictures:
        check_size(header_size(picture), picture)
        parts.append(picture_digest(picture))
    if record.mask is not None:
        check_mask_size(sorted(header_size(record.mask)), sorted(header_size(record.target)))  # EXIF may turn either
        parts += ["mask", picture_digest(record.mask)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def picture_digest(picture: Picture) -> str:
    """Content digest: an edited picture may keep its name and size, and equal ones may have other names."""
    if isinstance(picture, bytes):
        return hashlib.blake2b(picture, digest_size=16).hexdigest()
    try:
        digest = hashlib.blake2b(digest_size=16)
        add_file(digest, picture)
        return digest.hexdigest()
    except OSError as error:
        raise BadRow(f"the picture {name_of(picture)} cannot be read: {error.strerror or error}") from None


def header_size(picture: Picture) -> Size:
    """Read (width, height) from the header. Raises BadRow if the file is missing or not a picture."""
    try:
        if isinstance(picture, Path) and not picture.exists():
            raise BadRow(f"the picture {name_of(picture)} does not exist")
    except OSError as error:  # a name that is too long
        raise BadRow(f"the picture {name_of(picture)} cannot be read: {error.strerror or error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_picture(_opened(picture)) as image:
                return image.size
    except UniPicError as error:
        raise BadRow(f"{name_of(picture)} cannot be read as a picture: {error}") from None


def check_size(size: Size, picture: Picture) -> None:
    width, height = size
    described = f"{name_of(picture)} is {width}x{height}"
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadRow(f"{described}, an aspect ratio over {MAX_ASPECT:g}")
    if width * height > MAX_PIXELS:
        raise BadRow(f"{described}, over {MAX_PIXELS // 10**6} million pixels")


def name_of(picture: Picture) -> str:
    return picture.name[:100] if isinstance(picture, Path) else "a picture of the data set"


def _opened(picture: Picture) -> Path | io.BytesIO:
    return picture if isinstance(picture, Path) else io.BytesIO(picture)


def read_picture(picture: Picture) -> Image.Image:
    """Decode to 8-bit RGB, upright, composited on white. Raises BadRow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no warning for each animation: its first frame is used
            image = load_image(_opened(picture))
    except UniPicError as error:
        raise BadRow(str(error)) from None
    check_size(image.size, picture)
    return image


def target_size(size: Size, budget: int) -> Size:
    """(width, height) of a target: at most budget^2 pixels, rounded to multiples of 32.

    The default output size is rounded to 32 as well. 16 would be possible, but gives four times as many target sizes,
    and a micro-batch has one target size.
    """
    width, height = size
    r = min(1.0, budget / (width * height) ** 0.5)
    return nearest_multiple(width * r, REFERENCE_MULTIPLE), nearest_multiple(height * r, REFERENCE_MULTIPLE)


def read_record(record: Record, size: int, reference_budget: int) -> Row:
    """Decode and resize the pictures of a record. Raises BadRow."""
    original = read_picture(record.target)
    target = original.resize(target_size(original.size, size), Image.Resampling.BICUBIC)
    mask = None
    if record.mask is not None:
        picture = read_mask(record.mask)
        check_mask_size(picture.size, original.size)
        mask = token_mask(picture, target.size)
    references = [read_picture(r) for r in record.references]
    return make_row(target, references, record.prompt, reference_budget, mask)


# --- masks -----------------------------------------------------------------------------------------------------------


def read_mask(picture: Picture) -> Image.Image:
    """Decode a mask to 8-bit grey, upright. Raises BadRow for one with transparency, which could mean either side."""
    try:
        with open_picture(_opened(picture)) as image:
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            if has_alpha and (np.asarray(image.convert("RGBA"))[..., 3] < 255).any():
                raise BadRow(f"the mask {name_of(picture)} has transparent parts; save it as black and white")
    except (UniPicError, OSError, SyntaxError) as error:
        raise BadRow(str(error)) from None
    return read_picture(picture).convert("L")


def check_mask_size(mask: Sequence[int], target: Sequence[int]) -> None:
    """Raise BadRow for a mask that does not lie pixel by pixel over its target."""
    if tuple(mask) != tuple(target):
        raise BadRow(
            f"expected a mask of the target's size, {target[0]}x{target[1]}, got {mask[0]}x{mask[1]}; resize the mask"
        )


def token_mask(mask: Image.Image, size: Size) -> np.ndarray:
    """Share of white in each latent token of a target of this size (width, height): uint8 [h, w], 255 = all white.

    A token is a square of 16 pixels; the shares are means over its area. Raises BadRow if every share is 0.
    """
    wide, high = (side // PIXELS_PER_TOKEN for side in size)
    shares = np.asarray(mask.convert("L").resize((wide, high), Image.Resampling.BOX))
    if not shares.any():
        raise BadRow("its mask is black everywhere, so no part of it would train; remove the mask or the row")
    return shares


def make_row(
    target: Image.Image,
    references: Sequence[Image.Image],
    prompt: str,
    reference_budget: int,
    mask: np.ndarray | None = None,
) -> Row:
    """Resize the references to the shared budget; the target keeps its size, its mask is of `token_mask`."""
    resized = resize_references(references, reference_budget)
    return Row(
        np.asarray(target),
        tuple(np.asarray(r) for r in resized),
        tuple(np.asarray(resize_for_vision(r)) for r in resized),
        prompt,
        mask,
    )
