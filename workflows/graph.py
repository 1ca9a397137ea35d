"""Graphs for ComfyUI in both formats: as the page saves them (UI) and as the server runs them (API)."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTES = Path(__file__).parent / "notes"
PACK, CORE = "comfyui-unipic", "comfy-core"
"""Names in ComfyUI's registry, by which its manager finds a missing pack."""

COMFYUI_VERSION = "0.33.0"

TITLE, GAP, PADDING, HEADING = 30, 34, 20, 44
"""Pixels: a node's title bar, the space between nodes, and a group's border and heading."""

CONTROL = "control_after_generate"
"""Widget that the page adds after a seed; the server does not have it."""


def pack_version() -> str:
    """Version of this pack, from its source: the workflows are built without importing it."""
    text = (ROOT / "unipic_core" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    assert found is not None
    return found[1]


def read_note(name: str, language: str = "") -> str:
    """notes/NAME.md, or notes/NAME.zh.md for ".zh"; {other} stands for the text of notes/other.md."""
    text = (NOTES / f"{name}{language}.md").read_text(encoding="utf-8").strip()
    return re.sub(r"^\{([\w-]+)\}$", lambda found: read_note(found[1], language), text, flags=re.MULTILINE)


@dataclass(frozen=True)
class Kind:
    """A node type. sockets, outputs: name -> type; widgets: names in the page's order; size: as the page draws it.

    ours: of this pack, not of ComfyUI itself.
    """

    sockets: Mapping[str, str]
    widgets: tuple[str, ...]
    outputs: Mapping[str, str]
    size: tuple[int, int]
    optional: frozenset[str] = frozenset()
    growing: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Prefix of growing sockets ("images.image_") -> their type and the most there can be."""

    first: int = 1
    """Number of the first growing socket."""

    ours: bool = False


@dataclass
class Node:
    """A node in a workflow. wires: socket -> (node, output); values, labels: widget -> value, name on the page."""

    kind_name: str
    kind: Kind
    wires: dict[str, tuple[Node, str]]
    values: dict[str, Any]
    title: str = ""
    height: int = 0
    id: int = 0
    at: tuple[int, int] = (0, 0)
    blueprint: Blueprint | None = None
    labels: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, output: str) -> tuple[Node, str]:
        """An output, as the wire of another node."""
        assert output in self.kind.outputs, f"{self.kind_name} has {list(self.kind.outputs)}, not {output}"
        return self, output

    @property
    def size(self) -> tuple[int, int]:
        return self.kind.size[0], self.height or self.kind.size[1]

    def sockets(self) -> dict[str, str]:
        """Socket -> type in the page's order: required ones, growing rows with one free place at their ends, optional
        ones."""
        rows = {name: kind for name, kind in self.kind.sockets.items() if name not in self.kind.optional}
        for prefix, (kind, most) in self.kind.growing.items():
            used = sum(name.startswith(prefix) for name in self.wires)
            rows |= {f"{prefix}{i + self.kind.first}": kind for i in range(min(used + 1, most))}
        return rows | {name: kind for name, kind in self.kind.sockets.items() if name in self.kind.optional}

    def properties(self) -> dict[str, Any]:
        """Name for search and replace, and the pack and version that the page names if the node is missing."""
        if self.blueprint is not None:
            return {"proxyWidgets": [[str(node.id), widget] for node, widget in self.blueprint.widgets]}
        pack, version = (PACK, pack_version()) if self.kind.ours else (CORE, COMFYUI_VERSION)
        return {"Node name for S&R": self.kind_name, "cnr_id": pack, "ver": version}


@dataclass
class Group:
    """Nodes below each other under a heading."""

    title: str
    nodes: list[Node]
    colour: str = "#3f789e"


class Workflow:
    """A graph. Columns of groups from left to right are its layout; places follow from sizes, so nothing overlaps.

    Its notes are notes/NAME.md and notes/NAME.zh.md; heading and first paragraph are title and description. app:
    widgets and outputs of ComfyUI's app mode, in which the workflow opens. runs_here: with the bundled model.
    """

    def __init__(self, name: str, kinds: Mapping[str, Kind]) -> None:
        self.name = name
        self.kinds = kinds
        self.nodes: list[Node] = []
        self.columns: list[list[Group]] = []
        self.runs_here = True
        self.app: tuple[Sequence[tuple[Node, str]], Sequence[Node]] | None = None

    def note(self) -> str:
        """Markdown in English and Chinese; "" without notes."""
        if not (NOTES / f"{self.name}.md").is_file():
            return ""
        return "\n\n---\n\n".join(read_note(self.name, language) for language in ("", ".zh"))

    def add(
        self,
        kind: str,
        wires: Mapping[str, tuple[Node, str]] | None = None,
        values: Mapping[str, Any] | None = None,
        title: str = "",
        height: int = 0,
    ) -> Node:
        """A node; every widget of its kind must have a value, and every wire must fit its socket."""
        node = Node(kind, self.kinds[kind], dict(wires or {}), dict(values or {}), title, height, self.next_id())
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

    def add_blueprint(self, blueprint: Blueprint, wires: Mapping[str, tuple[Node, str]], height: int) -> Node:
        """A subgraph as one node."""
        kind = Kind(blueprint.inputs.kind.outputs, (), blueprint.outputs.kind.sockets, (340, height))
        node = Node(blueprint.id, kind, dict(wires), {}, blueprint.name, 0, self.next_id(), blueprint=blueprint)
        self.nodes.append(node)
        return node

    def next_id(self) -> int:
        return len(self.nodes) + 1

    def column(self, *groups: Group) -> None:
        self.columns.append(list(groups))

    def api(self, prefix: str = "", feeds: Mapping[str, list[Any]] | None = None) -> dict[str, Any]:
        """API format, which the server runs. prefix, feeds: ids before those of a subgraph's nodes, and its inputs."""
        nodes: dict[str, Any] = {}
        for node in self.nodes:
            ends = {name: self._end(*wire, prefix, feeds or {}) for name, wire in node.wires.items()}
            wires = {name: end for name, end in ends.items() if end is not None}
            if node.blueprint is not None:
                nodes |= node.blueprint.api(f"{prefix}{node.id}:", wires)
            else:
                values = {name: value for name, value in node.values.items() if name != CONTROL}
                nodes[f"{prefix}{node.id}"] = {"class_type": node.kind_name, "inputs": {**values, **wires}}
        return nodes

    def _end(self, source: Node, output: str, prefix: str, feeds: Mapping[str, list[Any]]) -> list[Any] | None:
        """[id, slot] of the node behind a wire; None behind an input of the subgraph that nothing feeds."""
        if source.id == INPUTS:
            return feeds.get(output)
        if source.blueprint is not None:
            inner = source.blueprint.outputs.wires[output]
            return source.blueprint._end(*inner, f"{prefix}{source.id}:", {})
        return [f"{prefix}{source.id}", list(source.kind.outputs).index(output)]

    def ui(self) -> dict[str, Any]:
        """UI format, which the page saves."""
        groups = self._place()
        links = self._links()
        nodes = [self._ui_node(node, links) for node in self.nodes]
        if self.note():
            nodes.append(self._ui_note(len(self.nodes) + 1))
        subgraphs = [node.blueprint.definition() for node in self.nodes if node.blueprint is not None]
        return {
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": groups,
            **({"definitions": {"subgraphs": subgraphs}} if subgraphs else {}),
            "config": {},
            "extra": self._extra(),
            "version": 0.4,
        }

    def info(self) -> dict[str, str]:
        """Title and description, from the note, and the pack's version."""
        heading, _, rest = self.note().partition("\n\n")
        description = rest.partition("\n\n")[0]
        return {"name": heading.removeprefix("## "), "description": description, "version": pack_version()}

    def _extra(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"ds": {"scale": 0.8, "offset": [0, 0]}, "info": self.info()}
        if self.app is not None:
            widgets, outputs = self.app
            chosen = {"inputs": [[str(n.id), w] for n, w in widgets], "outputs": [str(n.id) for n in outputs]}
            extra |= {"linearMode": True, "linearData": chosen}
        return extra

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
        for node in self._ends():
            for slot, (name, kind) in enumerate(node.sockets().items()):
                if name in node.wires:
                    source, output = node.wires[name]
                    links.append(
                        [len(links) + 1, source.id, list(source.kind.outputs).index(output), node.id, slot, kind]
                    )
        return links

    def _ends(self) -> list[Node]:
        """Nodes at which wires end."""
        return self.nodes

    def _ui_node(self, node: Node, links: list[list[Any]]) -> dict[str, Any]:
        into = {link[4]: link[0] for link in links if link[3] == node.id}
        inputs: list[dict[str, Any]] = []
        for slot, (name, kind) in enumerate(node.sockets().items()):
            free = name in node.kind.optional or name not in node.kind.sockets
            label = {"label": name.partition(".")[2]} if "." in name else {}
            inputs.append(
                {"name": name, **label, **({"shape": 7} if free else {}), "type": kind, "link": into.get(slot)}
            )
        for name, text in node.labels.items():
            inputs.append({"name": name, "label": text, "type": "*", "widget": {"name": name}, "link": None})
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
            "properties": node.properties(),
            "widgets_values": list(node.values.values()),
        }

    def _ui_note(self, number: int) -> dict[str, Any]:
        """To the left of everything, where reading begins."""
        place = {"pos": [-440, TITLE], "size": [400, 760]}
        look = {"title": "Read me", "properties": {}, "color": "#432", "bgcolor": "#653"}
        state = {"flags": {}, "order": number - 1, "mode": 0, "inputs": [], "outputs": []}
        return {"id": number, "type": "MarkdownNote", **place, **state, **look, "widgets_values": [self.note()]}


