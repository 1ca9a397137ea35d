"""The benchmarks themselves: the arithmetic, and each in its tiny form from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.benchmarks import approximate, gpu, network, peers, scaling, tangent_precision, training, training_steps, vae
from tests.benchmarks.arithmetic import Load, cache_bytes, count_flops, fill_flops, step_flops, whole_flops
from tests.benchmarks.common import Bar, Times, draw, draw_bars, heading, in_turns, line, write_json
from tests.benchmarks.network import diffusers_network, evaluate_diffusers
from tests.benchmarks.scaled_fp8 import ScaledLinear
from tests.benchmarks.systems import CAUSAL, TINY_SIZES, Kind, evaluate, fill, sharing, square, with_text
from unipic_core.conditioning.sequence import LatentShape
from unipic_core.model.config import ATTENTION_FORMS, FULL, MMDiTConfig

KIND = Kind(torch.float32)


# --- the arithmetic ---


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize("count", [0, 2])
def test_operations_are_those_that_torch_counts(form, count):
    load = replace(with_text(LatentShape(1, 3, 4), sharing(4, count)), batch=2)
    network = KIND.random(TINY_SIZES.with_attention_form(form))
    inputs = KIND.inputs(TINY_SIZES, load)
    cache = fill(network, inputs)
    assert count_flops(lambda: evaluate(network, inputs)) == step_flops(network.config, load)
    assert count_flops(lambda: evaluate(network, inputs, cache)) == step_flops(network.config, load, cached=True)
    assert count_flops(lambda: fill(network, inputs)) == fill_flops(network.config, load)
    kept = sum(x.nbytes for pairs in cache.values() for pair in pairs for x in pair)
    assert kept == cache_bytes(network.config, load, 4)


def test_operations_of_diffusers_class():
    load = with_text(square(4), sharing(4, 3))
    ours = KIND.random(TINY_SIZES)
    theirs, inputs = diffusers_network(ours), KIND.inputs(TINY_SIZES, load)
    assert count_flops(lambda: evaluate_diffusers(theirs, inputs)) == whole_flops(TINY_SIZES, load)
    assert (evaluate(ours, inputs) - evaluate_diffusers(theirs, inputs)).abs().max() < 1e-5


def test_the_released_step_is_that_of_the_papers_sizes():
    """The task's own figures: 187 TFLOP a step, and 0.56 or 0.45 of it with a cache."""
    config, load = MMDiTConfig(), Load(square(64), (square(64),), 1070)
    full = step_flops(config, load)
    assert full / 1e12 == pytest.approx(187, rel=0.02)
    parts = [step_flops(config.with_attention_form(form), load, cached=True) / full for form in CAUSAL]
    assert parts == pytest.approx([0.57, 0.45], abs=0.02)


@pytest.mark.parametrize("count", range(1, 7))
def test_references_that_share_a_budget_fill_it(count):
    shapes = sharing(32, count)
    assert len(shapes) == count
    assert sum(shape.num_tokens for shape in shapes) == 32**2
    assert with_text(square(32), shapes).text == 64 + 256


def test_exponents_are_slopes():
    points = {float(x): 3.0 * x**1.5 for x in (1, 2, 4, 8)}
    assert scaling.exponent({0.0: 5.0, **points}) == pytest.approx(1.5)
    assert scaling.exponent({0.0: 1.0, 2.0: 1.0}) is None


@pytest.mark.parametrize("direction", ["encode", "decode"])
@torch.no_grad()
def test_operations_of_the_vae_are_counted_without_memory(direction):
    """The counts on empty tensors are those of a run."""
    on_meta, on_cpu = (
        {
            whose: count_flops(run)
            for whose, run in vae.runs_of(vae.pair(vae.TINY.config, torch.device(device)), 32)[direction].items()
        }
        for device in ("meta", "cpu")
    )
    assert on_meta == on_cpu
    assert 1 / 3 < on_meta[vae.OURS] / on_meta[vae.DIFFUSERS] < 0.45


