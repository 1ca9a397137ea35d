"""Estimated cost of a cache before encoding: bytes, free space, and hours at the rate of a few rows."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from unipic_core.conditioning.prompt import PROMPT_TOKENS
from unipic_core.conditioning.reference_sizes import tokens_of_budget
from unipic_core.conditioning.sequence import PIXELS_PER_TOKEN, VAE_SCALE
from unipic_core.conditioning.vision import MERGE, PATCH
from unipic_core.model.vae import ImageVAE

from ..config.run import DataConfig
from .checking import CheckedSource
from .encoding import encode_pictures
from .rows import BadRow

CHANNELS = 16
"""Of latents."""

RELEASED_TEXT_WIDTH = 3584
PROBED_ROWS = 4
LEAST_ROWS = 256
"""Rows from which on the rate is measured first."""


def text_width(folder: Path) -> int:
    """Channels of the text encoder of a pipeline folder; the released one's where its config does not say."""
    with suppress(OSError, ValueError):
        config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
        return int(config.get("hidden_size") or config["text_config"]["hidden_size"])
    return RELEASED_TEXT_WIDTH


def row_bytes(data: DataConfig, width: int | None) -> int:
    """Most bytes of a row, whose pictures fill their budgets. width: of text embeddings; None: pictures are stored."""
    references = tokens_of_budget(data.reference_budget)
    pixels = data.size**2 + references.image * PIXELS_PER_TOKEN**2
    latents = 2 * CHANNELS * pixels // VAE_SCALE**2
    if width is None:
        return latents + 3 * references.vision * (PATCH * MERGE) ** 2
    tokens = references.vision + 2 * PROMPT_TOKENS  # with the prompt, and the end without it
    return latents + tokens * (width + 4 if data.text_storage == "fp8" else 2 * width)


def announce(data: DataConfig, rows: int, width: int | None) -> None:
    """Print the size of what is missing and the free space; warn if it does not fit."""
    needed, free = rows * row_bytes(data, width), shutil.disk_usage(data.folder).free
    print(f"{rows:,} rows: at most {terabytes(needed)} in {data.folder}, where {terabytes(free)} are free")
    if needed > free:
        print("warning: that may not fit; free some, choose another data.folder, or data.text_storage fp8 or live")


def announce_hours(checked: CheckedSource, vae: ImageVAE, indices: Sequence[int], rows: int) -> None:
    """Encode a few rows, and print the hours of the latents at their rate."""
    good = [i for i in indices if i not in checked.bad][: PROBED_ROWS + 1]
    times = []
    for i in good:
        start = time.perf_counter()
        with suppress(BadRow):
            row = checked.source[i]
            encode_pictures(vae, [row.target, *row.references])
            times.append(time.perf_counter() - start)
    if len(times) > 1:
        print_hours("latents", rows, (len(times) - 1) / sum(times[1:]))  # the first one warms up


def print_hours(what: str, rows: int, rate: float) -> None:
    print(
        f"{what}: {rows:,} rows at {rate:.1f} rows a second, measured, take {rows / rate / 3600:.2f} hours", flush=True
    )


def terabytes(size: float) -> str:
    return f"{size / 1e12:.3f} TB" if size >= 1e9 else f"{size / 1e9:.3f} GB"
