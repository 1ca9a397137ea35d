"""Plan Layout: boxes from a server of the user's, by rules where it fails, and nothing sent anywhere else."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch
from compose_tools import WISHES, image, sockets
from PIL import Image
from unipic_pack.nodes.compose import MultiImageCompose
from unipic_pack.nodes.host import layout_server
from unipic_pack.nodes.host.layout_server import KEY, MODEL, URL
from unipic_pack.nodes.host.model.influences import INFLUENCES
from unipic_pack.nodes.plan_layout import UniPicPlanLayout
from unipic_pack.unipic_core.conditioning.boxes import parse_boxes
from unipic_pack.unipic_core.conditioning.influence import Influence, Region
from unipic_pack.unipic_core.errors import UniPicError

PROMPT = "Place the tent from image 2 right of the man from image 1."
RULED = '[{"id": "image_1", "bbox": [0, 0, 1000, 500]}, {"id": "image_2", "bbox": [0, 500, 1000, 1000]}]'
ASKED = '[{"id": "image_2", "bbox": [100, 200, 300, 400]}]'


class Handler(BaseHTTPRequestHandler):
    """Notes requests, and answers with `status` and `text`, or with `raw` bytes."""

    seen: list[dict[str, Any]]
    status, text, location, raw = 200, f"Here it is:\n```json\n{ASKED}\n```", "", b""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
        answer = self.raw or json.dumps({"choices": [{"message": {"content": self.text}}]}).encode()
        self.send_response(self.status)
        if self.location:
            self.send_header("Location", self.location)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Handler]]:
    handler = type("Fresh", (Handler,), {"seen": []})
    running = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    for name, value in ((URL, f"http://127.0.0.1:{running.server_port}/v1/"), (MODEL, "planner"), (KEY, "secret")):
        monkeypatch.setenv(name, value)
    yield handler
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*_: Any) -> None:
        raise AssertionError("the node opened a connection")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.delenv(URL, raising=False)


def plan(planner: str = "auto", prompt: str = PROMPT, count: int = 2) -> tuple[str, torch.Tensor]:
    pictures = sockets(*(image(i, 700, 500) for i in range(count)))
    boxes, sheet = UniPicPlanLayout.execute(prompt, pictures, planner).args
    return boxes, sheet


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("planner", ["auto", "rules"])
def test_without_an_address_rules_plan_and_nothing_is_sent(planner: str, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        assert plan(planner)[0] == RULED
    assert "planned by rules: image 1 at [top, left, bottom, right] = [0, 0, 1000, 500]; image 2" in caplog.text


@pytest.mark.usefixtures("no_network")
def test_a_prompt_without_places_gives_no_boxes(caplog: Any) -> None:
    assert plan(prompt="Blend them.")[0] == ""
    assert "planned by rules: no boxes" in caplog.text


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("images", [{}, {"image_1": None}])
def test_no_pictures_are_one_sentence(images: dict[str, Any]) -> None:
    with pytest.raises(UniPicError, match="expected a picture at one of image_1 to image_6, got none"):
        UniPicPlanLayout.execute(PROMPT, images, "rules")


@pytest.mark.usefixtures("no_network")
def test_a_server_without_an_address_is_one_sentence() -> None:
    with pytest.raises(UniPicError, match="needs the address of your server in the environment variable UNIPIC_LAYOUT"):
        plan("server")
    with pytest.raises(UniPicError, match="planner must be one of auto, server, rules, got 'magic'"):
        plan("magic")


def test_the_server_gets_prompt_and_small_pictures(
    server: type[Handler], caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not used for a server on this machine
    with caplog.at_level("INFO"):
        boxes, sheet = plan()
    assert boxes == ASKED
    assert "planned by planner on your server: image 2 at" in caplog.text
    [request] = server.seen
    assert (request["path"], request["model"], request["key"]) == ("/v1/chat/completions", "planner", "Bearer secret")
    text, *pictures = request["messages"][0]["content"]
    assert PROMPT in text["text"]
    for part in pictures:
        head, data = part["image_url"]["url"].split(",")
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (512, 366)
    assert not torch.equal(sheet, plan("rules")[1]), "the sheet shows the boxes"
    assert len(server.seen) == 1, "rules alone ask no server"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"text": "I cannot."}, "the layout server's answer holds no list of boxes"),
        ({"text": '[{"id": "image_9", "bbox": [0, 0, 1, 1]}]'}, "box 1 is of image 9, and there are 2 pictures"),
        ({"text": '[{"id": "image_1", "bbox": [0, 0, 2000, 1]}]'}, "box 1: a box must lie between 0 and 1000"),
        (
            {"text": '[{"id": "image_2", "bbox": [0.1, 0.1, 0.9, 0.4]}]'},
            "box 1: a box must be on a grid from 0 to 1000",
        ),
        ({"status": 500}, "the layout server answered HTTP 500"),
        (
            {"status": 302, "location": "http://127.0.0.1:9/"},
            "the layout server answered HTTP 302; redirects are not followed",
        ),
        ({"status": 307, "location": "http://[::1/"}, "the layout server cannot be reached (ValueError)"),
        ({"raw": b"[" * 200_000}, "the layout server's answer holds no list of boxes"),
    ],
    ids=[
        "no list",
        "a picture too many",
        "outside",
        "from 0 to 1",
        "an error",
        "a redirect",
        "a redirect to nowhere",
        "nested",
    ],
)
def test_a_bad_answer_falls_back_to_rules(
    changes: dict[str, Any], why: str, server: type[Handler], caplog: Any
) -> None:
    for name, value in changes.items():
        setattr(server, name, value)
    with caplog.at_level("INFO"):
        assert plan()[0] == RULED
    assert f"planned by rules, since {why}" in " ".join(caplog.text.split())
    assert [r.levelname for r in caplog.records if "planned by rules" in r.getMessage()] == ["WARNING"]
    with pytest.raises(UniPicError, match=re.escape(why.split(",")[0])):
        plan("server")


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        (KEY, "sk\nabc", "UNIPIC_LAYOUT_KEY must be printable ASCII characters"),
        (KEY, "sk-\u201cabc\u201d", "UNIPIC_LAYOUT_KEY must be printable ASCII characters"),
        (URL, "file:///etc/passwd", "UNIPIC_LAYOUT_URL must be an address such as"),
        (URL, "http://[::1:8000/v1", "UNIPIC_LAYOUT_URL must be an address such as"),
        (URL, "http://127.0.0.1:abc/v1", "UNIPIC_LAYOUT_URL must be an address such as"),
        (URL, "http://127.0.0.1:9/v\u00f6", "UNIPIC_LAYOUT_URL must be an address such as"),
        (URL, "http://local host:9/v1", "UNIPIC_LAYOUT_URL must be an address such as"),
        (URL, "http://me:abc@127.0.0.1:9/v1", "UNIPIC_LAYOUT_URL must be an address such as"),
        (URL, f"http://{'a' * 64}.invalid/v1", r"the layout server cannot be reached \(UnicodeError\)"),
    ],
    ids=str,
)
def test_a_wrong_address_or_key_falls_back_to_rules_and_no_key_is_shown(
    name: str, value: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv(name, value)
    assert plan()[0] == RULED
    [line] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert re.search(f"planned by rules, since {why}", line)
    with pytest.raises(UniPicError, match=why) as caught:
        plan("server")
    assert not any("abc" in text for text in (line, str(caught.value)))


def test_a_server_that_failed_is_asked_again(server: type[Handler]) -> None:
    """ComfyUI caches a node's outputs until its fingerprint changes."""

    def fingerprints() -> list[Any]:
        names = ("auto", "server", "rules")
        return [UniPicPlanLayout.fingerprint_inputs(prompt=PROMPT, images=None, planner=name) for name in names]

    before = fingerprints()
    assert plan()[0] == ASKED
    assert fingerprints() == before
    server.status = 500
    assert plan()[0] == RULED
    after = fingerprints()
    assert [a != b for a, b in zip(after, before, strict=True)] == [True, True, False]
    server.status = 200
    assert plan()[0] == ASKED
    assert fingerprints() == after


