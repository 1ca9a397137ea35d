"""The GPU benchmark where there is no GPU: what it leaves out and says, what it lets go of, where results go."""

from __future__ import annotations

import argparse
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import common, gpu, gpu_parts
from tests.benchmarks.systems import CPU, Kind
from unipic_core.errors import UniPicError
from unipic_core.model.config import FULL, PREFIX_CAUSAL

BENCH = gpu.Bench(gpu.TINY, PREFIX_CAUSAL, 1)
CUDA = torch.device("cuda", 0)


def test_a_peak_does_not_count_what_was_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the references before, and the VAE while the text encoder is measured."""
    alive: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []
    fill, vae_runs = gpu.fill, gpu.vae_runs

    def filled(*args: Any) -> Any:
        cache = fill(*args)
        alive.extend(weakref.ref(x) for pairs in cache.values() for pair in pairs for x in pair)
        return cache

    def made(*args: Any) -> Any:
        runs = vae_runs(*args)
        alive.extend(weakref.ref(p) for p in runs["VAE, picture decoded"].args[0].__self__.parameters())
        return runs

    def peak(run: Any, device: torch.device) -> int:
        held.append(sum(tensor() is not None for tensor in alive))
        return 0

    for name, stand_in in (("fill", filled), ("vae_runs", made), ("peak_of", peak)):
        monkeypatch.setattr(gpu, name, stand_in)
    kind = Kind(torch.bfloat16, CPU)
    plain = kind.random(BENCH.setup.config)
    networks = {name + end: kind.twin(plain, form) for name, form in FORMS.items() for end in ("", gpu.COMPILED)}
    assert len(list(gpu.rows_of(BENCH, "bf16", networks, kind))) == 8
    assert alive
    assert held == [0] * 8
    del alive[:], held[:]
    assert len(list(gpu.part_rows(BENCH, kind))) == 4
    of_vae = len(alive)
    assert held == [of_vae, of_vae, 0, 0]
    assert of_vae > 0


FORMS = {gpu.UNCACHED: FULL, gpu.CACHED: PREFIX_CAUSAL}


def test_a_gpu_without_fp8_units_leaves_fp8_out(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    result: dict[str, Any] = {"rows": []}
    gpu.measure_network(BENCH, Kind(torch.bfloat16, CUDA), "fp8", result, None)
    assert result["rows"] == []
    assert capsys.readouterr().out == "fp8: left out, this GPU has no fp8 units\n"
    assert gpu.has_units("bf16", CUDA)
    assert gpu.has_units("fp8", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert gpu.has_units("fp8", CUDA)


def test_memory_is_given_back_before_it_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.own = self

    cycle, steps = weakref.ref(Cycle()), []

    def memory() -> tuple[int, int]:
        steps.append((cycle() is None, "counted"))
        return 100, 100

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: steps.append((cycle() is None, "emptied")))
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    assert gpu.room_for(76, 1, CUDA)
    assert steps == [(True, "emptied"), (True, "counted")]
    assert not gpu.room_for(77, 1, CUDA)


def test_a_compiler_is_asked_for_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(device: Any) -> None:
        raise UniPicError(f"no compiler for {torch.device(device).type}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "check_compiler", absent)
    with pytest.raises(UniPicError, match="no compiler for cuda"):
        gpu.main([])


def test_the_parts_are_those_of_the_release() -> None:
    assert gpu_parts.encoder_numbers(gpu_parts.RELEASED) == 7_747_169_280
    runs = gpu_parts.vae_runs(gpu_parts.TINY, Kind(torch.float32, CPU), 64)
    kernels = [p for p in runs["VAE, picture decoded"].args[0].__self__.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert not all(p.is_contiguous() for p in kernels)


def test_no_panels_no_picture(tmp_path: Path) -> None:
    common.draw(tmp_path / "x.json", [], pytest.fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "peers-cpu-2cores.json"),
        (["--form", "prefix_causal"], "peers-cpu-2cores.json"),
        (["--form", "reference_causal"], "peers-cpu-2cores-form-reference_causal.json"),
        (["--dtype", "bfloat16", "--rounds", "1"], "peers-cpu-2cores-rounds-1-dtype-bfloat16.json"),
        (["--model", "a/b.safetensors"], "peers-cpu-2cores-model-b.json"),
    ],
)
def test_results_of_other_options_have_other_names(
    arguments: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "device_name", lambda cuda: "cpu-2cores")
    parser: argparse.ArgumentParser = common.make_parser(None, rounds=3)
    parser.add_argument("--form", default="prefix_causal")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", type=Path, default=Path("nano"))
    assert common.result_file(parser.parse_args(arguments), "peers") == tmp_path / name
