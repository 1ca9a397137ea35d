"""Paths and devices that are none, through every command: one sentence, nothing written, nothing waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.paths import PICTURES, TINY
from unipic_core.cli import main
from unipic_core.cli.terminal import DEFAULT_MODEL

LORA = str(next((DEFAULT_MODEL / "loras").glob("*.safetensors")))
COMPOSE = ("compose", str(PICTURES / "tent.png"), "-p", "a tent", "--model", str(TINY), "--out", "out.png")
LONG = "n" * 300


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line of a command that fails."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(str(stop.code))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2, line
    assert "Errno" not in line
    return line


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", ""),
        ("convert", "", "new.safetensors"),
        ("convert", str(TINY), ""),
        ("merge", str(TINY), "", "--lora", LORA),
        ("merge", str(TINY), "new", "--lora", ""),
        (*COMPOSE, "--model", ""),
        (*COMPOSE, "--transformer", ""),
        ("compose", "", *COMPOSE[1:]),
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    arguments: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected a path, got an empty text" in said(capsys, *arguments)
    assert not list(here.iterdir())


def test_an_address_of_the_web(capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, "compose", "https://example.com/a.png", *COMPOSE[2:])
    assert "got the address 'https://example.com/a.png'; download it first" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", LONG),
        ("convert", str(TINY), f"{LONG}.safetensors"),
        ("merge", str(DEFAULT_MODEL), LONG, "--lora", LORA),
    ],
    ids=["info", "convert", "merge"],
)
def test_names_that_are_too_long(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, *arguments)
    assert "File name too long; check the path" in line
    assert len(line) < 200


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have names on Unix alone")
@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "pipe"),
        ("convert", "pipe", "new.safetensors"),
        (*COMPOSE, "--transformer", "pipe"),
        (*COMPOSE, "--lora", "pipe"),
    ],
    ids=["info", "convert", "transformer", "lora"],
)
def test_a_pipe_is_named_and_never_read(
    arguments: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(here / "pipe")
    line = said(capsys, *arguments)
    assert "pipe is" in line
    assert "not a file" in line


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_devices_that_compute_nothing_here(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    if device != "meta" and torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    line = said(capsys, *COMPOSE, "--device", device)
    assert f"this machine has no device '{device}' to compute on" in line
