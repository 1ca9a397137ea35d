"""The condition encoder's files: which of their weights make hidden states."""

from __future__ import annotations

from .files import PathLike, open_weights

HEAD = "lm_head."
"""Start of the names of the head over the vocabulary, which is not needed."""


def encoder_parameters(folder: PathLike) -> int:
    """Parameters of a text_encoder/ folder that make hidden states, from the files' headers. CheckpointError."""
    weights = open_weights(folder)
    return sum(weights.count(name) for name in weights if not name.startswith(HEAD))
