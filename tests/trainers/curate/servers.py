"""A judge and an images API that look at the pictures they are sent: answers follow from pixels alone."""

import base64
import io
import json
import threading
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


class LookingServer(ThreadingHTTPServer):
    """POST /v1/images/edits: pastes the pictures side by side, or paints it black where `spoil(prompt, call)` is true.
    POST /v1/chat/completions: yes or a high score unless the last picture is nearly black; prompts and parts as JSON.

    faults: one taken per request: a status, or "prose", "url", "html", "cut".
    """

    daemon_threads = True

    def __init__(self, spoil=lambda prompt, call: False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spoil = spoil
        self.faults: list[Any] = []
        self.calls: dict[str, int] = {"edits": 0, "completions": 0}
        self.seen: dict[str, int] = {}
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: LookingServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.path.removeprefix("/v1/").rpartition("/")[2]
        with self.server.lock:
            self.server.calls[kind] += 1
            fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            return self.send(fault, b'{"error": {"message": "busy"}}')
        if fault == "html":
            return self.send(200, b"<html>hello</html>")
        answer = self.edit(raw, fault) if kind == "edits" else self.judge(json.loads(raw), fault)
        self.send(200, json.dumps(answer).encode())

    def send(self, status: int, raw: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(raw)

    def edit(self, raw: bytes, fault: object) -> dict:
        form = BytesParser().parsebytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + raw)
        fields: dict[str, str] = {}
        pictures = []
        for part in form.get_payload():
            name, data = part.get_param("name", header="Content-Disposition"), part.get_payload(decode=True)
            if name == "image[]":
                pictures.append(Image.open(io.BytesIO(data)).convert("RGB").resize((64, 64)))
            else:
                fields[name] = data.decode()
        assert fields["response_format"] == "b64_json"
        assert len(pictures) >= 1
        with self.server.lock:
            call = self.server.seen[fields["prompt"]] = self.server.seen.get(fields["prompt"], 0) + 1
        if fault == "url":
            return {"data": [{"url": "http://example.org/a.png"}]}
        made = Image.new("RGB", (64 * len(pictures), 64))
        if not self.server.spoil(fields["prompt"], call):
            for number, picture in enumerate(pictures):
                made.paste(picture, (64 * number, 0))
        buffer = io.BytesIO()
        made.save(buffer, "PNG")
        data = buffer.getvalue()[:60] if fault == "cut" else buffer.getvalue()
        return {"data": [{"b64_json": base64.b64encode(data).decode()}]}

    def judge(self, body: dict, fault: object) -> dict:
        content = body["messages"][0]["content"]
        text = " ".join(part["text"] for part in content if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        answer = "It is nice." if fault == "prose" else self.answer(text, urls)
        message = {"role": "assistant", "content": answer}
        return {"model": "looking", "choices": [{"finish_reason": "stop", "message": message}]}

    def answer(self, text: str, urls: list[str]) -> str:
        if not urls:
            return "7" if "digit" in text else '{"answer": 7}'
        picture = Image.open(io.BytesIO(base64.b64decode(urls[-1].partition(",")[2]))).convert("RGB")
        good = float(np.asarray(picture).mean()) > 10
        if '"instruction"' in text:
            named = " and ".join(f"image {number}" for number in range(1, len(urls) + 1))
            return json.dumps({"instruction": f"On a sunny day, combine {named}."})
        if '"parts"' in text:
            return json.dumps({"parts": [{"name": "a panda", "category": "animal"}]})
        if "from 0 (unusable) to 100" in text:
            return json.dumps({"reasoning": "looked", "score": [90 if good else 10]})
        if "one digit" in text:
            return "8" if good else "1"
        return "yes" if good else "no"
