"""Types of the command line's arguments. Each raises ArgumentTypeError with one sentence."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

ENDINGS = (".png", ".webp", ".jpg", ".jpeg")


def size_argument(text: str) -> tuple[int, int]:
    """Parse "1024x768" to (1024, 768)."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1024x768, got {text!r}") from None
    return width, height


def weights_argument(text: str) -> list[float]:
    """Parse "1,4" to [1.0, 4.0]."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number for each picture such as 1,4, got {text!r}") from None


def ranges_argument(text: str) -> list[tuple[float, float]]:
    """Parse "0-1,0.2-0.5" to [(0.0, 1.0), (0.2, 0.5)]."""
    try:
        ranges = [tuple(float(end) for end in part.split("-")) for part in text.split(",")]
        return [(start, end) for start, end in ranges]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a range for each picture such as 0-1,0-0.5, got {text!r}") from None


def path_argument(text: str) -> Path:
    """Parse a path; refuse an empty one, which Path reads as the current folder, and a web address."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise argparse.ArgumentTypeError(f"expected a path, got the address {text[:100]!r}; download it first")
    return Path(text)


def lora_argument(text: str) -> tuple[Path, float]:
    """Parse "FILE" or "FILE=STRENGTH" to (path, strength)."""
    match = re.fullmatch(r"(.+)=([^=]*)", text)
    if match is None or os.path.exists(text):
        return path_argument(text), 1.0
    try:
        return Path(match[1]), float(match[2])
    except ValueError:
        if os.path.exists(match[1]):
            raise argparse.ArgumentTypeError(
                f"the strength of {match[1]} should be a number, got {match[2]!r}"
            ) from None
        return Path(text), 1.0


def dtype_argument(text: str) -> str:
    """Parse a storage dtype; "fp8" is short for "fp8_scaled"."""
    return "fp8_scaled" if text == "fp8" else text


def output_argument(text: str) -> Path:
    """Parse the path of an output picture: a known ending, in an existing, writable folder."""
    path = Path(text)
    if path.suffix.lower() not in ENDINGS:
        raise argparse.ArgumentTypeError(f"{text!r} should end in {', '.join(ENDINGS)}")
    try:
        mistake = "is a folder; name a file in it" if path.is_dir() else ""
        if not path.parent.is_dir():
            mistake = f"cannot be written: no folder {path.parent}"
        elif not mistake and not os.access(path if path.exists() else path.parent, os.W_OK):
            mistake = "may not be written; choose another place"
    except OSError as error:
        mistake = f"cannot be written: {error.strerror}"
    if mistake:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} {mistake}")
    return path
