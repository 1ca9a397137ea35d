"""Lines for the user, in ComfyUI's log and on the node."""

from __future__ import annotations

import logging
import sys
from typing import Any

from comfy_api.latest import io


def tell(node: type[io.ComfyNode], text: str, level: int = logging.INFO) -> None:
    """Log a line, and show it on a node with `io.Hidden.unique_id` in the page that queued the graph.

    A graph queued by the API without a client has no page; the line is then in the log alone.
    """
    schema = node.SCHEMA or node.GET_SCHEMA()  # cached by ComfyUI; a new one would list folders again in every run
    logging.log(level, "%s: %s", schema.display_name, text)
    prompt_server = getattr(sys.modules.get("server"), "PromptServer", None)  # absent where no page is served
    server: Any = getattr(prompt_server, "instance", None)
    unique_id = getattr(node.hidden, "unique_id", None)
    client = getattr(server, "client_id", None)
    if client is not None and unique_id:
        server.send_progress_text(text, unique_id, client)  # without a client's id every open page would show it
