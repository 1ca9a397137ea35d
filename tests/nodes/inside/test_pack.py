import asyncio

import unipic_pack


def test_entry_point():
    extension = asyncio.run(unipic_pack.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    assert isinstance(nodes, list)