# --- what they share ---


def test_runs_take_turns_there_and_back():
    order: list[str] = []
    times = in_turns({name: lambda name=name: order.append(name) for name in "abc"}, rounds=2)
    assert "".join(order) == "abccbaabc"
    assert [len(row) for row in times.seconds.values()] == [2, 2, 2]


def test_ratios_are_of_neighbours():
    times = Times({"a": [1.0, 2.0, 30.0], "b": [2.0, 4.0, 60.0], "c": [1.0, 1.0, 1.0]})
    assert times.ratio("a", "b") == 0.5
    assert times.ratio({"a": 2, "c": 1}, "b") == pytest.approx(1.25)
    assert times.median({"a": 2, "c": 1}) == 5.0


def test_bars():
    at_most = Bar("x", 0.5, 0.6, 0.4)
    assert (at_most.verdict, replace(at_most, measured=0.61).verdict) == ("PASS", "FAIL")
    assert replace(at_most, at_most=False).verdict == "FAIL"
    assert replace(at_most, judged=False).verdict == "set for another device"


def test_tables_leave_blank_what_a_row_does_not_have():
    columns = {"name": "<6", "seconds": ">9.2f", "whole": ">5"}
    assert heading(columns) == "name      seconds  whole"
    assert line(columns, {"name": "a", "seconds": 1.234, "whole": False}) == "a            1.23     no"
    assert line(columns, {"name": "a", "seconds": None}).split() == ["a"]


def test_a_result_that_cannot_be_written_leaves_the_last_one(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"rows": [1]})
    with pytest.raises(TypeError):
        write_json(path, {"rows": [object()]})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert list(tmp_path.iterdir()) == [path]


