"""Lines for the user: in ComfyUI's log, and inside the node that says them."""

from __future__ import annotations

import logging
import sys
from typing import Any

from comfy_api.latest import io


def tell(node: type[io.ComfyNode], text: str, level: int = logging.INFO) -> None:
    """Log a line, and show it in the node, if that asks for `io.Hidden.unique_id`, to the client that runs the graph.

    A graph queued by the API without a client has no page; the line is then only in the log.
    """
    schema = node.SCHEMA or node.GET_SCHEMA()  # kept by ComfyUI; a new one would list folders again in every run
    logging.log(level, "%s: %s", schema.display_name, text)
    prompt_server = getattr(sys.modules.get("server"), "PromptServer", None)  # absent where no page is served
    server: Any = getattr(prompt_server, "instance", None)
    unique_id = getattr(node.hidden, "unique_id", None)
    client = getattr(server, "client_id", None)
    if client is not None and unique_id:
        server.send_progress_text(text, unique_id, client)  # without a client's id it goes to every open page
