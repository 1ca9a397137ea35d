"""Reference (UniPic): picture, mask, weight and switch in one wire; sizes at which Multi-Image Compose shows them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from compose_tools import WISHES, distance, image
from running import Executor, Graph, node_of
from unipic_pack.nodes.compose import MultiImageCompose
from unipic_pack.nodes.host.pictures.references import Reference
from unipic_pack.nodes.reference import UniPicReference
from unipic_pack.unipic_core.errors import UniPicError
from unipic_pack.workflows import build

pytestmark = pytest.mark.usefixtures("fresh")


def wire(*inputs: Any, **more: Any) -> Reference:
    """The output of the node."""
    return UniPicReference.execute(*inputs, **more).args[0]


@torch.inference_mode()
def run(parts: Any, *references: Reference | None, prompt: str = "Blend them.", **more: Any) -> Any:
    """The node's outputs; None leaves a socket empty, as a muted node does."""
    sockets = {f"reference_{i + 1}": r for i, r in enumerate(references) if r is not None}
    return MultiImageCompose.execute(*parts, prompt, references=sockets, **{**WISHES, **more}).args


def same(one: Any, other: Any) -> None:
    """Equal conditionings, and equal reference latents."""
    assert distance(one[0][0][0], other[0][0][0]) == 0
    latents = [made[0][0][1]["reference_latents"] for made in (one, other)]
    assert len(latents[0]) == len(latents[1])
    assert all(torch.equal(a, b) for a, b in zip(*latents, strict=True))


def sides(made: Any) -> list[list[int]]:
    """Latent sides (height, width) of the references."""
    return [list(z.shape[-2:]) for z in made[0][0][1]["reference_latents"]]


def test_one_wire_is_a_picture_and_its_mask(tiny: Any) -> None:
    hole = torch.zeros(1, 50, 70)
    hole[:, :25] = 1
    images, masks = {"image_1": image(0), "image_2": image(1)}, {"mask_2": hole}
    with torch.inference_mode():
        sockets = MultiImageCompose.execute(*tiny, "Blend them.", images=images, masks=masks, **WISHES).args
    same(run(tiny, wire(image(0)), wire(image(1), hole)), sockets)
    with torch.inference_mode():
        both = MultiImageCompose.execute(
            *tiny,
            "Blend them.",
            images={"image_1": image(0)},
            references={"reference_1": wire(image(1), hole)},
            **WISHES,
        ).args
    same(both, sockets)


def test_a_switched_off_picture_is_left_out_and_told(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = run(tiny, wire(image(0)), wire(image(1), enabled=False), wire(image(2)))
    same(made, run(tiny, wire(image(0)), wire(image(2))))
    assert "reference_2 is switched off, so later pictures are renumbered; reference_3 is image 2" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(tiny, wire(image(0)), wire(image(1), enabled=False))
    assert "reference_2 is switched off;" in caplog.text
    assert "renumbered" not in caplog.text


def test_a_muted_reference_is_told(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The page sends reference_1 and reference_3 alone where the second node is muted or bypassed."""
    with caplog.at_level(logging.WARNING):
        run(tiny, wire(image(0)), None, wire(image(2)))
    line = "reference_2 is empty, muted or bypassed, so later pictures are renumbered; reference_3 is image 2"
    assert line in caplog.text


def test_numbers_behind_pictures_of_the_other_sockets_are_told(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run(tiny, wire(image(1)), images={"image_1": image(0)})
    assert "reference_1 is image 2 in the prompt" in caplog.text


def test_a_batch_counts_as_its_first_picture_unless_asked(tiny: Any) -> None:
    frames = torch.cat([image(i) for i in range(3)])
    same(run(tiny, wire(frames)), run(tiny, wire(frames[:1])))
    assert len(run(tiny, wire(frames), batches="all")[0][0][1]["reference_latents"]) == 3


def test_weights_and_equal_shares_change_the_sizes(tiny: Any) -> None:
    large, small = image(0, 300, 200), image(1, 40, 40)
    plain = run(tiny, wire(large), wire(small), reference_budget=256)
    assert sides(plain) == [[24, 40], [4, 4]]
    same(run(tiny, wire(large, weight=3.0), wire(small, weight=3.0), reference_budget=256), plain)
    assert sides(run(tiny, wire(large), wire(small), reference_budget=256, share="equal")) == [[20, 28], [24, 24]]
    assert sides(run(tiny, wire(large), wire(small, weight=16.0), reference_budget=256)) == [[20, 32], [16, 16]]


def test_sizes_are_told_and_small_ones_warned_of(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(tiny, wire(image(0, 300, 200)), wire(image(1, 40, 40)), reference_budget=256)
    assert "image 2 (40x40) is seen at 32x32, below 64x64, so its details are lost" in caplog.text
    assert "image 1 300x200 seen at 320x192, image 2 40x40 seen at 32x32" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run(tiny, wire(image(0)), wire(image(1)))
    assert "image 1 70x50 seen at 64x64, image 2 70x50 seen at 64x64" in caplog.text
    assert all(record.levelno == logging.INFO for record in caplog.records)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ({"reference_1": 5}, r"reference_1 must come from Reference \(UniPic\), got int; connect that node"),
        ({"reference_2": "a.png"}, r"reference_2 must come from Reference \(UniPic\), got str"),
        (
            {"reference_1": Reference(torch.ones(1, 8, 8, 3), weight=float("nan"))},
            "weight should be a number from 0.01",
        ),
        (
            {"reference_1": Reference(torch.ones(1, 8, 8, 3), torch.ones(2, 8, 8))},
            "one for each of 1 pictures",
        ),
        ({"reference_1": Reference(None)}, "reference_1 must be an IMAGE or a MASK, got nothing"),
    ],
)
def test_wrong_wires_are_one_sentence(tiny: Any, references: dict[str, Any], message: str) -> None:
    with pytest.raises(UniPicError, match=message):
        MultiImageCompose.execute(*tiny, "Go.", references=references, **WISHES)


def test_seven_references(tiny: Any) -> None:
    six = [wire(image(i)) for i in range(6)]
    with pytest.raises(UniPicError, match="at most 6 pictures can be composed, got 7"):
        run(tiny, *six, images={"image_1": image(7)})


def referenced() -> Graph:
    """The first shipped workflow with its pictures through Reference nodes."""
    graph = build.two_references().api()
    inputs = node_of(graph, "MultiImageCompose")
    for number in (1, 2):
        picture = inputs.pop(f"images.image_{number}")
        graph[f"r{number}"] = {
            "class_type": "UniPicReference",
            "inputs": {"image": picture, "weight": 1, "enabled": True},
        }
        inputs[f"references.reference_{number}"] = [f"r{number}", 0]
    node_of(graph, "FewStepSampler").update(steps=1)
    return graph


def test_in_a_graph_and_old_graphs_without_the_new_inputs() -> None:
    executor = Executor()
    assert executor.run(referenced()).success
    old = build.two_references().api()
    node_of(old, "MultiImageCompose").pop("share")
    for name in ("schedule", "shift"):
        node_of(old, "FewStepSampler").pop(name)
    node_of(old, "FewStepSampler").update(steps=1)
    assert executor.run(old).success
    literal = referenced()
    node_of(literal, "MultiImageCompose")["references.reference_2"] = 5
    done = executor.run(literal)
    assert not done.success
    assert "reference_2 must come from Reference (UniPic), got int" in done.error["exception_message"]