def test_no_server_and_a_long_answer(server: type[Handler], monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(layout_server, "MAX_BYTES", 10)
    with pytest.raises(UniPicError, match="longer than 1 MiB"):
        plan("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv(URL, f"http://127.0.0.1:{free.getsockname()[1]}/v1")
    with pytest.raises(UniPicError, match=r"cannot be reached \(ConnectionRefusedError\)"):
        plan("server")


@pytest.mark.parametrize(
    ("answered", "written"),
    [
        ("[500.1, 10, 500.4, 900]", "[500.1, 10, 500.4, 900]"),
        ("[0.2, 999.6, 0.4, 1000]", "[0.2, 999.6, 0.4, 1000]"),
        ("[99.6, 200.4, 300.5, 400]", "[100, 200, 300, 400]"),
        ("[0, 0, 1, 2]", "[0, 0, 1, 2]"),
    ],
)
def test_a_thin_box_stays_a_box(answered: str, written: str, server: type[Handler]) -> None:
    server.text = f'[{{"id": "image_1", "bbox": {answered}}}]'
    boxes = plan("server")[0]
    assert boxes == f'[{{"id": "image_1", "bbox": {written}}}]'
    assert list(parse_boxes(boxes, 1)) == [1]


@pytest.mark.usefixtures("fresh", "no_network")
@torch.inference_mode()
def test_multi_image_compose_takes_the_boxes(tiny: Any) -> None:
    pictures = sockets(image(0), image(1))
    boxes = UniPicPlanLayout.execute(PROMPT, pictures, "rules").args[0]
    [[_, extra]] = MultiImageCompose.execute(*tiny, PROMPT, images=pictures, boxes=boxes, **WISHES).args[0]
    halves = (Region(0, 0, 500, 1000), Region(500, 0, 1000, 1000))
    assert extra[INFLUENCES] == tuple(Influence(region=half) for half in halves)
