"""Fixtures of the core's tests: the tiny golden pipeline, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.paths import GOLDEN, TINY


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_session():
    from unipic_core.pipeline import UniPicPipeline

    return UniPicPipeline.from_pretrained(TINY, torch_dtype=torch.float32, device="cpu")


@pytest.fixture
def tiny(tiny_session):
    """The tiny pipeline with empty caches."""
    tiny_session.clear_cache()
    return tiny_session
