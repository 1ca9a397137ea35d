"""Names and metadata of others steer no terminal and stop no command: escape sequences, bytes that are no text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.paths import ROOT, TINY
from unipic_core.errors import printable

WIPE = "\x1b[2J\x1b]0;owned\x07"
"""Clears a terminal and names its window."""


def run(arguments: list[bytes], **environment: str) -> tuple[int, bytes]:
    command = [os.fsencode(sys.executable), b"-m", b"unipic_core", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, capture_output=True, env=env)
    return done.returncode, done.stdout + done.stderr


def test_printable() -> None:
    assert printable("é 漢 🙂.png") == "é 漢 🙂.png"
    assert printable("a\x1b[31mb\n\x07\x9b\u202egnp.\udcff") == "a\\x1b[31mb\\n\\x07\\x9b\\u202egnp.\\udcff"
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
@pytest.mark.parametrize("name", [os.fsencode(WIPE) + b"out.png", b"caf\xe9.png", b"x" * 251 + b".png"])
def test_compose_with_odd_names(tmp_path: Path, name: bytes) -> None:
    folder = os.fsencode(tmp_path)
    source = os.path.join(folder, b"in-" + name[:200] + b".png")
    with open(source, "wb") as f:
        Image.new("RGB", (20, 10), "red").save(f, "PNG")
    fast = ["--size", "32x16", "--steps", "1", "--cfg", "1", "--reference-budget", "32", "--device", "cpu"]
    out = os.path.join(folder, name)
    rest = [b"-p", b"a cat", b"--model", os.fsencode(TINY), *map(str.encode, fast), b"--out", out]
    code, said = run([b"compose", source, *rest])
    assert code == 0, said
    assert os.path.exists(out)
    assert b"\x1b" not in said
    said.decode()
    code, said = run([b"compose", source, *rest])
    assert code == 2, said
    assert b"already exists" in said
    assert b"\x1b" not in said


def test_mistakes_with_escape_sequences(tmp_path: Path) -> None:
    for arguments in (["compose", f"{WIPE}.png", "-p", "a"], ["info", f"{WIPE}"], ["convert", WIPE, "a", WIPE]):
        code, said = run([a.encode() for a in arguments])
        assert code == 2
        assert b"\x1b" not in said
        assert b"Traceback" not in said


def test_metadata_with_escape_sequences(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    layers = {"img_in.lora_A.weight": torch.ones(2, 64), "img_in.lora_B.weight": torch.ones(32, 2)}
    save_file(layers, file, {"ss_output_name": WIPE, "unipic_recipe": '{"made": {"by": "\\u001b[2J"}}'})
    code, said = run([b"info", os.fsencode(file)])
    assert code == 0, said
    assert b"\x1b" not in said


def test_a_terminal_of_another_encoding(tmp_path: Path) -> None:
    code, said = run([b"info", "漢.safetensors".encode()], PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert code == 2
    assert b"\\u6f22.safetensors" in said
