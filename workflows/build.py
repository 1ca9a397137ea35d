"""Write the workflows beside this file and the subgraphs: python -m workflows.build

The JSON files are what ComfyUI's template browser and its list of nodes show; edit the descriptions, not them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from .basics import (
    base_beside_few_step,
    low_memory,
    single_edit,
    six_references,
    stock_ksampler,
    stock_nodes,
    three_references,
    two_references,
)
from .graph import Blueprint, Workflow
from .photos import boxes, frames, grid, inpaint, own_photographs, released_weights, second_pass
from .start import app, compose_blueprint, edit_blueprint, one_node

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "workflows.md"
SUBGRAPHS = FOLDER.parent / "subgraphs"
"""ComfyUI's page lists its files beside the nodes."""

ALL: tuple[Callable[[], Workflow], ...] = (
    two_references,
    three_references,
    six_references,
    single_edit,
    stock_ksampler,
    stock_nodes,
    low_memory,
    base_beside_few_step,
    one_node,
    app,
    own_photographs,
    inpaint,
    boxes,
    second_pass,
    grid,
    frames,
    released_weights,
)
BLUEPRINTS: tuple[Callable[[], Blueprint], ...] = (compose_blueprint, edit_blueprint)


def text_of(workflow: Workflow) -> str:
    """Text of a workflow's or a subgraph's file."""
    content = workflow.file() if isinstance(workflow, Blueprint) else workflow.ui()
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def page() -> str:
    """docs/workflows.md: what each workflow is for, and how many nodes it has."""
    lines = [
        "# Workflows",
        "",
        "In ComfyUI: *Workflow*, *Browse Templates*, *ComfyUI-UniPic*. All but the last run at once, with the bundled",
        "model. From a fresh ComfyUI to a first picture of one's own, with workflow 10, took 92 seconds on two busy",
        "CPU cores without a GPU, downloads aside: 32 for copying ComfyUI and this pack, 54 until the server answered,",
        "6 for the picture. The bundled model was trained on drawn things; photographs need the released weights.",
        "",
        "| | | what it shows | nodes |",
        "|---|---|---|---|",
    ]
    for make in ALL:
        workflow = make()
        info, picture = workflow.info(), f"workflows/{workflow.name}.png"
        name = f"[{info['name']}]({picture})" if (PAGE.parent / picture).exists() else info["name"]
        lines.append(f"| {workflow.name[:2]} | {name} | {info['description']} | {len(workflow.nodes)} |")
    lines += ["", "Two subgraphs stand in the list of nodes, each a whole workflow in one node:", ""]
    lines += [f"- **{one.name}**: {one.about}" for one in (make() for make in BLUEPRINTS)]
    return "\n".join(lines) + "\n"


def main() -> None:
    for make in ALL:
        workflow = make()
        (FOLDER / f"{workflow.name}.json").write_text(text_of(workflow), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    for make_blueprint in BLUEPRINTS:
        subgraph = make_blueprint()
        (SUBGRAPHS / f"{subgraph.name}.json").write_text(text_of(subgraph), encoding="utf-8")


if __name__ == "__main__":
    main()
