"""Pictures of an evaluation on disk: a run that was broken off goes on, and further systems join it later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unipic_core.replacing import replacing


class KeptPictures:
    """One system's pictures by noise seed, with the seconds that each took.

    about: all that its pictures depend on; any other answer has a folder of its own under `root`.
    """

    def __init__(self, root: Path, about: Mapping[str, object]) -> None:
        text = json.dumps(about, sort_keys=True, indent=1)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "system.json") as path:
            path.write_text(text + "\n", encoding="utf-8")

    def find(self, seed: int) -> tuple[Image.Image, float] | None:
        """The RGB picture and its seconds, if it was kept."""
        path = self.folder / f"{seed}.png"
        if not path.is_file():
            return None
        with Image.open(path) as picture:
            return picture.convert("RGB"), float(picture.info["seconds"])

    def put(self, seed: int, picture: Image.Image, seconds: float) -> None:
        info = PngInfo()
        info.add_text("seconds", repr(seconds))
        with replacing(self.folder / f"{seed}.png") as path:
            picture.save(path, pnginfo=info)


def files_stamp(*paths: Path) -> list[tuple[str, int, int]]:
    """Names, bytes and times of change of files, and of all that lie in folders: other weights, another stamp."""
    files = [file for path in paths for file in (path, *sorted(path.rglob("*"))) if file.is_file()]
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
