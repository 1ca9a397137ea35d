"""Small files written beside their place and renamed to it, so that nobody ever sees half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A file to write, with `path`'s ending, renamed to `path` at the end; on any failure removed, an older one stays.

    Weights go through `saving.written_aside`, which looks at the free space first.
    """
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
