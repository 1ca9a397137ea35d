"""What the nodes declare, read without ComfyUI: ids, tooltips, limits; and that they agree with the workflows."""

from __future__ import annotations

import pytest

from tests.paths import ROOT
from unipic_core.weights.recipe import recipe_of
from workflows import build
from workflows.graph import CONTROL
from workflows.kinds import KINDS

MODELS = ROOT / "unipic_core" / "models"
IDS = {
    *("LoadUniPic", "MultiImageCompose", "FewStepSampler", "DistillLoRA"),
    *("UniPicSampleImages", "UniPicSigmas", "UniPicSamplerSelect", "UniPicCompare", "UniPicReference"),
    *("UniPicCrop", "UniPicStitch", "UniPicPlanLayout"),
}
SOCKETS = {"Model", "Clip", "Vae", "Conditioning", "Latent", "Image", "Mask", "Autogrow"}
SOCKETS |= {"UNIPIC_REFERENCE", "UNIPIC_STITCH"}


def test_the_nodes(schemas) -> None:
    assert {schema["node_id"] for schema in schemas} == IDS
    assert len(schemas) == len(IDS)


def test_everything_is_explained(schemas) -> None:
    for schema in schemas:
        assert schema["display_name"]
        assert schema["category"] == "UniPic"
        assert len(schema["description"]) > 30, schema["node_id"]
        for part in (*schema["inputs"], *schema["outputs"]):
            assert len(part.get("tooltip", "")) > 15, f"{schema['node_id']}.{part['id']} has no tooltip"
        for growing in (i for i in schema["inputs"] if i["type"] == "Autogrow"):
            assert growing["template"]["input"]["tooltip"]


def test_defaults_are_allowed(schemas) -> None:
    for schema in schemas:
        for field in schema["inputs"]:
            name, default = f"{schema['node_id']}.{field['id']}", field.get("default")
            if field["type"] in ("Int", "Float"):
                assert field["min"] <= default <= field["max"], name
            if field["type"] == "Combo" and default is not None:
                assert default in field["options"], name


def test_the_sampler_to_begin_with_is_that_of_the_model_to_begin_with(schemas) -> None:
    """Who wires Sampler Select to Load UniPic and changes nothing gets sharp pictures."""
    defaults = {s["node_id"]: {i["id"]: i.get("default") for i in s["inputs"]} for s in schemas}
    model = defaults["LoadUniPic"]["model"].removesuffix(" (bundled)")
    assert defaults["UniPicSamplerSelect"]["sampler"] == recipe_of(MODELS / model).sampler


def test_six_pictures_and_six_masks(schemas) -> None:
    [compose] = [schema for schema in schemas if schema["node_id"] == "MultiImageCompose"]
    growing = {i["id"]: i["template"] for i in compose["inputs"] if i["type"] == "Autogrow"}
    assert growing["images"]["names"] == [f"image_{i}" for i in range(1, 7)]
    assert growing["masks"]["names"] == [f"mask_{i}" for i in range(1, 7)]
    assert growing["references"]["names"] == [f"reference_{i}" for i in range(1, 7)]
    assert growing["images"]["min"] == growing["masks"]["min"] == growing["references"]["min"] == 0


@pytest.mark.parametrize("name", sorted(IDS))
def test_the_workflows_know_the_nodes(schemas, name: str) -> None:
    """workflows/kinds.py repeats the schemas: the order of widgets is what a saved workflow relies on."""
    [schema] = [schema for schema in schemas if schema["node_id"] == name]
    kind = KINDS[name]
    widgets = [i["id"] for i in schema["inputs"] if i["type"] not in SOCKETS]
    assert [widget for widget in kind.widgets if widget != CONTROL] == widgets
    assert list(kind.sockets) == [i["id"] for i in schema["inputs"] if i["type"] in SOCKETS - {"Autogrow"}]
    assert [output.get("display_name", output["type"].upper()) for output in schema["outputs"]] == list(kind.outputs)
    assert [output["type"].upper() for output in schema["outputs"]] == list(kind.outputs.values())


def test_shipped_choices_exist(schemas) -> None:
    """Every widget of our nodes in a workflow has a value that its list holds."""
    lists = {(s["node_id"], i["id"]): i["options"] for s in schemas for i in s["inputs"] if i["type"] == "Combo"}
    for make in build.ALL:
        for node in make().nodes:
            for widget, value in node.values.items():
                if (node.kind_name, widget) in lists:
                    assert value in lists[node.kind_name, widget], f"{make.__name__}: {widget} {value!r}"