INPUTS, OUTPUTS = -10, -20
"""Ids of a subgraph's ends."""


class Blueprint(Workflow):
    """A subgraph that ComfyUI's page lists beside the nodes, from subgraphs/NAME.json.

    inputs, outputs: name -> type. widgets: (node, widget), shown on the one node.
    """

    def __init__(
        self,
        name: str,
        kinds: Mapping[str, Kind],
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        description: str,
        aliases: Sequence[str],
    ) -> None:
        super().__init__(name, kinds)
        self.id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{name}"))
        self.inputs = Node("", Kind({}, (), inputs, (160, 40 + 20 * len(inputs))), {}, {}, id=INPUTS)
        self.outputs = Node("", Kind(outputs, (), {}, (120, 40 + 20 * len(outputs))), {}, {}, id=OUTPUTS)
        self.widgets: Sequence[tuple[Node, str]] = ()
        self.about = description
        self.aliases = list(aliases)

    def next_id(self) -> int:
        """From 101 on: the page numbers nodes anew whose ids occur outside the subgraph too."""
        return len(self.nodes) + 101

    def _ends(self) -> list[Node]:
        return [*self.nodes, self.outputs]

    def definition(self) -> dict[str, Any]:
        """The subgraph, as the page saves it."""
        groups = self._place()
        links = self._links()
        right = max(group["bounding"][0] + group["bounding"][2] for group in groups)
        ends = (
            (self.inputs, -300, self.inputs.kind.outputs, 1),
            (self.outputs, right + 80, self.outputs.kind.sockets, 3),
        )
        ports = [
            [
                {
                    "id": str(uuid.uuid5(uuid.UUID(self.id), f"{node.id}/{name}")),
                    "name": name,
                    "type": kind,
                    "linkIds": [link[0] for link in links if link[end : end + 2] == [node.id, slot]],
                    "pos": [left + 20, 20 + 20 * slot],
                }
                for slot, (name, kind) in enumerate(names.items())
            ]
            for node, left, names, end in ends
        ]
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        state = {
            "lastGroupId": len(groups),
            "lastNodeId": self.next_id() - 1,
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        }
        return {
            "id": self.id,
            "version": 1,
            "state": state,
            "revision": 0,
            "config": {},
            "name": self.name,
            "inputNode": {"id": INPUTS, "bounding": [-300, 0, *self.inputs.kind.size]},
            "outputNode": {"id": OUTPUTS, "bounding": [right + 80, 0, *self.outputs.kind.size]},
            "inputs": ports[0],
            "outputs": ports[1],
            "widgets": [],
            "nodes": [self._ui_node(node, links) for node in self.nodes],
            "groups": groups,
            "links": [dict(zip(keys, link, strict=True)) for link in links],
            "extra": {},
            "category": "UniPic",
            "description": self.about,
        }

    def file(self) -> dict[str, Any]:
        """The file in subgraphs/: a workflow of the one node."""
        w = Workflow(self.name, self.kinds)
        w.column(Group(self.name, [w.add_blueprint(self, {}, 300)]))
        content = w.ui()
        content["groups"] = []
        content["extra"] = {"BlueprintDescription": self.about, "BlueprintSearchAliases": self.aliases}
        return content
