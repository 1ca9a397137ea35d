"""The terminal's side of the command line: progress bars, warnings in one line, the names of number types."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import MODELS
from ..errors import printable as printable

DEFAULT_MODEL = MODELS / "unipic-nano"
"""What the command line composes with unless `--model` says otherwise."""

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
"""Number types by the names that the command line has for them."""


def layers_added(path: Path, strength: float, report: Any) -> str:
    return f"{printable(path.name)}: {report.matched} layers added at strength {strength:g}"


@contextmanager
def progress_bar(what: str, unit: str = "step") -> Iterator[Callable[[int, int], None]]:
    """advance(done, total) on a bar that appears at the first call."""
    from tqdm import tqdm

    bar: Any = None

    def advance(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(desc=what, unit=unit, unit_scale=unit == "B", total=total, file=sys.stderr)
        bar.update(done - bar.n)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def readable_warnings(debug: bool) -> Iterator[None]:
    """Warnings for users in one line each; other libraries' deprecations only with --debug."""
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning)
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {printable(message)}", file=sys.stderr)
        yield
