"""Strength, box and time range of references: the core's numbers, caches that are never stale, boxes from the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from causal_tools import CAUSAL, close
from compose_tools import WISHES, distance, image
from model_tools import random_inputs, velocity
from running import Executor, node_of
from torch import Tensor
from unipic_pack.nodes.compose import MultiImageCompose
from unipic_pack.nodes.host.model.influences import INFLUENCES
from unipic_pack.nodes.reference import UniPicReference
from unipic_pack.nodes.sample import FewStepSampler
from unipic_pack.unipic_core.conditioning.influence import Influence, Region
from unipic_pack.unipic_core.conditioning.sequence import (
    LatentShape,
    TextCond,
    pack_latents,
    pack_with_references,
    unpack_latents,
)
from unipic_pack.unipic_core.errors import UniPicError
from unipic_pack.unipic_core.model.reference_bias import reference_bias
from unipic_pack.unipic_core.weights.transformer import load_transformer
from unipic_pack.workflows import build

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("inference", "fresh")

LEFT = Region(0, 0, 500, 1000)
BOTH = (Influence(0.5, LEFT), Influence(2.0))
ALWAYS = ((1.0, 0.0),) * 2


def models(nano_model: Any, causal_models: dict[str, Any]) -> dict[str, Any]:
    return {"full": nano_model, **causal_models}


@pytest.mark.parametrize("form", ["full", *CAUSAL])
def test_as_the_core_computes_it(
    form: str, nano: Path, nano_model: Any, causal_folders: dict[str, Path], causal_models: dict[str, Any]
) -> None:
    x, text, references = random_inputs()
    shape = LatentShape(1, 4, 4)
    network = load_transformer({"full": nano, **causal_folders}[form], dtype=torch.float32)
    bias = reference_bias(BOTH, ALWAYS, shape, 0.7)
    packed = pack_with_references(pack_latents(x), shape, [references])
    want = unpack_latents(network(packed, 0.7, TextCond(text), reference_bias=bias), shape)
    timed = tuple(zip(BOTH, ALWAYS, strict=True))
    model = models(nano_model, causal_models)[form]
    got = velocity(model, x, 0.7, text, references, **{INFLUENCES: timed})
    torch.testing.assert_close(got, want, rtol=0, atol=3e-5)
    assert float((got - velocity(model, x, 0.7, text, references)).abs().max()) > 1e-3
    mask = torch.tensor([[1] * 6 + [0] * 3])
    padded = velocity(model, x, 0.7, text, references, attention_mask=mask, **{INFLUENCES: timed})
    short = velocity(model, x, 0.7, text[:, :6], references, **{INFLUENCES: timed})
    torch.testing.assert_close(padded, short, rtol=0, atol=3e-5)


def run(model: Any, influences: Any, cache: str = "auto", cfg: float = 1.0, steps: int = 4) -> Tensor:
    x, text, references = random_inputs()
    extra = {"reference_latents": references, **({INFLUENCES: influences} if influences else {})}
    positive, negative = ([[t, dict(extra)]] for t in (text, text[:, :4] * -0.5))
    empty = {"samples": torch.zeros_like(x)}
    return FewStepSampler.execute(model, positive, negative, empty, 3, steps, cfg, "euler", 1.0, cache)[0]["samples"]


@pytest.mark.parametrize("form", CAUSAL)
def test_the_cache_of_a_run_serves_every_strength(form: str, causal_models: dict[str, Any]) -> None:
    plain = run(causal_models[form], None)
    for influences in (BOTH, (Influence(), Influence(0.0, end=0.5))):
        cached, computed = (run(causal_models[form], influences, cache, cfg=2.0) for cache in ("auto", "off"))
        close(cached, computed)
        assert float((run(causal_models[form], influences) - plain).abs().max()) > 1e-3
    close(run(causal_models[form], None), plain)


def test_time_ranges_are_comfyuis_percents(nano_model: Any) -> None:
    plain = run(nano_model, None)
    assert torch.equal(run(nano_model, (Influence(0.0, start=1.0), Influence())), plain)
    always = run(nano_model, (Influence(0.0), Influence()))
    assert torch.equal(run(nano_model, (Influence(0.0, start=0.0, end=1.0), Influence())), always)
    half = run(nano_model, (Influence(0.0, end=0.5), Influence()))
    assert not torch.equal(half, always)
    assert not torch.equal(half, plain)


def composed(tiny: Any, *references: Any, **more: Any) -> Any:
    given = {f"reference_{i + 1}": r for i, r in enumerate(references)}
    return MultiImageCompose.execute(*tiny, "Blend them.", references=given, **{**WISHES, **more}).args


def wire(index: int, **more: Any) -> Any:
    return UniPicReference.execute(image(index), **more).args[0]


def test_without_strength_and_box_the_conditioning_has_nothing_new(tiny: Any) -> None:
    [[_, extra]] = composed(tiny, wire(0), wire(1, strength=1.0, x=0, width=1000), boxes="[]")[0]
    assert "reference_latents" in extra
    assert INFLUENCES not in extra


def test_influences_reach_both_conditionings_and_no_text_the_encoder(tiny: Any) -> None:
    plain = composed(tiny, wire(0), wire(1))
    boxes = '[{"id": "image_2", "bbox": [0, 500, 1000, 1000], "desc": "a red thing"}]'
    made = composed(tiny, wire(0, strength=0.5, start=0.25), wire(1), boxes=boxes)
    expected = (Influence(0.5, None, 0.25), Influence(region=Region(500, 0, 1000, 1000)))
    for which in (0, 1):
        assert distance(made[which][0][0], plain[which][0][0]) == 0
        assert made[which][0][1][INFLUENCES] == expected
    assert not torch.equal(made[3], plain[3]), "the sheet shows the box"
    drawn = composed(tiny, wire(0), wire(1), boxes=[{"type": "obj", "bbox": [0, 0, 500, 500], "desc": ""}])
    assert drawn[0][0][1][INFLUENCES] == (Influence(region=Region(0, 0, 500, 500)), Influence())


def test_wrong_boxes_are_one_sentence(tiny: Any) -> None:
    with pytest.raises(UniPicError, match="image 1 has a box in boxes and in Reference"):
        composed(tiny, wire(0, width=500), boxes='[{"bbox": [0, 0, 9, 9]}]')
    with pytest.raises(UniPicError, match="boxes must be JSON such as"):
        composed(tiny, wire(0), boxes="left")
    with pytest.raises(UniPicError, match="boxes must be a list of rows"):
        composed(tiny, wire(0), boxes=5)
    with pytest.raises(UniPicError, match="x and y from 0 to 999, and width and height above 0, got x 1000, y 0"):
        wire(0, x=1000)
    with pytest.raises(UniPicError, match="got x 0, y 5, width 1000, height 0"):
        wire(0, y=5, height=0)


def test_boxes_drawn_in_the_page_by_comfyuis_own_node() -> None:
    graph = build.two_references().api()
    inputs = node_of(graph, "MultiImageCompose")
    box = {"x": 0, "y": 0, "width": 64, "height": 128, "metadata": {"desc": "the panda of image 1"}}
    drawn = {"width": 128, "height": 128, "editor_state": {"__value__": [box]}}
    graph["drawn"] = {"class_type": "CreateBoundingBoxes", "inputs": drawn}
    inputs["boxes"] = ["drawn", 2]
    node_of(graph, "FewStepSampler").update(steps=1)
    done = Executor().run(graph)
    assert done.success, done.error.get("exception_message")
    inputs["boxes"] = '[{"id": "image_9", "bbox": [0, 0, 1, 1]}]'
    failed = Executor().run(graph)
    assert "box 1 is of image 9, and there are 2 pictures" in failed.error["exception_message"]
