"""Runs tests/nodes/inside in a process of its own, with ComfyUI first on the path."""

import os
import subprocess
import sys

import pytest

from tests.nodes.comfyui import ROOT, comfyui_path


@pytest.mark.skipif(comfyui_path() is None, reason="no ComfyUI: set COMFYUI_PATH to a checkout to test the nodes in it")
def test_inside_comfyui() -> None:
    env = {**os.environ, "UNIPIC_INSIDE_COMFYUI": "1", "COMFYUI_PATH": str(comfyui_path())}
    inside = str(ROOT / "tests" / "nodes" / "inside")
    command = [sys.executable, "-m", "pytest", "-q", inside, "--confcutdir", inside, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT.parent, env=env, capture_output=True, text=True)
    print(done.stdout[-20000:])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
