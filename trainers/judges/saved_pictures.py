"""Pictures of an evaluation on disk: interrupted runs continue, and systems can be added later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unipic_core.replacing import replacing


class PictureStore:
    """Pictures of one system by noise seed, with the seconds that each took.

    about: everything the pictures depend on; each distinct value has its own folder under `root`.
    """

    def __init__(self, root: Path, about: Mapping[str, object]) -> None:
        text = json.dumps(about, sort_keys=True, indent=1)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "system.json") as path:
            path.write_text(text + "\n", encoding="utf-8")

    def find(self, seed: int) -> tuple[Image.Image, float] | None:
        """Return the stored RGB picture and its seconds, or None if there is none or it is damaged."""
        path = self.folder / f"{seed}.png"
        if not path.is_file():
            return None
        try:
            with Image.open(path, formats=("PNG",)) as picture:
                return picture.convert("RGB"), float(picture.info["seconds"])
        except (OSError, SyntaxError, ValueError, KeyError, Image.DecompressionBombError):
            return None  # cut short or replaced by another file: it is made again

    def put(self, seed: int, picture: Image.Image, seconds: float) -> None:
        """Store a picture and its seconds."""
        info = PngInfo()
        info.add_text("seconds", repr(seconds))
        with replacing(self.folder / f"{seed}.png") as path:
            picture.save(path, pnginfo=info)


def files_stamp(*paths: Path) -> list[tuple[str, int, int]]:
    """Paths, sizes and modification times of files and of the files in folders; changes when weights change."""
    files = [file for path in paths for file in (path, *sorted(path.rglob("*"))) if file.is_file()]
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def model_stamp(folder: Path) -> list[tuple[str, int, int]]:
    """`files_stamp` of a model's folder; LoRAs beside a model are not part of it."""
    return files_stamp(*sorted(part for part in folder.iterdir() if part.name != "loras"))
