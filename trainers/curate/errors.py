"""Error class of data curation."""

from __future__ import annotations

from unipic_core.errors import UniPicError


class CurateError(UniPicError):
    """Fault in the configuration or the data that stops a run; one sentence."""
