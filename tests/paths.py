"""Folders of this checkout that tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
TINY = GOLDEN / "tiny"
"""A pipeline folder whose network, VAE and text encoder are tiny and random."""
PICTURES = ROOT / "pictures"
"""The bundled pictures."""
CONFIGS = ROOT / "trainers" / "configs"
