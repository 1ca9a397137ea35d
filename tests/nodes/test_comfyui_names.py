"""The nodes use names of ComfyUI that exist, with arguments that they take: read from source, nothing is imported."""

import json

import pytest

from tests.nodes.comfyui import comfyui_path
from tests.nodes.comfyui_names import RECORD, Source, Use, recorded, uses


def wrong(use: Use, definition: dict) -> str | None:
    """What a use asks for that its definition does not have."""
    if "parameters" not in definition or definition["open"]:
        return None
    known = {*definition["parameters"], *definition["keyword_only"]}
    unknown = [name for name in use.keywords if name not in known]
    if unknown:
        return f"{use.where}: {use.name} has no parameter {unknown[0]!r}"
    if use.positional > len(definition["parameters"]):
        return f"{use.where}: {use.name} takes {len(definition['parameters'])} arguments, got {use.positional}"
    return None


def test_every_name_that_the_nodes_use_is_recorded_with_its_parameters():
    names = recorded()
    missing = sorted({f"{use.name} ({use.where})" for use in uses() if use.name not in names})
    assert not missing, "run python -m tests.nodes.comfyui_names COMFYUI"
    assert not names.keys() - {use.name for use in uses()}, "a recorded name is no longer used"
    assert not [found for use in uses() if (found := wrong(use, names[use.name]))]


def test_a_wrong_argument_or_name_is_found(tmp_path):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy/utils.py").write_text(
        "if True:\n    def tell(a, *, b=1): ...\nclass Bar:\n    def __init__(self, n): ...\n"
    )
    source = Source(tmp_path)
    tell = source.define("comfy.utils.tell")
    assert source.define("comfy.utils.say") is None
    assert wrong(Use("comfy.utils.tell", "x", ("b",), 1), tell) is None
    assert wrong(Use("comfy.utils.tell", "x", ("c",), 1), tell) == "x: comfy.utils.tell has no parameter 'c'"
    assert "takes 1 arguments, got 2" in wrong(Use("comfy.utils.tell", "x", (), 2), tell)
    assert source.define("comfy.utils.Bar")["parameters"] == ["n"]


@pytest.mark.skipif(comfyui_path() is None, reason="no ComfyUI: set COMFYUI_PATH to a checkout to compare its names")
def test_the_names_are_those_of_this_comfyui():
    source, record = Source(comfyui_path()), json.loads(RECORD.read_text())
    changed = {name for name, definition in record["names"].items() if source.define(name) != definition}
    assert not changed, f"recorded from ComfyUI {record['comfyui']}"
