"""Stages of one run: each at its size from the weights of the one before, resumable between and within them."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests.trainers.data.test_several_sources import plain
from trainers.cache import main as cache_main
from trainers.config.run import ConfigError, load_config, parse_run, to_dict
from trainers.data.rows import make_row, target_size
from trainers.loop.checkpointing import newest_checkpoint
from trainers.loop.stages import train_stages
from trainers.tools import memory
from trainers.train import main, make_method
from unipic_core.weights.recipe import recipe_of

SIZES = (64, 96)


@pytest.fixture
def staged(changed, tmp_path):
    """A config file of two stages of three steps at 64 and 96 pixels, cached."""

    def make(**values):
        sections = {
            "sft": {"train_text_encoder": False},
            "network": {"adapter": {"rank": 2}},
            "preview": {"samples": 2},
        }
        common = plain(to_dict(changed(sections=sections, batch_size=2, save_every=2, sample_every=3, log_every=1)))
        del common["steps"]
        common["optimizer"] |= {"muon_lr": 0.0}
        data = {"samples": 6, "samples_per_shard": 6, "workers": 0}
        common["stages"] = [
            {
                "steps": 3,
                "data": {**data, "folder": str(tmp_path / f"cache-{size}"), "size": size, "reference_budget": size},
                "optimizer": {"lr": 1e-3 / (i + 1), "warmup_steps": 1},
            }
            for i, size in enumerate(SIZES)
        ]
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**common, **values}))
        if not (tmp_path / "cache-64").exists():
            assert cache_main([str(path)]) == 0
        return path

    return make


def test_a_wrong_cache_of_a_later_stage_stops_before_the_first(staged, capsys):
    """A day of training must not come before that error."""
    path = staged()
    values = yaml.safe_load(path.read_text())
    values["stages"][1]["data"] |= {"size": 128, "reference_budget": 128}
    path.write_text(yaml.safe_dump(values))
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert (
        "cache-96 holds another data set (size: expected 128, got 96; reference_budget: expected 128, got 96)" in said
    )
    assert newest_checkpoint(Path(load_config(path).stages[0].output)) is None


def test_stages_train_one_after_the_other(staged, metrics, capsys):
    path = staged()
    values = yaml.safe_load(path.read_text())
    values["stages"][1]["optimizer"]["lr"] = 0.0  # what it starts from stays
    path.write_text(yaml.safe_dump(values))
    config = load_config(path)
    assert (config.steps, [stage.steps for stage in config.stages]) == (6, [3, 3])
    assert main([str(path)]) == 0
    said = capsys.readouterr().out
    assert "stage 64: 3 steps, targets to 64^2, references to 64^2 pixels, at most 164 tokens a sample" in said
    assert "stage 96: 3 steps" in said
    output = Path(config.output)
    assert [len(metrics(stage.output)) for stage in config.stages] == [3, 3]
    first, second = (
        torch.load(Path(s.output) / "checkpoints" / f"step-000000{n}" / "state-00000.pt", weights_only=True)
        for s, n in zip(config.stages, (3, 2), strict=True)
    )
    assert second["updates"] == 5  # the moving average goes on
    a, b = (state["parts"]["student"]["parameters"] for state in (first, second))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert sum(float(x.norm()) > 0 for x in a) > 0.9 * len(a)  # the LoRAs have moved, but for the last text layers
    assert (output / "export" / "unipic_sft.safetensors").exists()
    assert not (Path(config.stages[0].output) / "export").exists()
    recipe = recipe_of(output / "export" / "unipic_sft")
    assert (recipe.reference_budget, recipe.output_budget) == (96, 96)
    grids = [Image.open(Path(stage.output) / "samples" / "step-0000003.png").size for stage in config.stages]
    assert grids[0][0] < grids[1][0]


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_run_goes_on_within_and_between_stages(staged, metrics, stop):
    whole = load_config(staged())
    train_stages(whole, make_method)
    broken = load_config(staged(output=f"{whole.output}-broken"))
    seen = []

    def interrupted(stage):
        method = make_method(stage)
        batch = method.batch
        method.prefetch = 0

        def fails(index):
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(index)
            return batch(index)

        method.batch = fails
        return method

    with pytest.raises(KeyboardInterrupt):
        train_stages(broken, interrupted)
    opened = []
    train_stages(broken, make_method, announce=lambda stage: opened.append(stage.stage))
    assert opened == (["64", "96"] if stop < 3 else ["96"])
    for a, b in zip(whole.stages, broken.stages, strict=True):
        assert metrics(a.output) == metrics(b.output)
    weights = [(Path(c.output) / "export" / "unipic_sft.safetensors").read_bytes() for c in (whole, broken)]
    assert weights[0] == weights[1]


def test_a_finished_run_only_exports(staged):
    config = load_config(staged())
    train_stages(config, make_method)
    newest = [newest_checkpoint(Path(stage.output)).stat().st_mtime_ns for stage in config.stages]
    train_stages(config, make_method)
    assert newest == [newest_checkpoint(Path(stage.output)).stat().st_mtime_ns for stage in config.stages]


def test_a_cache_of_another_budget_is_refused_by_name(staged, tmp_path):
    path = staged()
    data = yaml.safe_load(path.read_text())
    data["stages"][1]["data"]["folder"] = str(tmp_path / "cache-64")
    with pytest.raises(ConfigError, match=r"stage 96 needs a cache of its own: .*cache-64 is that of stage 64"):
        parse_run(data)
    data["stages"] = data["stages"][1:]
    with pytest.raises(ConfigError, match="size: expected 96, got 64; reference_budget: expected 96, got 64"):
        make_method(parse_run(data).stages[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(steps=5), "steps belongs into each of stages"),
        (lambda d: d["stages"][0].update(data=None), r"stages\[0\].data must be a section of keys and values, got"),
        (lambda d: d["stages"][1]["data"].update(sources="x"), r"stages\[1\].data.sources must be a list of sections"),
        (lambda d: d["stages"][0].pop("steps"), r"stages\[0\] needs steps"),
        (lambda d: d["stages"][1].update(seed=4), r"stages\[1\] cannot change seed"),
        (lambda d: d["stages"][1].update(batch_size=0), r"stages\[1\]: batch_size must be at least 1"),
        (lambda d: d["stages"][1].update(name="../x"), r"stages\[1\].name must be of letters"),
        (lambda d: d["stages"].append(d["stages"][1]), "different names or reference budgets, got 64, 96, 96"),
        (lambda d: d.update(stages=["a"]), "stages must be a list of sections"),
        (
            lambda d: d["stages"][1].update(sft={"train_text_encoder": True}),
            r"stages\[1\] trains other parameters than the first stage: sft.train_text_encoder must be the same",
        ),
        (
            lambda d: d["stages"][1].update(sft={"correspondence": {"blocks": [0]}}),
            r"stages\[1\] trains other parameters .*: sft.correspondence.blocks must be the same",
        ),
    ],
    ids=[
        "steps",
        "no data",
        "no sources",
        "no steps",
        "fixed",
        "wrong",
        "name",
        "twice",
        "no section",
        "encoder",
        "heads",
    ],
)
def test_wrong_stages(staged, change, message):
    data = yaml.safe_load(staged().read_text())
    change(data)
    with pytest.raises(ConfigError, match=message):
        parse_run(data)


def test_a_stage_may_have_other_sources():
    data = {"folder": "a", "kind": "jsonl", "path": "a.jsonl", "size": 64, "reference_budget": 64}
    sources = [{"folder": "b", "kind": "jsonl", "path": "b.jsonl"}, {"folder": "c", "kind": "webdataset", "path": "c"}]
    stages = [{"steps": 1}, {"steps": 2, "data": {"size": 96, "reference_budget": 96, "sources": sources}}]
    run = {"method": "sft", "output": "x", "network": {"model": "m"}, "data": data, "stages": stages}
    first, second = parse_run(run).stages
    assert [part.folder for part in first.data.parts] == ["a"]
    assert [(part.folder, part.size, part.kind) for part in second.data.parts] == [
        ("b", 96, "jsonl"),
        ("c", 96, "webdataset"),
    ]
    assert (first.output, second.output) == ("x/stage-1-64", "x/stage-2-96")
    json.dumps(plain(to_dict(second)))


def test_endless_scenes_need_no_folders():
    data = {"kind": "scenes", "size": 64, "reference_budget": 64, "scenes": {"buffer": 16, "mixture": {"pair": 1.0}}}
    larger = {"size": 96, "reference_budget": 96, "scenes": {"mixture": {"compose4": 2.0}}}
    stages = [{"steps": 1}, {"steps": 2, "data": larger}]
    run = {"method": "sft", "output": "x", "network": {"model": "m"}, "data": data, "stages": stages}
    first, second = parse_run(run).stages
    assert (first.data.size, second.data.size) == (64, 96)
    assert second.data.scenes.mixture == {"pair": 1.0, "compose4": 2.0}
    assert second.data.scenes.buffer == 16


def test_memory_is_printed_for_each_stage(staged, capsys):
    assert memory.main([str(staged()), "--gib", "1"]) == 1
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line.startswith("total")] == ["total"] * 2
    assert "stage 96: 3 steps, at most" in said


@pytest.mark.parametrize("budget", [1024, 1536, 2048])
def test_sizes_at_each_budget_are_the_releases(budget):
    """r = budget / sqrt(sum of w h); round(w r), then the nearest multiple of 32, each way."""
    sizes = [(1200, 800), (640, 1500), (333, 444)]
    pictures = [Image.new("RGB", size) for size in sizes]
    r = budget / math.sqrt(sum(w * h for w, h in sizes))
    expected = [tuple(max(round(round(side * r) / 32), 1) * 32 for side in size) for size in sizes]
    row = make_row(Image.new("RGB", (64, 64)), pictures, "a", budget)
    assert [(p.shape[1], p.shape[0]) for p in row.references] == expected
    assert [(v.shape[1], v.shape[0]) for v in row.vision] == [(w * 28 // 32, h * 28 // 32) for w, h in expected]
    assert target_size((4000, 4000), budget) == (budget, budget)
