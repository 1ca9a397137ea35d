"""The ComfyUI nodes, one file each, and in host/ the adapters between ComfyUI's types and the core's."""

CATEGORY = "UniPic"
"""Category of the nodes in ComfyUI's menus."""
