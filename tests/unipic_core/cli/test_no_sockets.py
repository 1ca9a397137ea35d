"""No command opens a socket: run in a process in which opening one ends it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.paths import CONFIGS, PICTURES, ROOT, TINY
from unipic_core.cli.terminal import DEFAULT_MODEL

BLOCKED = """
import os, sys
def refuse(event, args):
    if event.startswith("socket.") and event not in ("socket.gethostname", "socket.sethostname"):
        print(f"OPENED {event} {args}", flush=True)
        os._exit(9)
sys.addaudithook(refuse)
"""

RUN = """
import importlib, sys
for command in COMMANDS:
    module, *arguments = command
    try:
        code = importlib.import_module(module).main(arguments)
    except SystemExit as stop:
        code = stop.code
    print("RAN", module, arguments[0], code, flush=True)
"""


def python(code: str, folder: Path | None = None) -> tuple[int, str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=folder)
    return done.returncode, done.stdout + done.stderr


def test_the_hook_sees_sockets() -> None:
    code, said = python(BLOCKED + "import socket\nsocket.socket()")
    assert code == 9, said


def test_no_command_opens_a_socket(tmp_path: Path) -> None:
    wide = ["--size", "32x16", "--steps", "1", "--cfg", "1", "--reference-budget", "32", "--device", "cpu"]
    cli = "unipic_core.cli"
    lora = next((DEFAULT_MODEL / "loras").glob("*.safetensors"))
    place = ["--out", str(tmp_path / "out.png")]
    commands = [
        [cli, "--help"],
        [cli, "info", str(TINY)],
        [cli, "convert", str(TINY), str(tmp_path / "c.safetensors")],
        [cli, "compose", str(PICTURES / "tent.png"), "-p", "a tent", "--model", str(TINY), *wide, *place],
        [cli, "info", str(tmp_path / "c.safetensors")],
        [cli, "merge", str(DEFAULT_MODEL), str(tmp_path / "merged"), "--lora", str(lora)],
        ["trainers.cache", "--help"],
        ["trainers.train", "--help"],
        ["trainers.evaluate", "--help"],
        ["trainers.extract", "--help"],
        ["trainers.curate.__main__", "--help"],
        ["trainers.memory", str(next(CONFIGS.glob("unipic3-*.yaml")))],
    ]
    code, said = python(BLOCKED + RUN.replace("COMMANDS", repr(commands)))
    assert code == 0, said
    ran = [line.split() for line in said.splitlines() if line.startswith("RAN")]
    assert [line[1:3] for line in ran] == [command[:2] for command in commands], said
    assert {line[-1] for line in ran} <= {"0", "None"}, said


def test_no_training_opens_a_socket(tmp_path: Path) -> None:
    """A cache, a training, and a curation."""
    config = "tests/compat/fixtures/training/config.yaml"
    shutil.copytree(ROOT / "tests" / "compat" / "fixtures" / "training", (tmp_path / config).parent)
    shutil.copytree(TINY, tmp_path / "tests" / "golden" / "tiny")
    new = ["data.folder=cache", "output=run"]
    commands = [
        ["trainers.cache", config, *new],
        ["trainers.train", config, *new],
        ["unipic_core.cli", "info", "run/export/unipic_sft.safetensors"],
    ]
    code, said = python(BLOCKED + RUN.replace("COMMANDS", repr(commands)), tmp_path)
    assert code == 0, said
    ran = [line.split()[-1] for line in said.splitlines() if line.startswith("RAN")]
    assert len(ran) == len(commands), said
    assert set(ran) <= {"0", "None"}, said
