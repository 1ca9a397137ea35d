"""HTTP client of one server: bounded answers, deadlines, retries; no redirects, no proxy for local addresses."""

from __future__ import annotations

import email.message
import http.client
import ipaddress
import json
import os
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import urlsplit

from .config import ServerConfig
from .errors import AnswerError, JudgeError, one_line

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 507, 508, 509, 520, 521, 522, 523, 524, 529})
QUESTION_ERRORS = frozenset({400, 413, 422})
MAX_REPLY_BYTES = 64 << 20
"""Bytes; enough for a base64 picture of an image endpoint."""
CHUNK = 1 << 16
FIRST_WAIT = 0.5  # seconds; doubled with each try
FAILURES_IN_A_ROW = 3


@dataclass(frozen=True)
class Reply:
    """JSON object, the seconds of the successful try, and the number of tries."""

    data: dict[str, Any]
    seconds: float
    tries: int


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        return None


class _Again(Exception):
    """Failed try that may be repeated, after ``wait`` seconds if the server states them."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class _NoServer(_Again):
    """Failed try of a host where nothing listens: repeated, but at the end no other request could succeed."""


class Endpoint:
    """Requests to one base address; thread-safe."""

    def __init__(self, config: ServerConfig, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.config = config
        self.base_url = checked_url(config)
        self.host = urlsplit(self.base_url).hostname or ""
        self.is_local = is_this_machine(self.host)
        self._key = key_from_environment(config)
        self._sleep = sleep
        proxies = [urllib.request.ProxyHandler({})] if self.is_local else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)
        self._answered = False
        self._failed_in_a_row = 0
        self._lock = threading.Lock()

    def post_json(self, path: str, body: Mapping[str, object]) -> Reply:
        """POST a JSON object; see ``post``."""
        return self.post(path, json.dumps(body).encode(), "application/json")

    def post(self, path: str, body: bytes, content_type: str) -> Reply:
        """POST and read a JSON object, with retries.

        Raises AnswerError if only this request fails (kinds "rejected" and "server"), and JudgeError if further
        requests would fail too: no server, a wrong key or address, or three failed requests in a row.
        """
        last = _Again("")
        for attempt in range(1, self.config.tries + 1):
            start = time.monotonic()
            try:
                data = self._try(path, body, content_type)
            except _Again as failure:
                last = failure
                if attempt < self.config.tries:
                    self._sleep(self._pause(attempt, failure.wait))
                continue
            self._count(failed=False)
            return Reply(data, time.monotonic() - start, attempt)
        tries = f"{self.config.tries} tries" if self.config.tries > 1 else "one try"
        if self._count(failed=True) >= FAILURES_IN_A_ROW or isinstance(last, _NoServer):
            raise JudgeError(f"the server at {self.base_url} gave no answer after {tries}: {last}; run again later")
        raise AnswerError("server", f"no answer after {tries}: {last}")

    def _count(self, failed: bool) -> int:
        """Count failed requests in a row, this one included."""
        with self._lock:
            self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
            self._answered = self._answered or not failed
            return self._failed_in_a_row

    def _pause(self, attempt: int, asked: float | None) -> float:
        """Seconds before the next try: the server's Retry-After, else doubling with jitter; at most ``max_wait``."""
        wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.8, 1.2) if asked is None else asked
        return min(wait, self.config.max_wait)

    def _try(self, path: str, body: bytes, content_type: str) -> dict[str, Any]:
        timeout = self.config.timeout if self._answered else self.config.first_timeout
        headers = {"Content-Type": content_type, "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.base_url + path, body, headers)
        try:
            with self._opener.open(request, timeout=timeout) as reply:
                raw = _read(reply, time.monotonic() + timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, timeout) from None
        except urllib.error.URLError as error:
            raise self._unreachable(error.reason, timeout) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error, timeout) from None
        except ValueError as error:  # of a name that DNS cannot hold, and of a redirect that is no address
            reason = self.hide_key(one_line(error))
            raise JudgeError(
                f"{self.base_url} cannot be asked ({reason}); correct {self.config.section}.base_url"
            ) from None
        return self._object(raw)

    def _object(self, raw: bytes) -> dict[str, Any]:
        """Parse the JSON object of an answer with status 200."""
        try:
            data = parse_json(raw)
        except (ValueError, RecursionError):
            if raw.lstrip()[:1] == b"<":
                raise JudgeError(
                    f"{self.base_url} answered with a web page instead of JSON; is this the address that ends in /v1?"
                ) from None
            raise _Again(f"the answer is not JSON ({one_line(raw[:60].decode('utf-8', 'replace'))!r})") from None
        if not isinstance(data, dict):
            raise JudgeError(f"{self.base_url} answered with {one_line(data, 60)!r} where a JSON object was expected")
        return data

    def _refusal(self, error: urllib.error.HTTPError, timeout: float) -> Exception:
        """Exception for a status other than 200 with the server's explanation; an echoed key is hidden."""
        code, explanation = error.code, self.hide_key(_sentence(error, timeout))
        if code in RETRIED:
            return _Again(f"HTTP {code} ({explanation})", _retry_after(error.headers))
        if code in QUESTION_ERRORS:
            return AnswerError("rejected", f"HTTP {code}: {explanation}")
        if 300 <= code < 400:
            where = _host_of(error.headers.get("Location") or "") or "another address"
            return JudgeError(
                f"{self.base_url} redirects to {one_line(where, 80)}; redirects are not followed; use that address"
            )
        if code in (401, 403):
            section = self.config.section
            return JudgeError(
                f"{self.base_url} refuses the key (HTTP {code}: {explanation}); set {section}.api_key_env"
            )
        return JudgeError(
            f"{self.base_url} answered HTTP {code}: {explanation}; check the address and the model's name"
        )

    def _unreachable(self, reason: object, timeout: float) -> Exception:
        """Exception for a request without an answer."""
        if isinstance(reason, TimeoutError):
            return _Again(f"nothing within {timeout:g} s")
        if isinstance(reason, ConnectionRefusedError):
            return _NoServer("connection refused: no server is listening")
        if isinstance(reason, socket.gaierror):
            return JudgeError(
                f"the host {self.host!r} does not exist ({one_line(reason.strerror or reason)}); correct "
                f"{self.config.section}.base_url"
            )
        if isinstance(reason, ssl.SSLCertVerificationError):
            return JudgeError(f"the certificate of {self.host} is not trusted ({one_line(reason.verify_message)})")
        return _Again(f"the connection broke ({one_line(reason) or type(reason).__name__})")

    def hide_key(self, text: str) -> str:
        """Replace the API key in a text of the server."""
        return text.replace(self._key, "[key]") if self._key else text


