"""A layout asked of the user's own OpenAI-compatible server.

Its address comes from the environment alone: an address in a workflow would send pictures wherever the workflow's
author likes. Redirects are not followed, and a failure is one sentence.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from ...unipic_core.errors import UniPicError

URL, MODEL, KEY = "UNIPIC_LAYOUT_URL", "UNIPIC_LAYOUT_MODEL", "UNIPIC_LAYOUT_KEY"
"""Environment variables: the base address, such as http://localhost:8000/v1; the model's name; the key, if it needs
one."""

SECONDS, MAX_BYTES, SIDE = 120, 1 << 20, 512
"""How long an answer may take, its most bytes, and the longest side of the pictures that are sent."""

LOCAL = ("localhost", "127.0.0.1", "::1")

TASK = (
    "You plan the layout of a new picture that is composed from {count} given pictures, image 1 to image {count}, in "
    "this order. Instruction: {prompt}\n"
    'Answer with JSON alone: a list with one row {{"id": "image_N", "bbox": [top, left, bottom, right]}} for each '
    "picture that shows a person or a thing, where it goes in the new picture, in whole numbers from 0 to 1000. Leave "
    "out pictures that give the place or the style."
)


class NoLayout(UniPicError):
    """The server gave no layout; the sentence says why."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class LayoutServer:
    """Base address without a final slash, model and key."""

    url: str
    model: str
    key: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> LayoutServer | None:
        """The server of the environment; None without an address. Raises UniPicError for a wrong address or key."""
        url = environment.get(URL, "").strip().rstrip("/")
        if not url:
            return None
        if not _is_address(url):
            raise UniPicError(
                f"{URL} must be an address such as http://localhost:8000/v1, in ASCII characters without spaces, "
                "password, question mark and number sign; correct this environment variable where ComfyUI starts"
            )
        key = environment.get(KEY, "").strip()
        if not _is_printable_ascii(key):  # never quoted: it is a secret
            raise UniPicError(
                f"{KEY} must be printable ASCII characters, got a line break, a curly quote or another one; set this "
                "environment variable again where ComfyUI starts"
            )
        return cls(url, environment.get(MODEL, "").strip() or "default", key)

    def ask(self, prompt: str, pictures: Sequence[Image.Image]) -> str:
        """JSON text of the rows that the server answers. Raises NoLayout."""
        content: list[dict[str, Any]] = [{"type": "text", "text": TASK.format(count=len(pictures), prompt=prompt)}]
        content += [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
        answer = self._post({"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]})
        try:
            text = json.loads(answer)["choices"][0]["message"]["content"]
            return str(text[text.index("[") : text.rindex("]") + 1])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise NoLayout("the layout server's answer holds no list of boxes") from None

    def _post(self, body: Mapping[str, object]) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        local = urlsplit(self.url).hostname in LOCAL  # pictures for this machine go through no proxy
        opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if local else []))
        try:  # ValueError: of a name that DNS cannot hold, and of a redirect that is no address
            with opener.open(request, timeout=SECONDS) as reply:
                answer: bytes = reply.read(MAX_BYTES + 1)
        except urllib.error.HTTPError as error:
            error.close()
            redirect = "; redirects are not followed" if 300 <= error.code < 400 else ""
            raise NoLayout(f"the layout server answered HTTP {error.code}{redirect}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise NoLayout(f"the layout server cannot be reached ({type(reason).__name__})") from None
        if len(answer) > MAX_BYTES:
            raise NoLayout("the layout server's answer is longer than 1 MiB")
        return answer


def _is_address(url: str) -> bool:
    """True for http(s)://host[:port][/path], in characters that a request can hold."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and "@" not in parts.netloc
    return is_web and _is_printable_ascii(url) and not set(" ?#") & set(url)


def _is_printable_ascii(text: str) -> bool:
    return text.isascii() and text.isprintable()


def data_url(picture: Image.Image) -> str:
    """A small JPEG of the picture as a data URL."""
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
