"""The pack's entry point, and the sentence of one that cannot load."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import comfy.model_base
import pytest
import unipic_pack
from unipic_pack.nodes.host.model.model import check_takes_network


def test_entry_point() -> None:
    extension = asyncio.run(unipic_pack.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    assert isinstance(nodes, list)


def test_a_comfyui_without_a_name_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "unipic_pack.nodes.extension")
    monkeypatch.delattr(unipic_pack.nodes, "extension")
    monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
    with pytest.raises(ImportError, match=r"needs ComfyUI 0.29 or newer .* comfy_api.latest .*; update ComfyUI, or"):
        asyncio.run(unipic_pack.comfy_entrypoint())


def test_a_model_class_before_0_29() -> None:
    class QwenImage:
        def __init__(self, model_config: Any, model_type: Any = None, device: Any = None) -> None: ...

    check_takes_network(comfy.model_base.QwenImage)
    with pytest.raises(ImportError, match="its class QwenImage takes no network of another kind"):
        check_takes_network(QwenImage)
