"""Pictures from a server with an images API: POST base_url/images/edits, several `image[]` and a prompt."""

from __future__ import annotations

import base64
import binascii
import io
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from unipic_core.conditioning.images import load_image
from unipic_core.errors import UniPicError

from ...judges.vlm import AnswerError, Endpoint, Picture, load_picture, png_of
from ...judges.vlm.errors import one_line
from ..config import ImagesConfig

PATH = "/images/edits"


class ImagesClient:
    """Client of one server; thread-safe."""

    def __init__(self, config: ImagesConfig) -> None:
        self.config = config
        self.endpoint = Endpoint(config)

    def edit(self, pictures: Sequence[Path], prompt: str, seed: int) -> bytes:
        """PNG of the new picture. Raises AnswerError if this request fails, JudgeError if all would."""
        loaded = [load_picture(path, self.config.image_max_side) for path in pictures]
        fields = {
            "model": self.config.model, "prompt": prompt, "n": "1", "seed": str(seed), "response_format": "b64_json",
            **({"size": self.config.size} if self.config.size else {}), **self.config.extra,
        }  # fmt: skip
        body, content_type = multipart(fields, loaded)
        return read_picture(self.endpoint.post(PATH, body, content_type).data)

    @property
    def notice(self) -> str:
        """Host that pictures go to, for a notice before a run."""
        host = self.endpoint.host
        where = "which is this machine" if self.endpoint.is_local else "which is NOT this machine"
        return f"to {host}, {where}, at most {self.config.image_max_side} pixels a side"


def multipart(fields: Mapping[str, str], pictures: Sequence[Picture]) -> tuple[bytes, str]:
    """Body and content type of a form with several files named image[]."""
    boundary = secrets.token_hex(16)
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for number, picture in enumerate(pictures, 1):
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image[]"; filename="image_{number}.png"\r\n'
            "Content-Type: image/png\r\n\r\n"
        )
        parts.append(head.encode() + picture.png + b"\r\n")
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


def read_picture(data: Mapping[str, object]) -> bytes:
    """Picture of an answer as PNG. Raises AnswerError: nothing but inline base64 is read, no address is followed."""
    entries = data.get("data")
    entry = entries[0] if isinstance(entries, list) and entries else None
    text = entry.get("b64_json") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        hint = "an address, which is not followed" if isinstance(entry, dict) and "url" in entry else one_line(data, 60)
        raise AnswerError("unparsed", f"expected data[0].b64_json, got {hint}")
    try:
        picture = load_image(io.BytesIO(base64.b64decode(text, validate=True)))
    except (binascii.Error, ValueError, UniPicError) as error:
        raise AnswerError("picture", f"the answer holds no picture ({one_line(error, 80)})") from None
    return png_of(picture)
