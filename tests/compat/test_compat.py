"""Files, options and ids of commit 94e8c10: later versions read them with the same values (README.md here)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compat.make import OPTION, PROGRAMS, digests_of, small_network
from tests.paths import ROOT
from trainers.config.run import load_config, to_dict
from trainers.train import main as train
from unipic_core.bundled import BUNDLED, RENAMED
from unipic_core.weights.lora import read_lora
from unipic_core.weights.merge import merge
from unipic_core.weights.recipe import recipe_of
from unipic_core.weights.transformer import load_transformer

FIXTURES = ROOT / "tests" / "compat" / "fixtures"
EXPECTED = json.loads((FIXTURES / "weights" / "expected.json").read_text(encoding="utf-8"))
WORKFLOWS = sorted((FIXTURES / "workflows").glob("*.json"))
SOCKETS = {"Model", "Clip", "Vae", "Conditioning", "Latent", "Image", "Mask", "Autogrow"}


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Values of `before` that `now` lacks or changes; keys that are new in `now` are allowed."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [text for key in before for text in differences(before[key], now.get(key, "absent"), f"{where}.{key}")]
    return [] if before == now else [f"{where}: {before!r} became {now!r}"]


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


@pytest.mark.parametrize("name", json.loads((FIXTURES / "configs.json").read_text(encoding="utf-8")))
def test_configs_give_the_same_values(name: str) -> None:
    before = json.loads((FIXTURES / "configs.json").read_text(encoding="utf-8"))[name]
    assert differences(before, plain(to_dict(load_config(FIXTURES / "configs" / name)))) == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_start_and_keep_their_options(program: str) -> None:
    before = json.loads((FIXTURES / "options.json").read_text(encoding="utf-8"))[program]
    command = [sys.executable, "-m", *program.split(), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(before) <= set(OPTION.findall(done.stdout))


def test_installed_scripts_find_their_entry() -> None:
    from unipic_core.cli import main

    assert callable(main)


# --- nodes and workflows ---


def test_ids_stay_and_new_inputs_come_last(schemas: list[dict[str, Any]]) -> None:
    now = {schema["node_id"]: schema for schema in schemas}
    for before in json.loads((FIXTURES / "schemas.json").read_text(encoding="utf-8")):
        for part in ("inputs", "outputs"):
            ours = [(i["id"], i["type"]) for i in now[before["node_id"]][part]]
            theirs = [(i["id"], i["type"]) for i in before[part]]
            for kinds in (lambda i: i[1] in SOCKETS, lambda i: i[1] not in SOCKETS):
                old = [i for i in theirs if kinds(i)]
                assert [i for i in ours if kinds(i)][: len(old)] == old, f"{before['node_id']}: {part}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_saved_widgets_are_allowed_values(path: Path, schemas: list[dict[str, Any]]) -> None:
    """A saved workflow holds widget values by position."""
    now = {schema["node_id"]: schema for schema in schemas}
    seen = 0
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        if node["type"] not in now:
            continue
        fields = [i for i in now[node["type"]]["inputs"] if i["type"] not in SOCKETS]
        values = list(node.get("widgets_values") or [])
        for field in fields:
            if not values:
                break
            value = values.pop(0)
            if field.get("control_after_generate"):
                assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
            assert allowed(field, value), f"{node['type']}.{field['id']} = {value!r}"
            seen += 1
        assert values == [], node["type"]
    assert seen or not any(node["type"] in now for node in json.loads(path.read_text(encoding="utf-8"))["nodes"])


def allowed(field: dict[str, Any], value: Any) -> bool:
    kind = field["type"]
    if kind == "Combo":
        renamed = RENAMED.get(str(value).removeprefix(BUNDLED))
        return value in field["options"] or not field["options"] or f"{BUNDLED}{renamed}" in field["options"]
    if kind in ("Int", "Float"):
        return isinstance(value, (int, float)) and field["min"] <= value <= field["max"]
    return isinstance(value, {"String": str, "Boolean": bool}[kind])


# --- weights ---


@pytest.mark.parametrize("name", ["converted", "merged"])
def test_weights_give_the_same_tensors_and_recipe(name: str) -> None:
    path = FIXTURES / "weights" / f"{name}.safetensors"
    assert digests_of(load_transformer(path, dtype=torch.float32).state_dict()) == EXPECTED["tensors"][name]
    assert differences(EXPECTED["recipes"][name], plain(vars(recipe_of(path)))) == []


def test_a_lora_gives_the_same_recipe_and_the_same_merged_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, merged = FIXTURES / "weights" / "lora.safetensors", tmp_path / "merged.safetensors"
    assert differences(EXPECTED["recipes"]["lora"], plain(vars(read_lora(lora).recipe))) == []
    monkeypatch.chdir(ROOT)
    merge(small_network(tmp_path / "transformer"), merged, [(lora, 0.5)], dtype="fp8_scaled")
    assert digests_of(load_transformer(merged, dtype=torch.float32).state_dict()) == EXPECTED["tensors"]["merged"]


# --- training ---


def test_a_cache_trains_and_a_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with the paths of the run, since a run resumes only with its own settings."""
    place = tmp_path / "tests" / "compat" / "fixtures"
    shutil.copytree(FIXTURES / "training", place / "training")
    shutil.copytree(ROOT / "tests" / "golden" / "tiny", tmp_path / "tests" / "golden" / "tiny")
    monkeypatch.chdir(tmp_path)
    config = "tests/compat/fixtures/training/config.yaml"
    assert train([config, "steps=4", "--allow-config-change", "steps"]) == 0, capsys.readouterr().err
    assert re.search(r"resuming .* at step 2 of 4", capsys.readouterr().out)
    lines = (place / "training" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
