"""Running graphs: in this process, and on a real ComfyUI server in a process of its own."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfyui

UPDATE = bool(os.environ.get("UNIPIC_UPDATE_PICTURES"))
"""Write thumbnails and screenshots into the repository, where a test has just made them."""

START_SECONDS, RUN_SECONDS = 1200, 900
"""How long a server may take to start, and a graph to run, on a busy machine."""

Graph = dict[str, Any]


def node_of(graph: Graph, kind: str) -> dict[str, Any]:
    """Inputs of the first node of a kind."""
    return next(node["inputs"] for node in graph.values() if node["class_type"] == kind)


def saved_pictures(outputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Files that a graph saved, without the nodes' previews."""
    return [e for output in outputs.values() for e in output.get("images", []) if e["type"] == "output"]


# --- in this process -----------------------------------------------------------------------------------------------

STOCK = (
    *("nodes_qwen", "nodes_custom_sampler", "nodes_edit_model", "nodes_images"),
    *("nodes_mask", "nodes_compositing", "nodes_rebatch", "nodes_bounding_boxes", "nodes_image_compare"),
    *("nodes_latent", "nodes_post_processing"),  # in this order: they import each other
)
"""ComfyUI's files that hold the stock nodes of the workflows and the tests, beside nodes.py."""


@functools.cache
def node_classes() -> dict[str, Any]:
    """ComfyUI's table of nodes, with the stock ones that the workflows use and the pack's."""
    import nodes

    async def load() -> None:
        for name in STOCK:
            assert await nodes.load_custom_node(
                os.path.join(nodes_folder(), f"{name}.py"), module_parent="comfy_extras"
            )
        extension = await comfyui.load_pack().comfy_entrypoint()
        for node in await extension.get_node_list():
            nodes.NODE_CLASS_MAPPINGS[node.GET_SCHEMA().node_id] = node

    asyncio.run(load())
    return nodes.NODE_CLASS_MAPPINGS


def nodes_folder() -> str:
    import nodes

    return os.path.join(os.path.dirname(os.path.realpath(nodes.__file__)), "comfy_extras")


@dataclass
class Done:
    """What became of a graph. outputs: node -> what it shows; error: of the node that failed."""

    success: bool
    outputs: dict[str, Any]
    error: dict[str, Any] = field(default_factory=dict)


class Executor:
    """ComfyUI's executor without a server; keeps its cache from graph to graph."""

    def __init__(self) -> None:
        import execution

        node_classes()
        server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *args: None)
        cache = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        self.executor = execution.PromptExecutor(server, execution.CacheType.CLASSIC, cache)

    def run(self, graph: Graph) -> Done:
        import execution

        async def run() -> None:
            valid = await execution.validate_prompt(prompt, graph, None)
            assert valid[0], (valid[1], valid[3])
            await self.executor.execute_async(graph, prompt, {}, valid[2])

        prompt = uuid.uuid4().hex
        asyncio.run(run())
        shown = self.executor.history_result.get("outputs", {})
        errors = [data for event, data in self.executor.status_messages if event == "execution_error"]
        return Done(self.executor.success, shown, errors[0] if errors else {})


# --- a server ------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    url: str
    base: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def log(self) -> str:
        return (self.base / "server.log").read_text(errors="replace")[-4000:]


PACK_FOLDER = "ComfyUI-UniPic"


@functools.cache
def server() -> Server:
    """A ComfyUI on the CPU with this pack among its custom nodes, stopped when this process ends."""
    base = Path(tempfile.mkdtemp(prefix="unipic-server-"))
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / PACK_FOLDER).symlink_to(comfyui.ROOT, target_is_directory=True)
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    chosen = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
    chosen |= {"LiteGraph.Canvas.MinFontSizeForLOD": 0}  # else a large graph is drawn without its texts
    settings.write_text(json.dumps(chosen))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = comfyui.comfyui_path()
    assert path is not None
    comfyui.give_example(path, base)
    options = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch", "--disable-api-nodes"]
    options += ["--preview-method", "latent2rgb", "--base-directory", str(base)]
    options += ["--database-url", f"sqlite:///{base}/comfyui.db"]
    command = [sys.executable, str(comfyui.ROOT / "tests" / "nodes" / "launch.py"), str(path), *options]
    with (base / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=base, stdout=log, stderr=subprocess.STDOUT)
    atexit.register(_stop, process, base)
    started = Server(f"http://127.0.0.1:{port}", base, process)
    _wait(started)
    return started


def _stop(process: subprocess.Popen[bytes], base: Path) -> None:
    process.kill()
    process.wait()
    shutil.rmtree(base, ignore_errors=True)


def _wait(started: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert started.process.poll() is None, f"ComfyUI ended:\n{started.log()}"
        with contextlib.suppress(OSError):
            started.get("/system_stats")
            return
        time.sleep(2)
    raise AssertionError(f"ComfyUI did not start in {START_SECONDS} s:\n{started.log()}")


@dataclass
class Events:
    """What a client of the server saw of one prompt."""

    prompt: str
    ended: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    progress: list[tuple[int, int]] = field(default_factory=list)
    previews: int = 0
    texts: list[str] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)


OnProgress = Callable[[Any, int], Awaitable[None]]
ENDS = ("execution_success", "execution_error", "execution_interrupted")
PREVIEW, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4
"""Kinds of ComfyUI's binary messages."""


async def queue(on: Server, graphs: list[Graph], on_progress: OnProgress | None = None) -> list[Events]:
    """Queue graphs at once over HTTP and follow them over one websocket to their ends, in the order of their ends."""
    import aiohttp

    client = uuid.uuid4().hex
    async with (
        aiohttp.ClientSession(on.url) as http,
        http.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket,
    ):
        open_prompts: dict[str, Events] = {}
        for graph in graphs:
            answer = await (await http.post("/prompt", json={"prompt": graph, "client_id": client})).json()
            assert "prompt_id" in answer, answer
            open_prompts[answer["prompt_id"]] = Events(answer["prompt_id"])
        done: list[Events] = []
        async with asyncio.timeout(RUN_SECONDS * len(graphs)):
            while open_prompts:
                ended = await _next(await socket.receive(), open_prompts, http, on_progress)
                done += [ended] if ended else []
        for events in done:
            events.outputs = await _outputs(http, events.prompt)
    return done


async def _next(message: Any, prompts: dict[str, Events], http: Any, on_progress: OnProgress | None) -> Events | None:
    """Note one message; returns the prompt that it ends."""
    running = next(iter(prompts.values()))  # the server runs them one after the other
    if isinstance(message.data, bytes):
        kind = int.from_bytes(message.data[:4], "big")
        running.previews += kind in (PREVIEW, PREVIEW_WITH_METADATA)
        running.texts += [message.data[4:].decode(errors="replace")] if kind == TEXT else []
        return None
    event = json.loads(message.data)
    kind, data = event["type"], event.get("data", {})
    if kind == "progress":
        running.progress.append((data["value"], data["max"]))
        if on_progress:
            await on_progress(http, data["value"])
    if kind in ENDS and data["prompt_id"] in prompts:
        ended = prompts.pop(data["prompt_id"])
        ended.ended, ended.detail = kind, data
        return ended
    return None


async def _outputs(http: Any, prompt: str) -> dict[str, Any]:
    """From the history, which is written a moment after the end is reported."""
    for _ in range(300):
        history = await (await http.get(f"/history/{prompt}")).json()
        if prompt in history:
            return history[prompt]["outputs"]
        await asyncio.sleep(0.1)
    raise AssertionError("the history does not have the prompt")
