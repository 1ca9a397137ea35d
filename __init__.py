"""ComfyUI-UniPic: the pack's entry point. Nothing is imported before ComfyUI asks for the nodes."""

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """ComfyUI calls this once; see nodes/extension.py."""
    from .nodes.extension import UniPicExtension

    return UniPicExtension()
