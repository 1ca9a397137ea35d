"""A server that checks every request and misbehaves on a list; its default answers are fixed, it judges nothing."""

import base64
import json
import math
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "secret-key"


class FakeServer(ThreadingHTTPServer):
    """faults: one taken per request; a status, a status with a Location, or html, prose, range, refuse, think, cut,
    slow, list.

    tokens: (token, {alternative: probability}) of every answer, sent to those who ask for log-probabilities.
    """

    daemon_threads = True

    def __init__(self, text: str | Callable[[dict], str] = '{"score": [7, 9]}', faults=()) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.text, self.faults = text, list(faults)
        self.tokens: list[tuple[str, dict[str, float]]] = []
        self.bodies: list[dict] = []
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def token_entry(token: str, alternatives: dict[str, float]) -> dict[str, Any]:
    top = [{"token": one, "logprob": math.log(share)} for one, share in alternatives.items()]
    return {"token": token, "logprob": top[0]["logprob"] if top else 0.0, "top_logprobs": top}


class Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, code: int, raw: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        for part in body["messages"][0]["content"]:
            if part["type"] == "image_url":
                head, data = part["image_url"]["url"].split(",", 1)
                assert re.fullmatch(r"data:image/png;base64", head)
                assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.now += 1
            server.most = max(server.most, server.now)
            fault = server.faults.pop(0) if server.faults else None
        try:
            self.answer(body, fault)
        finally:
            with server.lock:
                server.now -= 1

    def answer(self, body: dict, fault: object) -> None:
        if isinstance(fault, int):
            said = {401: f"the key {KEY} is bad", 507: "refused, the queue is full"}.get(fault, "slow down")
            return self.reply(fault, json.dumps({"error": {"message": said}}).encode(), Retry_After="0")
        if isinstance(fault, tuple):
            return self.reply(fault[0], b"", Location=fault[1])
        if fault in ("html", "list"):
            return self.reply(200, b"<html>hello</html>" if fault == "html" else b"[1]")
        if fault == "slow":
            time.sleep(0.5)
        text = self.server.text if isinstance(self.server.text, str) else self.server.text(body)
        odd = {
            "prose": "It looks quite nice.",
            "range": '{"score": [11, -1]}',
            "refuse": "I'm sorry, but I can't help with that.",
            "think": f"<think>maybe [1, 2]?</think>\n```json\n{text}\n```",
        }
        text = odd.get(str(fault), text)
        finish = "length" if fault == "length" else "stop"
        message = {"role": "assistant", "content": text}
        choice = {"finish_reason": finish, "message": message}
        if body.get("logprobs") and self.server.tokens:
            choice["logprobs"] = {"content": [token_entry(*one) for one in self.server.tokens]}
        raw = json.dumps({"model": "fake", "choices": [choice]}).encode()
        self.reply(200, raw[:20] if fault == "cut" else raw)