def _read(reply: http.client.HTTPResponse, deadline: float) -> bytes:
    """Read the body before ``deadline`` (monotonic seconds). Raises _Again if it is cut, too slow or too long."""
    parts, size = [], 0
    while chunk := reply.read1(CHUNK):
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_REPLY_BYTES:
            raise _Again(f"the answer is longer than {MAX_REPLY_BYTES >> 20} MiB")
        if time.monotonic() > deadline:
            raise _Again("the answer did not end in time")
    if reply.length:
        raise _Again("the answer was cut off")
    return b"".join(parts)


def parse_json(raw: bytes) -> Any:
    """Parse JSON; escapes of half a character, which no file can hold, become question marks. Raises ValueError."""
    data = json.loads(raw)
    if b"\\ud" in raw.lower():
        data = json.loads(json.dumps(data, ensure_ascii=False).encode("utf-8", "replace"))
    return data


def _sentence(error: urllib.error.HTTPError, timeout: float) -> str:
    """Extract the explanation from an error body: OpenAI's and FastAPI's formats, else plain text."""
    try:
        raw = error.read(CHUNK)
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        data = parse_json(raw)
        detail = data.get("error", data.get("detail", data.get("message", data)))
        text = detail.get("message", detail) if isinstance(detail, dict) else detail
    except (ValueError, AttributeError, RecursionError):
        text = raw.decode("utf-8", "replace")
        if text.lstrip().startswith("<"):
            text = "a web page"
    return one_line(text) or str(error.reason)


def _host_of(address: str) -> str:
    """Host and port of an address; empty if it has none or is no address."""
    try:
        return urlsplit(address).netloc
    except ValueError:
        return ""


def _retry_after(headers: email.message.Message) -> float | None:
    """Seconds of a numeric Retry-After header, or None."""
    try:
        seconds = float(headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def checked_url(config: ServerConfig) -> str:
    """Check the base address and remove its final slash.

    Raises JudgeError for anything but http(s)://host[:port][/path] in characters that a request can hold.
    """
    url, name = config.base_url.strip(), f"{config.section}.base_url"
    try:
        parts = urlsplit(url)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_fits = urlsplit(""), False
    is_printable = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_fits or not is_printable:
        given = "one with '@'" if "@" in url else f"{one_line(url, 80)!r}"  # a password may stand before it
        raise JudgeError(
            f"{name} must be an address such as http://localhost:8000/v1, in ASCII characters without spaces, got "
            f"{given}"
        )
    if parts.username or parts.password:
        raise JudgeError(f"{name} holds a name or password; use {config.section}.api_key_env")
    if parts.query or parts.fragment:
        raise JudgeError(f"{name} must not contain '?' or '#', got {one_line(url, 80)!r}")
    return url.rstrip("/")


def is_this_machine(host: str) -> bool:
    """True for loopback and other addresses of this machine; False for names that do not resolve."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)}
    except (OSError, UnicodeError):
        return False
    return bool(addresses) and all(_is_local_address(str(address)) for address in addresses)


def _is_local_address(address: str) -> bool:
    """True for loopback and addresses that a local socket can bind to."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.is_loopback or ip.is_unspecified:
        return True
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as one:
            one.bind((address, 0))
    except OSError:
        return False
    return True


def key_from_environment(config: ServerConfig) -> str | None:
    """Read the API key from the environment variable ``api_key_env``. Raises JudgeError, without the key."""
    name = config.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise JudgeError(
            f"the environment variable {name} ({config.section}.api_key_env) is empty; put the key into it"
        )
    if not key.isascii() or not key.isprintable():
        raise JudgeError(f"the environment variable {name} contains characters that no key has; set it again")
    return key
