"""PNG bytes of pictures."""

from __future__ import annotations

import io

from PIL import Image


def png(picture: Image.Image) -> bytes:
    """PNG bytes; equal pictures give equal bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
