"""`python -m tests.nodes.check_types`: mypy over nodes/, as the package that ComfyUI imports.

The pack's root is a package whose folder's name is no identifier, and which the nodes' relative imports pass through.
So mypy sees it under another name, by a link. ComfyUI's own modules may be absent: they count as Any.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "unipic_pack").symlink_to(ROOT, target_is_directory=True)
        config, cache = str(ROOT / "pyproject.toml"), str(ROOT / ".mypy_cache" / "nodes")
        command = [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", cache]
        environment = {**os.environ, "MYPYPATH": folder}
        return subprocess.call([*command, "-p", "unipic_pack.nodes"], env=environment, cwd=folder)


if __name__ == "__main__":
    sys.exit(main())