def test_plots_show_the_arithmetic_beside_every_bar(tmp_path):
    figures = {"a": (2.0, 1.0), "b": (3.0, 0.5)}
    drawn = []

    def fill(axes):
        draw_bars(axes[0], figures)
        drawn.extend(axes)

    draw(tmp_path / "x.json", ["title"], fill)
    assert [bar.get_width() for bar in drawn[0].patches] == [2.0, 3.0]
    (lines,) = drawn[0].collections
    assert [segment[0][0] for segment in lines.get_segments()] == [1.0, 0.5]
    assert [label.get_text() for label in drawn[0].get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize("rows", [1, 40])
def test_fp8_layers_are_near_their_weights(rows):
    torch.manual_seed(0)
    exact = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    layer = ScaledLinear(64, 32, dtype=torch.bfloat16)
    layer.fill(exact.weight.detach())
    layer.bias.data.copy_(exact.bias.detach())
    x = torch.randn(2, rows, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        want, got = exact(x).float(), layer(x).float()
    assert got.shape == want.shape
    assert 0 < (got - want).norm() / want.norm() < 0.06


# --- from end to end ---


def read(path: Path) -> dict:
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(path.read_text())


def test_peers(tmp_path, capsys):
    path = tmp_path / "peers.json"
    assert peers.main(["--tiny", "--rounds", "2", "--json", str(path)]) == 0
    result, printed = read(path), capsys.readouterr().out
    keys = {"system", "references", "steps", "guidance", "step_seconds", "picture_seconds", "peak_mib"}
    assert all(keys <= set(row) for row in result["rows"])
    every = {(row["system"], row["references"]) for row in result["rows"]}
    assert every == {(system, count) for system in peers.SYSTEMS for count in (0, 6)}
    long = [row for row in result["rows"] if row["steps"] == 50]
    assert [(row["system"], row["guidance"], row["extrapolated"]) for row in long] == [("release", 4.0, True)] * 2
    for row in result["rows"]:
        assert row["picture_seconds"] > row["step_seconds"] > 0 < row["peak_mib"]
    assert [bar["limit"] for bar in result["bars"]] == [0.62, 0.65, 0.055, 0.16]
    assert result["form"] == "prefix_causal"
    assert all(bar["verdict"] in ("PASS", "FAIL") and "prefix_causal" in bar["what"] for bar in result["bars"])
    assert all("reference_causal" in bar["what"] for bar in result["other_form"]["bars"])
    assert printed.count("in 60 layers") == 8


def test_the_floors_of_the_bars_leave_room():
    """By arithmetic alone the shipped form meets every bar at the benchmark's own sizes."""
    times = Times({name: [1.0] for name in ("product", "unipic", "release", "editplus")})
    extra = {f"{run} {form}": [1.0] for run in (peers.CACHED, peers.FILL) for form in CAUSAL}
    bars = peers.bars_of(peers.FULL_SIZE, "prefix_causal", Times({**times.seconds, **extra}))
    assert all(bar.floor < 0.9 * bar.limit for bar in bars)
    assert [bar.floor for bar in bars] == pytest.approx([0.52, 0.48, 0.038, 0.083], rel=0.02)


def test_scaling(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "TINY", replace(scaling.TINY, counts=(1, 2)))
    path = tmp_path / "scaling.json"
    assert scaling.main(["--tiny", "--rounds", "1", "--json", str(path)]) == 0
    result = read(path)
    axes = list(scaling.TINY.axes)
    assert list(dict.fromkeys(row["axis"] for row in result["rows"])) == axes
    assert len(result["exponents"]) == 3 * len(axes)
    batch = [row for row in result["exponents"] if row["axis"] == "batch"]
    assert [row["time_arithmetic"] for row in batch] == pytest.approx([1.0, 1.0, 1.0])
    assert all(row["peak_mib"] >= 0 for row in result["rows"] if row["run"] != "fill")
    assert capsys.readouterr().out.count("memory_arithmetic") == 1


def test_vae(tmp_path, capsys):
    path = tmp_path / "vae.json"
    assert vae.main(["--tiny", "--rounds", "2", "--json", str(path)]) == 0
    rows = read(path)["rows"]
    assert [(row["direction"], row["size"]) for row in rows] == [(d, s) for s in (32, 64) for d in ("encode", "decode")]
    for row in rows:
        assert row["ratio_arithmetic"] == pytest.approx(row["ours_arithmetic"] / row["diffusers_arithmetic"])
        assert row["ours_seconds"] > row["ours_arithmetic"] > 0 < row["ratio"]
        assert 0 < row["max_difference"] < 1e-4
    assert capsys.readouterr().out.count("code ") == 4


def test_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(network, "PRODUCT_SIDE", 64)
    path = tmp_path / "network.json"
    assert network.main(["--tiny", "--rounds", "1", "--json", str(path)]) == 0
    rows = read(path)["rows"]
    assert [(row["dtype"], row["pass_"]) for row in rows] == [
        (dtype, pass_) for dtype in ("float32", "bfloat16") for pass_ in network.PASSES
    ]
    assert all(0 < row["ratio_floor"] < 1 and row["ratio"] > 0 for row in rows)
    assert rows[1]["max_difference"] < 1e-5
    assert "ratio_floor" in capsys.readouterr().out


def test_training(tmp_path, monkeypatch, capsys):
    """All of it but the processes that measure memory, which take seconds each to start."""
    for module in (training, training_steps):
        monkeypatch.setattr(module, "peak_of_its_own", lambda make, *args: 2**20)
        monkeypatch.setattr(module, "PRODUCT_SIDE", 64)
    path = tmp_path / "training.json"
    assert training.main(["--tiny", "--rounds", "1", "--json", str(path)]) == 0
    result, printed = read(path), capsys.readouterr().out
    assert [(row["form"], row["roles"]) for row in result["steps"]] == [
        (form, roles) for roles in ("adapters", "copies") for form in ATTENTION_FORMS
    ]
    floors = [row["time_ratio_arithmetic"] for row in result["steps"]]
    assert floors[0] == 1.0 == result["steps"][0]["time_ratio"]
    assert floors[2] < floors[1] < 1 < floors[3]  # causal forms do less, gradients of all weights are more
    assert result["memory"]["nano_ratio_arithmetic"] < 1
    assert result["cached_against_encoding"]["ratio_arithmetic"] < 1
    found = [result["memory"], result["cached_against_encoding"], *result["against_diffusers"], *result["steps"]]
    for row in (*found, result["mixed_batch_against_one_by_one"]):
        figures = {k for k in row if not k.endswith("_arithmetic")} - {"method", "form", "roles", "case", "padding"}
        assert {f"{key}_arithmetic" for key in figures} <= set(row)
    assert all(f"\n{name}\n" in printed for name in result if name != "machine")


def test_tangent_precision(tmp_path, monkeypatch):
    path = tmp_path / "tangent.json"
    monkeypatch.setattr(tangent_precision, "TIMES", (0.0, 0.5))
    monkeypatch.setattr(tangent_precision, "NETWORKS", {"golden": tangent_precision.golden})
    assert tangent_precision.main(["--seeds", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["tangent"], row["t"]) for row in rows] == [(k, t) for k in ("difference", "jvp") for t in (0.0, 0.5)]
    for row in rows:
        assert row["float32"] < 1e-4 < row["tf32"] < tangent_precision.BOUND
        assert row["tf32"] < row["bf16"]


def test_approximate(tmp_path, capsys):
    path = tmp_path / "approximate.json"
    assert approximate.main(["--steps", "3", "--n", "1", "--json", str(path)]) == 0
    result = read(path)
    assert [row["limit"] for row in result["rows"]] == list(approximate.LIMITS)
    first, *_, last = result["rows"]
    assert (first["refreshed"], first["latents"], first["time"]) == ("0, 1, 2", pytest.approx(0, abs=1e-5), 1.0)
    assert last["refreshed"] == "0"
    assert last["time"] < 1
    assert last["latents"] > 1e-4
    table = result["errors"]
    assert [(i, j) for i in range(3) for j in range(3) if table[i][j] is not None] == [(0, 1), (0, 2), (1, 2)]
    assert "dB apart" in capsys.readouterr().out


def test_gpu(tmp_path, monkeypatch, capsys):
    """All of it on the machine that there is, but compiling, which test_compiling.py does."""
    asked: list[str] = []
    monkeypatch.setattr(gpu, "compile_blocks", lambda network, backend: asked.append(network.config.attention_form))
    path = tmp_path / "gpu.json"
    assert gpu.main(["--tiny", "--rounds", "1", "--form", "reference_causal", "--json", str(path)]) == 0
    assert asked == [FULL, "reference_causal"] * 2
    result = read(path)
    found = {(r["precision"], r["references"], r["cached"], r["compiled"]) for r in result["rows"]}
    assert len(found) == len(result["rows"]) == 2 * 2 * 2 * 2
    assert all(row["tflops"] > 0 and row["picture_seconds"] > row["step_seconds"] for row in result["rows"])
    assert len(result["parts"]) == 4
    assert all(part["floor"] > 0 < part["seconds"] for part in result["parts"])
    assert [bar["limit"] for bar in result["bars"]] == [0.6, 2.2, 1.6]
    assert result["bars"][0]["verdict"] in ("PASS", "FAIL")
    assert "rate over the matrix product's" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_is_skipped_in_one_line(capsys):
    assert gpu.main([]) == 0
    assert capsys.readouterr().out == "gpu: nothing measured, there is no CUDA device; --tiny runs a toy on the CPU\n"


def test_limits_for_another_device_are_not_judged():
    row = {"precision": "fp8", "references": 6, "cached": True, "picture_seconds": 9.0, "picture_floor": 1.0}
    assert [bar.verdict for bar in gpu.bars_of([row], 6, "nvidia-h100-80gb-hbm3")] == ["FAIL"]
    assert [bar.verdict for bar in gpu.bars_of([row], 6, "nvidia-a100")] == ["set for another device"]
