"""Who sees a node's line: the client that runs the graph, and nobody else."""

import sys
from types import SimpleNamespace

import pytest
from comfy_api.latest import io
from unipic_pack.nodes.host.messages import tell


class Speaker(io.ComfyNode):
    hidden = SimpleNamespace(unique_id="7")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="Speaker", display_name="Speaker", hidden=[io.Hidden.unique_id])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput()


@pytest.mark.parametrize(("client", "sent"), [("page 1", [("hello", "7", "page 1")]), (None, [])])
def test_a_line_goes_to_the_client_that_runs_the_graph(
    monkeypatch: pytest.MonkeyPatch, client: str | None, sent: list[tuple[str, ...]]
) -> None:
    """Without a client of its own a graph has no page; ComfyUI would send the line to every open one."""
    seen: list[tuple[str, ...]] = []
    server = SimpleNamespace(client_id=client, send_progress_text=lambda *message: seen.append(message))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    tell(Speaker, "hello")
    assert seen == sent
