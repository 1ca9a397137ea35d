"""The benchmarks themselves: the arithmetic, and each in its tiny form from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import gpu, peers, scaling
from tests.benchmarks.arithmetic import Load, cache_bytes, fill_flops, step_flops, whole_flops
from tests.benchmarks.common import Bar, Times, heading, in_turns, line, write_json
from tests.benchmarks.network import diffusers_network, evaluate_diffusers
from tests.benchmarks.scaled_fp8 import ScaledLinear
from tests.benchmarks.systems import CAUSAL, TINY_SIZES, Kind, evaluate, fill, sharing, square, with_text
from unipic_core.attention import matmul_attention
from unipic_core.mmdit import MMDiTConfig
from unipic_core.segments import ATTENTION_FORMS, FULL
from unipic_core.sequence import LatentShape

KIND = Kind(torch.float32, attention=matmul_attention)  # torch's counter does not know the fused one on a CPU


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# --- the arithmetic ---


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize("count", [0, 2])
def test_operations_are_those_that_torch_counts(form, count):
    load = replace(with_text(LatentShape(1, 3, 4), sharing(4, count)), batch=2)
    network = KIND.random(TINY_SIZES.with_form(form))
    inputs = KIND.inputs(TINY_SIZES, load)
    cache = fill(network, inputs)
    assert counted(lambda: evaluate(network, inputs)) == step_flops(network.config, load)
    assert counted(lambda: evaluate(network, inputs, cache)) == step_flops(network.config, load, cached=True)
    assert counted(lambda: fill(network, inputs)) == fill_flops(network.config, load)
    kept = sum(x.nbytes for pairs in cache.values() for pair in pairs for x in pair)
    assert kept == cache_bytes(network.config, load, 4)


def test_operations_of_diffusers_class():
    load = with_text(square(4), sharing(4, 3))
    ours = KIND.random(TINY_SIZES)
    theirs, inputs = diffusers_network(ours), KIND.inputs(TINY_SIZES, load)
    with sdpa_kernel(SDPBackend.MATH):
        assert counted(lambda: evaluate_diffusers(theirs, inputs)) == whole_flops(TINY_SIZES, load)
    assert (evaluate(ours, inputs) - evaluate_diffusers(theirs, inputs)).abs().max() < 1e-5


def test_the_released_step_is_that_of_the_papers_sizes():
    """The task's own figures: 187 TFLOP a step, and 0.56 or 0.45 of it with a cache."""
    config, load = MMDiTConfig(), Load(square(64), (square(64),), 1070)
    full = step_flops(config, load)
    assert full / 1e12 == pytest.approx(187, rel=0.02)
    parts = [step_flops(config.with_form(form), load, cached=True) / full for form in CAUSAL]
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
