"""Write the vendored subset, 128-pixel copies of some assets, from the full set.

    python -m trainers.nano.vendor [--files FOLDER]

All hats, the demo's pictures, and, picked by a hash, enough of both splits for every task to be drawn.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from .build_catalogue import DEMO_HELDOUT
from .catalogue import Asset, load
from .emoji import SUBSET, default_folder, key_of
from .layout import composable

SIDE, QUALITY = 128, 85
COUNTS = {("object", "train"): 105, ("object", "heldout"): 60, ("person", "train"): 42, ("person", "heldout"): 22}


def by_hash(assets: Iterable[Asset]) -> list[Asset]:
    """Sort by a hash, independently of the catalogue's order."""
    return sorted(assets, key=lambda asset: hashlib.sha256(asset.key.encode()).hexdigest())


def subset() -> list[Asset]:
    """One skin tone per person design; hats and the demo first, then by hash."""
    assets, picked = by_hash(asset for asset in load() if asset.kind == "object" or composable(asset)), []
    for (kind, split), count in COUNTS.items():
        designs: dict[str, Asset] = {}
        for asset in assets:
            if asset.kind == kind and asset.split == split:
                designs.setdefault(asset.design, asset)
        candidates = sorted(designs.values(), key=lambda asset: not (asset.is_hat or asset.design in DEMO_HELDOUT))
        picked += candidates[:count]
    return picked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, default=default_folder(), help="folder of the full set")
    paths = {key_of(path): path for path in parser.parse_args().files.glob("*.webp")}
    for old in SUBSET.glob("*.webp"):
        old.unlink()
    for asset in subset():
        picture = Image.open(paths[asset.key], formats=("WEBP",)).convert("RGBA")
        picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture.save(SUBSET / f"{asset.key}.webp", quality=QUALITY, method=6)
    files = list(SUBSET.glob("*.webp"))
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.2f} MB in {SUBSET.name}")


if __name__ == "__main__":
    main()
