"""The ComfyUI nodes: schemas and a few lines each, and the adapters between ComfyUI's types and the core's."""

CATEGORY = "UniPic"
"""Where ComfyUI's menus list the nodes."""
