"""Graphs for ComfyUI in both formats: as the page saves them (UI) and as the server runs them (API)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TITLE, GAP, PADDING, HEADING = 30, 34, 20, 44
"""Pixels: a node's title bar, the space between nodes, and a group's border and heading."""

CONTROL = "control_after_generate"
"""Widget that the page adds after a seed; the server does not have it."""


@dataclass(frozen=True)
class Kind:
    """A node type. sockets, outputs: name -> type; widgets: names in the page's order; size: as the page draws it."""

    sockets: Mapping[str, str]
    widgets: tuple[str, ...]
    outputs: Mapping[str, str]
    size: tuple[int, int]
    optional: frozenset[str] = frozenset()
    growing: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Prefix of growing sockets ("images.image_") -> their type and the most there can be."""


@dataclass
class Node:
    """A node in a workflow. wires: socket -> (node, output); values: widget -> value."""

    kind_name: str
    kind: Kind
    wires: dict[str, tuple[Node, str]]
    values: dict[str, Any]
    title: str = ""
    height: int = 0
    id: int = 0
    at: tuple[int, int] = (0, 0)

    def __getitem__(self, output: str) -> tuple[Node, str]:
        """An output, as the wire of another node."""
        assert output in self.kind.outputs, f"{self.kind_name} has {list(self.kind.outputs)}, not {output}"
        return self, output

    @property
    def size(self) -> tuple[int, int]:
        return self.kind.size[0], self.height or self.kind.size[1]

    def sockets(self) -> dict[str, str]:
        """Socket -> type in the page's order: the fixed ones, then each growing row with one free place at its end."""
        rows = dict(self.kind.sockets)
        for prefix, (kind, most) in self.kind.growing.items():
            used = sum(name.startswith(prefix) for name in self.wires)
            rows |= {f"{prefix}{i + 1}": kind for i in range(min(used + 1, most))}
        return rows

    def api(self) -> dict[str, Any]:
        wires = {
            name: [str(source.id), list(source.kind.outputs).index(out)] for name, (source, out) in self.wires.items()
        }
        values = {name: value for name, value in self.values.items() if name != CONTROL}
        return {"class_type": self.kind_name, "inputs": {**values, **wires}}


@dataclass
class Group:
    """Nodes below each other under a heading."""

    title: str
    nodes: list[Node]
    colour: str = "#3f789e"


class Workflow:
    """A graph. Columns of groups from left to right are its layout; places follow from sizes, so nothing overlaps."""

    def __init__(self, name: str, kinds: Mapping[str, Kind], note: str = "") -> None:
        self.name = name
        self.kinds = kinds
        self.nodes: list[Node] = []
        self.columns: list[list[Group]] = []
        self.note = note

    def add(
        self,
        kind: str,
        wires: Mapping[str, tuple[Node, str]] | None = None,
        values: Mapping[str, Any] | None = None,
        title: str = "",
        height: int = 0,
    ) -> Node:
        """A node; every widget of its kind must have a value, and every wire must fit its socket."""
        node = Node(kind, self.kinds[kind], dict(wires or {}), dict(values or {}), title, height, len(self.nodes) + 1)
        assert tuple(node.values) == node.kind.widgets, (
            f"{kind} has the widgets {node.kind.widgets}, got {tuple(node.values)}"
        )
        sockets = node.sockets()
        for name, (source, output) in node.wires.items():
            assert sockets.get(name) == source.kind.outputs[output], f"{kind}.{name} is a {sockets.get(name)}"
        missing = set(node.kind.sockets) - node.kind.optional - set(node.wires)
        assert not missing, f"{kind} needs {missing}"
        self.nodes.append(node)
        return node

    def column(self, *groups: Group) -> None:
        self.columns.append(list(groups))

    def api(self) -> dict[str, Any]:
        """API format, which the server runs."""
        return {str(node.id): node.api() for node in self.nodes}

    def ui(self) -> dict[str, Any]:
        """UI format, which the page saves."""
        groups = self._place()
        links = self._links()
        nodes = [self._ui_node(node, links) for node in self.nodes]
        if self.note:
            nodes.append(self._ui_note(len(self.nodes) + 1))
        return {
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": groups,
            "config": {},
            "extra": {"ds": {"scale": 0.8, "offset": [0, 0]}},
            "version": 0.4,
        }

    def _place(self) -> list[dict[str, Any]]:
        """Give every node its place, and return the groups around them."""
        assert sorted(n.id for column in self.columns for g in column for n in g.nodes) == [n.id for n in self.nodes]
        boxes: list[dict[str, Any]] = []
        left = 0
        for column in self.columns:
            width = max(node.size[0] for group in column for node in group.nodes)
            top = 0
            for group in column:
                y = top + HEADING
                for node in group.nodes:
                    node.at = (left + PADDING, y + TITLE)
                    y += TITLE + node.size[1] + GAP
                box = [left, top, width + 2 * PADDING, y - GAP + PADDING - top]
                boxes.append(
                    {"id": len(boxes) + 1, "title": group.title, "bounding": box, "color": group.colour, "flags": {}}
                )
                top += box[3] + GAP
            left += width + 2 * PADDING + GAP
        return boxes

    def _links(self) -> list[list[Any]]:
        """[id, from node, from slot, to node, to slot, type] of every wire."""
        links: list[list[Any]] = []
        for node in self.nodes:
            for slot, (name, kind) in enumerate(node.sockets().items()):
                if name in node.wires:
                    source, output = node.wires[name]
                    links.append(
                        [len(links) + 1, source.id, list(source.kind.outputs).index(output), node.id, slot, kind]
                    )
        return links

    def _ui_node(self, node: Node, links: list[list[Any]]) -> dict[str, Any]:
        into = {link[4]: link[0] for link in links if link[3] == node.id}
        inputs: list[dict[str, Any]] = []
        for slot, (name, kind) in enumerate(node.sockets().items()):
            free = name in node.kind.optional or name not in node.kind.sockets
            label = {"label": name.partition(".")[2]} if "." in name else {}
            inputs.append(
                {"name": name, **label, **({"shape": 7} if free else {}), "type": kind, "link": into.get(slot)}
            )
        outputs = [
            {"name": name, "type": kind, "links": [link[0] for link in links if link[1:3] == [node.id, slot]]}
            for slot, (name, kind) in enumerate(node.kind.outputs.items())
        ]
        return {
            "id": node.id,
            "type": node.kind_name,
            "pos": list(node.at),
            "size": list(node.size),
            "flags": {},
            "order": node.id - 1,
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
            **({"title": node.title} if node.title else {}),
            "properties": {"Node name for S&R": node.kind_name},
            "widgets_values": list(node.values.values()),
        }

    def _ui_note(self, number: int) -> dict[str, Any]:
        """To the left of everything, where reading begins."""
        place = {"pos": [-380, TITLE], "size": [340, 400]}
        look = {"title": "Read me", "properties": {}, "color": "#432", "bgcolor": "#653"}
        state = {"flags": {}, "order": number - 1, "mode": 0, "inputs": [], "outputs": []}
        return {"id": number, "type": "MarkdownNote", **place, **state, **look, "widgets_values": [self.note]}
