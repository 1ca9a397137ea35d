"""Repositories as the Hugging Face cache lays them out: models--OWNER--NAME/snapshots/HASH, with links to blobs."""

from __future__ import annotations

import re
from pathlib import Path

from .files import PathLike

_HASH = re.compile(r"[0-9a-fA-F]{4,64}")


def model_folder(path: PathLike) -> Path:
    """Return `path`, or the snapshot of a repository's folder in the cache: that of refs/main, else the newest one."""
    path = Path(path)
    snapshots = path / "snapshots"
    if not path.name.startswith("models--") or not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    try:
        with open(main, "rb") as file:
            name = file.read(100).decode("ascii", "replace").strip()
    except OSError:
        name = ""
    if _HASH.fullmatch(name) and (snapshots / name).is_dir():
        return snapshots / name
    folders = [folder for folder in snapshots.iterdir() if folder.is_dir()]
    return max(folders, key=lambda folder: folder.stat().st_mtime_ns, default=path)
