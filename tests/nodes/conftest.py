"""Fixtures of the node tests that need no ComfyUI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def schemas() -> list[dict[str, Any]]:
    """The schemas of all nodes, as tests/nodes/schemas.py prints them."""
    script = Path(__file__).with_name("schemas.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
