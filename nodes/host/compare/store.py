"""Pictures of finished cells on the disk, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

import folder_paths
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ....unipic_core.replacing import replacing

FOLDER = "unipic-compare"
"""Folder of the cells in ComfyUI's output folder, since ComfyUI empties the temp folder when it starts."""

MOST_BYTES = 2 * 2**30
"""Size of the folder at most; the pictures that were not used for longest are removed first."""


class CellStore:
    """Pictures by key. Values are stored in float32 as the VAE gives them, so a stored picture is equal to the bit."""

    def __init__(self, folder: Path | None = None, most_bytes: int = MOST_BYTES) -> None:
        self.folder = Path(folder_paths.get_output_directory()) / FOLDER if folder is None else folder
        self.most_bytes = most_bytes

    def load(self, key: str) -> Tensor | None:
        """The IMAGE [1, H, W, 3] of a key; None if it is not stored or its file is damaged."""
        path = self._path(key)
        try:
            picture = load_file(path)["picture"]
            os.utime(path)
        except (OSError, SafetensorError, KeyError):
            return None
        return picture

    def save(self, key: str, picture: Tensor) -> None:
        """Store an IMAGE; a full or read-only disk is a line in the log."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._path(key)) as partial:
                save_file({"picture": picture.cpu().contiguous()}, partial)
            self._evict()
        except (OSError, SafetensorError) as error:
            logging.warning("UniPic: the picture is not stored in %s (%s); the comparison goes on", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _evict(self) -> None:
        """Remove the least recently used pictures beyond `most_bytes`."""
        files = sorted((f.stat().st_mtime_ns, f.stat().st_size, f) for f in self.folder.glob("*.safetensors"))
        total = sum(size for _, size, _ in files)
        for _, size, file in files[:-1]:  # never the one just written
            if total <= self.most_bytes:
                return
            with suppress(OSError):
                file.unlink()
            total -= size
