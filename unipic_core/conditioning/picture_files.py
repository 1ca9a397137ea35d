"""Open untrusted picture files: known formats and regular files only, of a size that fits into memory."""

from __future__ import annotations

import importlib
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from ..errors import UniPicError, one_line

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM")
"""Pillow's names of the accepted formats; HEIF needs the package pillow-heif.

Pillow's other readers, such as EPS, which starts Ghostscript, or SPIDER, which takes nearly any file, are never tried.
"""

ENDINGS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
"""Endings by which folders and tars are searched for pictures of FORMATS; the content decides what a file is."""

MAX_PIXELS = 178_956_970
"""Most pixels of an accepted picture (Pillow's limit against decompression bombs)."""

BYTES_PER_PIXEL = 16
"""Upper bound of the main memory for decoding a picture to RGB, in bytes per pixel: 2.9 GB at MAX_PIXELS."""

Source = str | PathLike[str] | IO[bytes]
"""Path of a file, or a file open for reading."""


def open_picture(source: Source) -> Image.Image:
    """Read a picture's header without decoding it; `load_image` decodes.

    Raises UniPicError if the file is missing, a folder, a device or a pipe, not one of FORMATS, damaged, or larger than
    MAX_PIXELS.
    """
    name = name_of(source)
    with picture_errors(name):
        if isinstance(source, (str, PathLike)):
            _check_regular(Path(source))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source, formats=formats())
        if image.width * image.height > MAX_PIXELS:
            image.close()
            raise Image.DecompressionBombError
        return image


def name_of(source: Source) -> str:
    """Name of the file for messages."""
    return str(source if isinstance(source, (str, PathLike)) else getattr(source, "name", "the picture"))


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Formats of FORMATS that this installation of Pillow reads."""
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def picture_errors(name: str) -> Iterator[None]:
    """Turn any error of Pillow into a UniPicError of one line."""
    try:
        yield
    except UniPicError:
        raise
    except UnidentifiedImageError:
        raise UniPicError(_unreadable(name)) from None
    except Image.DecompressionBombError:
        raise UniPicError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels; make it smaller first") from None
    except FileNotFoundError:
        raise UniPicError(f"no such picture: {name}; check the path") from None
    except IsADirectoryError:
        raise UniPicError(f"{name} is a folder, not a picture; name the picture inside it") from None
    except PermissionError:
        raise UniPicError(f"{name} may not be read; check its permissions") from None
    except MemoryError:
        raise UniPicError(f"{name} does not fit into memory; make it smaller first") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UniPicError(f"{name} is damaged or truncated ({one_line(error)}); save or download it again") from None


def _check_regular(path: Path) -> None:
    """Raise UniPicError for pipes, sockets and devices, on which reading may block, IsADirectoryError for folders."""
    try:
        mode = path.stat().st_mode
    except ValueError:  # a name with a null character
        raise UniPicError(f"no such picture: {str(path)!r}; check the path") from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError
    if not stat.S_ISREG(mode):
        raise UniPicError(f"expected a picture file, {path} is a device or a pipe; save the picture first")


def _unreadable(name: str) -> str:
    """Message for a file in none of FORMATS."""
    kind = _iso_brand(name)
    if kind == "HEIC" and "HEIF" not in formats():
        return f'{name} is a HEIC picture; pip install "pillow-heif", or save it as JPEG or PNG'
    if kind == "AVIF" and "AVIF" not in formats():
        return f"{name} is an AVIF picture, which this Pillow cannot read; save it as JPEG or PNG"
    return f"{name} is not a picture that can be read; use PNG, JPEG or WebP"


def _iso_brand(name: str) -> str | None:
    """Recognise AVIF or HEIC by the first bytes of a file; None for any other."""
    try:
        with open(name, "rb") as f:
            start = f.read(32)
    except (OSError, ValueError):
        return None
    if start[4:8] != b"ftyp":
        return None
    if start[8:12] in (b"avif", b"avis"):
        return "AVIF"
    return "HEIC" if start[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1") else None
