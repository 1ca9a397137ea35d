"""Runs tests/nodes/inside in a process of its own, with ComfyUI first on the path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from comfyui import ROOT, comfyui_path  # noqa: E402


@pytest.mark.skipif(comfyui_path() is None, reason="no ComfyUI: set COMFYUI_PATH to a checkout to test the nodes in it")
def test_inside_comfyui() -> None:
    env = {**os.environ, "UNIPIC_INSIDE_COMFYUI": "1", "COMFYUI_PATH": str(comfyui_path())}
    inside = str(HERE / "inside")
    command = [sys.executable, "-m", "pytest", "-q", inside, "--confcutdir", inside, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT.parent, env=env, capture_output=True, text=True)
    print(done.stdout[-20000:])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
