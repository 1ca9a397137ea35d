"""Terminal output of the command line: progress bars, one-line warnings; names of dtypes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import MODELS
from ..errors import message_of as message_of
from ..errors import printable as printable

DEFAULT_MODEL = MODELS / "unipic-nano"
"""Default of `--model`: the bundled unipic-nano."""

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
"""Name on the command line -> name of the torch dtype."""


def layers_added(path: Path, strength: float, report: Any) -> str:
    return f"{printable(path.name)}: {report.matched} layers added at strength {strength:g}"


@contextmanager
def progress_bar(label: str, unit: str = "step") -> Iterator[Callable[[int, int], None]]:
    """Yield advance(done, total), which draws a progress bar; the bar appears at the first call."""
    from tqdm import tqdm

    bar: Any = None

    def advance(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(desc=label, unit=unit, unit_scale=unit == "B", total=total, file=sys.stderr)
        bar.update(done - bar.n)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def readable_warnings(debug: bool) -> Iterator[None]:
    """Print warnings for users in one line each; other libraries' deprecations only with --debug."""
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning)
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {printable(message)}", file=sys.stderr)
        yield
