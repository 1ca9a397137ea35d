"""ComfyUI-UniPic: the pack's entry point. Nothing is imported before ComfyUI asks for the nodes."""

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """ComfyUI calls this once; see nodes/extension.py. ImportError with a sentence for a ComfyUI of another form."""
    try:
        from .nodes.extension import UniPicExtension
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "ComfyUI-UniPic needs ComfyUI 0.29 or newer and was tested up to 0.33; it cannot load here, since "
            f"{error}; update ComfyUI, or this pack"
        ) from error
    return UniPicExtension()
